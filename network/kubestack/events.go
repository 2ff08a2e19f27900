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
)

// events tells of failures at the Pod they befell.
type events struct {
	api  client.Client
	node string
}

// reason is one word for why a Pod got no network.
func reason(err error) string {
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
	now := time.Now()
	sum := sha256.Sum256([]byte(string(pod.GetUID()) + reason(err) + now.Truncate(time.Minute).Format(time.RFC3339)))
	note := err.Error()
	if len(note) > 1024 {
		note = note[:1021] + "..."
	}
	event := &eventsv1.Event{
		ObjectMeta: metav1.ObjectMeta{Namespace: pod.GetNamespace(), Name: pod.GetName() + "." + hex.EncodeToString(sum[:8])},
		EventTime:  metav1.NewMicroTime(now), ReportingController: "hypernetes.io/kubestack", ReportingInstance: e.node,
		Action: "Attach", Reason: reason(err), Type: corev1.EventTypeWarning, Note: note,
		Regarding: corev1.ObjectReference{Kind: "Pod", APIVersion: "v1", Namespace: pod.GetNamespace(), Name: pod.GetName(), UID: pod.GetUID()},
	}
	if err := e.api.Create(ctx, event); err != nil && !apierrors.IsAlreadyExists(err) {
		log.G(ctx).WithError(err).WithField("pod", pod.GetNamespace()+"/"+pod.GetName()).Debug("write event")
	}
}
