// Package binding owns the answer to "whose is this namespace": a core Namespace is a
// tenant's if a TenantNamespace says so that is bound to this very Namespace, by UID, and
// nothing on the Namespace itself counts. And to "whose is this Keystone project". It must
// not know what follows from it.
package binding

import (
	"context"
	"fmt"
	"strings"

	"github.com/containerd/errdefs"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"sigs.k8s.io/controller-runtime/pkg/client"

	v1alpha1 "github.com/hypernetes/hypernetes/api/hypernetes/v1alpha1"
)

// AnnotationOwner on a Namespace is the UID of the TenantNamespace it was made for. It
// only serves to find a Namespace again that was made by a controller that died before it
// wrote that down; tenants have no verb on Namespaces.
const AnnotationOwner = "hypernetes.io/tenantnamespace-uid"

// IndexName indexes TenantNamespaces by metadata.name, over all homes.
const IndexName = "metadata.name"

// IndexProject indexes Tenants by the Keystone project they claim.
const IndexProject = "spec.keystone.projectID"

// Index makes IndexName and IndexProject; Of and Project need them of a caching reader.
func Index(ctx context.Context, i client.FieldIndexer) error {
	if err := i.IndexField(ctx, &v1alpha1.Tenant{}, IndexProject, func(o client.Object) []string {
		if k := o.(*v1alpha1.Tenant).Spec.Keystone; k != nil {
			return []string{k.ProjectID}
		}
		return nil
	}); err != nil {
		return err
	}
	return i.IndexField(ctx, &v1alpha1.TenantNamespace{}, IndexName, func(o client.Object) []string {
		return []string{o.GetName()}
	})
}

// Home returns the tenant whose home namespace is ns. The error is errdefs.ErrNotFound if
// there is none, errdefs.ErrUnavailable while the tenant is being made.
func Home(ctx context.Context, r client.Reader, ns string) (*v1alpha1.Tenant, error) {
	name, ok := strings.CutPrefix(ns, v1alpha1.HomePrefix)
	if !ok {
		return nil, fmt.Errorf("namespace %s is not a tenant's home (%s<tenant>): %w", ns, v1alpha1.HomePrefix, errdefs.ErrNotFound)
	}
	t := &v1alpha1.Tenant{}
	if err := r.Get(ctx, client.ObjectKey{Name: name}, t); apierrors.IsNotFound(err) {
		return nil, fmt.Errorf("there is no tenant %s: %w", name, errdefs.ErrNotFound)
	} else if err != nil {
		return nil, err
	}
	switch {
	case t.Status.HomeNamespace == ns:
	case t.Status.Phase == "" || t.Status.Phase == "Pending":
		return nil, fmt.Errorf("tenant %s is being made: %w", name, errdefs.ErrUnavailable)
	default:
		return nil, fmt.Errorf("namespace %s is not the home of tenant %s: %w", ns, name, errdefs.ErrNotFound)
	}
	return t, nil
}

// Binding is what a Namespace is bound to.
type Binding struct {
	Tenant          string
	TenantNamespace *v1alpha1.TenantNamespace
}

// Of returns what ns is bound to. ok is false for a Namespace of no tenant; the error is
// errdefs.ErrUnavailable while it is being bound.
func Of(ctx context.Context, r client.Reader, ns *corev1.Namespace) (b Binding, ok bool, err error) {
	list := &v1alpha1.TenantNamespaceList{}
	if err := r.List(ctx, list, client.MatchingFields{IndexName: ns.Name}); err != nil {
		return Binding{}, false, err
	}
	for i := range list.Items {
		tns := &list.Items[i]
		tenant, home := strings.CutPrefix(tns.Namespace, v1alpha1.HomePrefix)
		if !home {
			continue
		}
		switch {
		case tns.Status.NamespaceUID == string(ns.UID):
			return Binding{tenant, tns}, true, nil
		case tns.Status.NamespaceUID == "" && ns.Annotations[AnnotationOwner] == string(tns.UID):
			return Binding{}, false, fmt.Errorf("namespace %s is being bound to tenant %s: %w", ns.Name, tenant, errdefs.ErrUnavailable)
		}
	}
	return Binding{}, false, nil
}

// Project returns the tenant that has a Keystone project, by the project's ID. Of several
// that claim it the eldest has it: admission refuses a second claim, but two may be made at
// once. The error is errdefs.ErrNotFound if there is none.
func Project(ctx context.Context, r client.Reader, id string) (*v1alpha1.Tenant, error) {
	list := &v1alpha1.TenantList{}
	if err := r.List(ctx, list, client.MatchingFields{IndexProject: id}); err != nil {
		return nil, err
	}
	var eldest *v1alpha1.Tenant
	for i := range list.Items {
		if t := &list.Items[i]; eldest == nil || elder(t, eldest) {
			eldest = t
		}
	}
	if eldest == nil {
		return nil, fmt.Errorf("no tenant has Keystone project %s: %w", id, errdefs.ErrNotFound)
	}
	return eldest, nil
}

func elder(a, b *v1alpha1.Tenant) bool {
	if !a.CreationTimestamp.Equal(&b.CreationTimestamp) {
		return a.CreationTimestamp.Before(&b.CreationTimestamp)
	}
	return a.UID < b.UID
}
