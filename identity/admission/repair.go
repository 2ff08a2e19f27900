package admission

import (
	"context"
	"encoding/json"
	"fmt"
	"time"

	"github.com/containerd/errdefs"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/types"
	ctrl "sigs.k8s.io/controller-runtime"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/controller"
	"sigs.k8s.io/controller-runtime/pkg/event"
	"sigs.k8s.io/controller-runtime/pkg/handler"
	"sigs.k8s.io/controller-runtime/pkg/predicate"
	"sigs.k8s.io/controller-runtime/pkg/reconcile"
	"sigs.k8s.io/controller-runtime/pkg/source"
)

const (
	fieldManager = "h8s-controller"
	// resync applies everything again, for changes a watch did not tell of.
	resync = 10 * time.Minute
)

// repair keeps objects in the API server as they should be.
type repair struct {
	client  client.Client
	objects map[string]*unstructured.Unstructured
}

var _ reconcile.Reconciler = (*repair)(nil)

// addRepair has every object applied now, when it changes and when it is deleted.
func addRepair(mgr ctrl.Manager, objects []*unstructured.Unstructured) error {
	r := &repair{client: mgr.GetClient(), objects: map[string]*unstructured.Unstructured{}}
	kinds := map[string]*unstructured.Unstructured{}
	for _, o := range objects {
		r.objects[key(o)] = o
		kinds[o.GetKind()] = o
	}
	c, err := controller.New("admission", mgr, controller.Options{Reconciler: r})
	if err != nil {
		return err
	}
	// One request for each object at the start; what the watches say afterwards is the same.
	first := make(chan event.GenericEvent, len(objects))
	for _, o := range objects {
		first <- event.GenericEvent{Object: o}
	}
	toRequest := handler.EnqueueRequestsFromMapFunc(func(_ context.Context, o client.Object) []reconcile.Request {
		k := o.GetObjectKind().GroupVersionKind().Kind + "/" + o.GetName()
		if _, ours := r.objects[k]; !ours {
			return nil
		}
		return []reconcile.Request{{NamespacedName: types.NamespacedName{Name: k}}}
	})
	if err := c.Watch(source.Channel(first, toRequest)); err != nil {
		return err
	}
	for _, o := range kinds {
		// Generations change with the specification; status is the API server's.
		watched := &metav1.PartialObjectMetadata{}
		watched.SetGroupVersionKind(o.GroupVersionKind())
		kind := o.GetKind()
		mapped := handler.EnqueueRequestsFromMapFunc(func(_ context.Context, o client.Object) []reconcile.Request {
			k := kind + "/" + o.GetName()
			if _, ours := r.objects[k]; !ours {
				return nil
			}
			return []reconcile.Request{{NamespacedName: types.NamespacedName{Name: k}}}
		})
		var changed predicate.Predicate = predicate.GenerationChangedPredicate{}
		if err := c.Watch(source.Kind(mgr.GetCache(), client.Object(watched), mapped, changed)); err != nil {
			return err
		}
	}
	return nil
}

func key(o *unstructured.Unstructured) string { return o.GetKind() + "/" + o.GetName() }

// Reconcile applies one object.
func (r *repair) Reconcile(ctx context.Context, req reconcile.Request) (reconcile.Result, error) {
	want, ours := r.objects[req.Name]
	if !ours {
		return reconcile.Result{}, nil
	}
	if err := apply(ctx, r.client, want); err != nil {
		return reconcile.Result{}, fmt.Errorf("apply %s: %w", req.Name, err)
	}
	return reconcile.Result{RequeueAfter: resync}, nil
}

// apply makes the object what want says and nothing else: what others added (a match
// condition that never matches, say) is taken out again.
func apply(ctx context.Context, c client.Client, want *unstructured.Unstructured) error {
	got := want.DeepCopy()
	if err := c.Apply(ctx, client.ApplyConfigurationFromUnstructured(got), client.FieldOwner(fieldManager), client.ForceOwnership); err != nil {
		return err
	}
	if got.GetDeletionTimestamp() != nil {
		return fmt.Errorf("%s is being deleted: %w", key(want), errdefs.ErrUnavailable)
	}
	if !othersWrote(got) {
		return nil
	}
	replacement := want.DeepCopy()
	replacement.SetResourceVersion(got.GetResourceVersion())
	err := c.Update(ctx, replacement, client.FieldOwner(fieldManager))
	if apierrors.IsConflict(err) {
		return fmt.Errorf("%w: %w", err, errdefs.ErrUnavailable)
	}
	return err
}

// othersWrote says whether fields beyond metadata belong to another manager.
func othersWrote(o *unstructured.Unstructured) bool {
	for _, m := range o.GetManagedFields() {
		if m.Subresource != "" || m.FieldsV1 == nil || (m.Manager == fieldManager && m.Operation == metav1.ManagedFieldsOperationApply) {
			continue
		}
		var fields map[string]any
		if err := json.Unmarshal([]byte(m.FieldsV1.GetRawString()), &fields); err != nil {
			return true
		}
		for f := range fields {
			if f != "f:metadata" {
				return true
			}
		}
	}
	return false
}
