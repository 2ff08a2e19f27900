package kubestack

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"time"

	"github.com/containerd/errdefs"
	"github.com/containerd/log"
	corev1 "k8s.io/api/core/v1"
	eventsv1 "k8s.io/api/events/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"github.com/hypernetes/hypernetes/network/ipam"
	"github.com/hypernetes/hypernetes/network/provider"
)

// events tells of failures at the object they befell.
type events struct {
	api  client.Client
	node string
}

// reason is one word for why a Pod got no network.
func reason(err error) string {
	if text := provider.Reason(err, ""); text != "" {
		return text
	}
	switch {
	case errors.As(err, new(ipam.ErrExhausted)):
		return "AddressesExhausted"
	case errors.Is(err, ipam.ErrQuota):
		return "QuotaExceeded"
	case errdefs.IsAlreadyExists(err):
		return "AddressInUse"
	case errdefs.IsInvalidArgument(err):
		return "InvalidRequest"
	case errdefs.IsFailedPrecondition(err):
		return "BindingMissing"
	case errdefs.IsUnavailable(err):
		return "NetworkNotReady"
	default:
		return "NetworkFailed"
	}
}

// failed records that a Pod got no network. One event stands for a minute of the same
// reason: the kubelet tries again and again.
func (e *events) failed(ctx context.Context, pod client.Object, err error) {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), 5*time.Second)
	defer cancel()
	minute := time.Now().Truncate(time.Minute).Format(time.RFC3339)
	e.warn(ctx, pod, corev1.ObjectReference{Kind: "Pod", APIVersion: "v1"}, "Attach", reason(err), err.Error(), minute)
}

// mistake records what cannot be meant in a policy. All nodes say the same, so that one
// event stands for all of them.
func (e *events) mistake(ctx context.Context, np client.Object, text string) {
	e.warn(ctx, np, corev1.ObjectReference{Kind: "NetworkPolicy", APIVersion: "networking.k8s.io/v1"}, "Enforce", "InvalidPolicy", text, text)
}

// warn writes an event, one for each key of the object and reason.
func (e *events) warn(ctx context.Context, about client.Object, ref corev1.ObjectReference, action, reason, note, key string) {
	sum := sha256.Sum256([]byte(string(about.GetUID()) + reason + key))
	if len(note) > 1024 {
		note = note[:1021] + "..."
	}
	ref.Namespace, ref.Name, ref.UID = about.GetNamespace(), about.GetName(), about.GetUID()
	event := &eventsv1.Event{
		ObjectMeta: metav1.ObjectMeta{Namespace: ref.Namespace, Name: ref.Name + "." + hex.EncodeToString(sum[:8])},
		EventTime:  metav1.NowMicro(), ReportingController: "hypernetes.io/kubestack", ReportingInstance: e.node,
		Action: action, Reason: reason, Type: corev1.EventTypeWarning, Note: note, Regarding: ref,
	}
	if err := e.api.Create(ctx, event); err != nil && !apierrors.IsAlreadyExists(err) {
		log.G(ctx).WithError(err).WithField("event", ref.Kind+" "+ref.Namespace+"/"+ref.Name).Debug("write event")
	}
}
