package admission

import (
	"context"
	"fmt"
	"maps"
	"strings"

	"github.com/containerd/errdefs"
	"github.com/containerd/log"
	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"sigs.k8s.io/controller-runtime/pkg/webhook/admission"

	"github.com/hypernetes/hypernetes/identity/inject"
)

// inject adds what the Pod's Deployment, or the Pod itself, asks for by annotation. What
// cannot be injected leaves the Pod as it was written and an event on the Deployment.
func (h *decider) inject(ctx context.Context, req admission.Request, pod *corev1.Pod) {
	deployment, asked, err := h.asked(ctx, req.Namespace, pod)
	if err != nil {
		// The Pod is admitted all the same: a Deployment that just went has no say any more.
		log.G(ctx).WithError(err).WithFields(log.Fields{"namespace": req.Namespace, "pod": pod.Name}).Warn("injection: owner not found")
	}
	for _, name := range inject.Names(asked) {
		spec := pod.Spec.DeepCopy()
		if err := h.injectOne(ctx, req.Namespace, name, spec); err != nil {
			h.failed(ctx, req, deployment, pod, name, err)
			continue
		}
		pod.Spec = *spec
	}
}

func (h *decider) injectOne(ctx context.Context, namespace, name string, spec *corev1.PodSpec) error {
	var config corev1.ConfigMap
	// Asked from the API server: ConfigMaps are many and this one is needed rarely.
	found, err := reader{cached: h.read.live, live: h.read.live}.get(ctx, namespace, name+inject.ConfigSuffix, &config)
	if err != nil {
		return err
	}
	if !found {
		return fmt.Errorf("there is no ConfigMap %s%s in namespace %s: create it, or take the annotation off: %w", name, inject.ConfigSuffix, namespace, errdefs.ErrNotFound)
	}
	text, ok := config.Data[inject.Key]
	if !ok {
		return fmt.Errorf("ConfigMap %s%s has no key %q in its data: %w", name, inject.ConfigSuffix, inject.Key, errdefs.ErrInvalidArgument)
	}
	fragment, err := inject.Parse(text)
	if err == nil {
		err = inject.Apply(spec, fragment)
	}
	if err != nil {
		return fmt.Errorf("ConfigMap %s%s: %w", name, inject.ConfigSuffix, err)
	}
	return nil
}

// asked is the Pod's Deployment, if it has one, and the annotations of both.
func (h *decider) asked(ctx context.Context, namespace string, pod *corev1.Pod) (*appsv1.Deployment, map[string]string, error) {
	all := maps.Clone(pod.Annotations)
	if all == nil {
		all = map[string]string{}
	}
	live := reader{cached: h.read.live, live: h.read.live}
	name := controllerOf(pod, "ReplicaSet")
	if name == "" {
		return nil, all, nil
	}
	var set appsv1.ReplicaSet
	if found, err := live.get(ctx, namespace, name, &set); err != nil || !found {
		return nil, all, err
	}
	name = controllerOf(&set, "Deployment")
	if name == "" {
		// A ReplicaSet of its own may ask as well.
		maps.Copy(all, set.Annotations)
		return nil, all, nil
	}
	var deployment appsv1.Deployment
	if found, err := live.get(ctx, namespace, name, &deployment); err != nil || !found {
		return nil, all, err
	}
	maps.Copy(all, deployment.Annotations)
	return &deployment, all, nil
}

func (h *decider) failed(ctx context.Context, req admission.Request, deployment *appsv1.Deployment, pod *corev1.Pod, name string, err error) {
	log.G(ctx).WithError(err).WithFields(log.Fields{"namespace": req.Namespace, "config": name}).Warn("injection failed")
	if req.DryRun != nil && *req.DryRun {
		return
	}
	var about runtime.Object
	switch {
	case deployment != nil:
		about = deployment
	case pod.Name != "":
		pod := pod.DeepCopy()
		pod.Namespace = req.Namespace
		about = pod
	default:
		return
	}
	message := fmt.Sprintf("%s%s: %v; the Pod was created as written", inject.AnnotationPrefix, name, err)
	// Events hold 1024 bytes.
	if len(message) > 1000 {
		message = strings.ToValidUTF8(message[:1000], "") + "…"
	}
	h.events.Eventf(about, nil, corev1.EventTypeWarning, "InjectionFailed", "Inject", "%s", message)
}
