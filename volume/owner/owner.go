// Package owner tells by the API server whose Keystone project a namespace is: the
// namespace's TenantNamespace, bound by UID, names the tenant, and the Tenant its project.
//
// It owns that way. It must not know volumes.
package owner

import (
	"context"
	"fmt"
	"slices"
	"time"

	"github.com/containerd/errdefs"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"sigs.k8s.io/controller-runtime/pkg/client"

	v1alpha1 "github.com/hypernetes/hypernetes/api/hypernetes/v1alpha1"
	"github.com/hypernetes/hypernetes/identity/binding"
)

// timeout bounds what an answer takes: a Pod waits for it.
const timeout = 15 * time.Second

// conditionProject of a Tenant is written by identity/tenant.
const conditionProject = "ProjectReady"

// API asks the API server each time, so that no cache has a tenant's volume given to who
// was its owner.
type API struct{ Reader client.Reader }

// OwnerOf returns the Keystone project of the tenant that a namespace is bound to, "" for
// a namespace of no tenant.
//
// Errors: errdefs.ErrNotFound without such a namespace, errdefs.ErrFailedPrecondition for
// a tenant without a project, errdefs.ErrUnavailable while nobody knows.
func (a API) OwnerOf(ctx context.Context, namespace string) (string, error) {
	ctx, cancel := context.WithTimeout(ctx, timeout)
	defer cancel()
	ns := &corev1.Namespace{}
	if err := a.Reader.Get(ctx, client.ObjectKey{Name: namespace}, ns); apierrors.IsNotFound(err) {
		return "", fmt.Errorf("namespace %s: %w", namespace, errdefs.ErrNotFound)
	} else if err != nil {
		return "", fmt.Errorf("namespace %s: %w: %w", namespace, errdefs.ErrUnavailable, err)
	}
	b, ok, err := binding.Of(ctx, a.Reader, ns)
	switch {
	case errdefs.IsUnavailable(err):
		return "", err
	case err != nil:
		return "", fmt.Errorf("namespace %s: %w: %w", namespace, errdefs.ErrUnavailable, err)
	case !ok:
		return "", nil
	}
	t := &v1alpha1.Tenant{}
	if err := a.Reader.Get(ctx, client.ObjectKey{Name: b.Tenant}, t); err != nil {
		return "", fmt.Errorf("tenant %s: %w: %w", b.Tenant, errdefs.ErrUnavailable, err)
	}
	if t.Spec.Keystone == nil || t.Spec.Keystone.ProjectID == "" {
		return "", fmt.Errorf("tenant %s has no OpenStack project, so no volume there is its own: set spec.keystone.projectID of the Tenant: %w", b.Tenant, errdefs.ErrFailedPrecondition)
	}
	// Two Tenants may have claimed one project at once; the younger one's status says so.
	if c := meta.FindStatusCondition(t.Status.Conditions, conditionProject); c != nil && c.Status == metav1.ConditionFalse {
		return "", fmt.Errorf("tenant %s does not have its OpenStack project: %s: %w", b.Tenant, c.Message, errdefs.ErrFailedPrecondition)
	}
	return t.Spec.Keystone.ProjectID, nil
}

// Owners returns the Keystone projects of all tenants.
func (a API) Owners(ctx context.Context) ([]string, error) {
	ctx, cancel := context.WithTimeout(ctx, timeout)
	defer cancel()
	list := &v1alpha1.TenantList{}
	if err := a.Reader.List(ctx, list); err != nil {
		return nil, fmt.Errorf("list tenants: %w: %w", errdefs.ErrUnavailable, err)
	}
	var out []string
	for i := range list.Items {
		if k := list.Items[i].Spec.Keystone; k != nil && k.ProjectID != "" && !slices.Contains(out, k.ProjectID) {
			out = append(out, k.ProjectID)
		}
	}
	return out, nil
}
