package admission

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"

	"github.com/containerd/log"
	admissionv1 "k8s.io/api/admission/v1"
	certificatesv1 "k8s.io/api/certificates/v1"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/client-go/tools/events"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/webhook/admission"

	v1alpha1 "github.com/hypernetes/hypernetes/api/hypernetes/v1alpha1"
)

// decider answers the API server.
type decider struct {
	Options
	read    reader
	write   client.Client
	decoder admission.Decoder
	events  events.EventRecorder
}

func (h *decider) paths() map[string]admission.Handler {
	return map[string]admission.Handler{
		pathMutatePod:     admission.HandlerFunc(h.mutateTenantPod),
		pathMutateVolumes: admission.HandlerFunc(h.mutateVolumes),
		pathInjectPod:     admission.HandlerFunc(h.mutateOtherPod),
		pathValidatePod:   admission.HandlerFunc(h.validatePod),
		pathValidate:      admission.HandlerFunc(h.validateObject),
		pathCertificate:   admission.HandlerFunc(h.validateCertificate),
	}
}

// answer turns a decision into what the API server is told. An error that is no decision
// refuses too, and says that trying again may help.
func answer(ctx context.Context, req admission.Request, err error) admission.Response {
	var no refusal
	switch {
	case err == nil:
		return admission.Allowed("")
	case errors.As(err, &no):
		return admission.Denied(no.message)
	}
	log.G(ctx).WithError(err).WithFields(log.Fields{"kind": req.Kind.Kind, "namespace": req.Namespace, "name": req.Name}).Error("admission could not decide")
	return admission.Errored(http.StatusServiceUnavailable, fmt.Errorf("could not be checked, try again: %w", err))
}

func (h *decider) mutateTenantPod(ctx context.Context, req admission.Request) admission.Response {
	return h.mutate(ctx, req, func(pod *corev1.Pod) error {
		tenant, err := h.read.tenantOf(ctx, req.Namespace)
		if err != nil {
			return err
		}
		if tenant == nil {
			return refusef("metadata.namespace: %s: its tenant does not exist any more: the namespace is about to go, use another", req.Namespace)
		}
		h.inject(ctx, req, pod)
		if err := rewriteVolumes(pod); err != nil {
			return err
		}
		return shapePod(pod, tenant, h.rewrite)
	})
}

// mutateOtherPod is for the Pods of namespaces that belong to no tenant.
func (h *decider) mutateOtherPod(ctx context.Context, req admission.Request) admission.Response {
	return h.mutate(ctx, req, func(pod *corev1.Pod) error {
		h.inject(ctx, req, pod)
		return nil
	})
}

// mutateVolumes is for Pods of namespaces that belong to no tenant and name flexDriver.
func (h *decider) mutateVolumes(ctx context.Context, req admission.Request) admission.Response {
	return h.mutate(ctx, req, rewriteVolumes)
}

func (h *decider) mutate(ctx context.Context, req admission.Request, change func(*corev1.Pod) error) admission.Response {
	pod := &corev1.Pod{}
	if err := h.decoder.Decode(req, pod); err != nil {
		return admission.Errored(http.StatusBadRequest, err)
	}
	before := pod.DeepCopy()
	if err := change(pod); err != nil {
		return answer(ctx, req, err)
	}
	// The difference is taken between what was decoded and what became of it, so that fields
	// this build does not know stay in the object.
	from, err := json.Marshal(before)
	if err != nil {
		return admission.Errored(http.StatusInternalServerError, err)
	}
	to, err := json.Marshal(pod)
	if err != nil {
		return admission.Errored(http.StatusInternalServerError, err)
	}
	return admission.PatchResponseFromRaw(from, to)
}

func (h *decider) validatePod(ctx context.Context, req admission.Request) admission.Response {
	pod := &corev1.Pod{}
	if err := h.decoder.Decode(req, pod); err != nil {
		return admission.Errored(http.StatusBadRequest, err)
	}
	if err := h.checkPod(ctx, req.Namespace, pod); err != nil {
		return answer(ctx, req, err)
	}
	warnings, err := h.checkVolumes(ctx, req.Namespace, pod)
	return answer(ctx, req, err).WithWarnings(warnings...)
}

func (h *decider) validateCertificate(ctx context.Context, req admission.Request) admission.Response {
	csr := &certificatesv1.CertificateSigningRequest{}
	if err := h.decoder.Decode(req, csr); err != nil {
		return admission.Errored(http.StatusBadRequest, err)
	}
	return answer(ctx, req, checkCertificate(req.UserInfo, csr.Spec.SignerName, csr.Spec.Request))
}

// request is what the decisions need of an admission.Request.
type request struct {
	admission.Request
	h *decider
}

func (h *decider) validateObject(ctx context.Context, req admission.Request) admission.Response {
	r := request{req, h}
	var err error
	switch req.Resource.Resource {
	case "networks":
		err = check(ctx, r, r.network)
	case "tenantnamespaces":
		err = check(ctx, r, r.tenantNamespace)
	case "ports":
		err = check(ctx, r, r.port)
	case "floatingips":
		err = check(ctx, r, r.floatingIP)
	case "addresspools":
		err = check(ctx, r, r.addressPool)
	case "tenants":
		err = check(ctx, r, r.tenant)
	default:
		err = fmt.Errorf("%s: not one of those that are validated", req.Resource.Resource)
	}
	return answer(ctx, req, err)
}

// check decodes the object and the one before it, and asks decide.
func check[T any, P interface {
	*T
	runtime.Object
}](ctx context.Context, r request, decide func(ctx context.Context, now, old P) error) error {
	var now, old P
	if r.Operation != admissionv1.Delete {
		now = new(T)
		if err := r.h.decoder.Decode(r.Request, now); err != nil {
			return refusef("%s: cannot be read: %v", r.Resource.Resource, err)
		}
	}
	if r.Operation != admissionv1.Create {
		old = new(T)
		if err := r.h.decoder.DecodeRaw(r.OldObject, old); err != nil {
			return refusef("%s: cannot be read: %v", r.Resource.Resource, err)
		}
	}
	return decide(ctx, now, old)
}

// networks of a home namespace.
func (h *decider) networks(ctx context.Context, namespace string) ([]v1alpha1.Network, error) {
	var l v1alpha1.NetworkList
	err := h.read.cached.List(ctx, &l, client.InNamespace(namespace))
	return l.Items, err
}
