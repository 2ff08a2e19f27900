package admission

import (
	"context"
	"fmt"
	"slices"
	"strings"

	authenticationv1 "k8s.io/api/authentication/v1"
	authorizationv1 "k8s.io/api/authorization/v1"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"sigs.k8s.io/controller-runtime/pkg/client"

	v1alpha1 "github.com/hypernetes/hypernetes/api/hypernetes/v1alpha1"
)

// reader looks into the caches, and at the API server for what they do not have yet: an
// object and the one it needs are often created in one go.
type reader struct{ cached, live client.Reader }

// get fills o and says whether it exists.
func (r reader) get(ctx context.Context, namespace, name string, o client.Object) (bool, error) {
	k := client.ObjectKey{Namespace: namespace, Name: name}
	err := r.cached.Get(ctx, k, o)
	if apierrors.IsNotFound(err) {
		err = r.live.Get(ctx, k, o)
	}
	if apierrors.IsNotFound(err) {
		return false, nil
	}
	return err == nil, err
}

// tenantOf is the tenant whose namespace it is, by the label that only the controller writes.
func (r reader) tenantOf(ctx context.Context, namespace string) (*v1alpha1.Tenant, error) {
	var ns corev1.Namespace
	found, err := r.get(ctx, "", namespace, &ns)
	if err != nil || !found {
		return nil, err
	}
	name := ns.Labels[v1alpha1.LabelTenant]
	if name == "" {
		return nil, nil
	}
	var t v1alpha1.Tenant
	if found, err = r.get(ctx, "", name, &t); err != nil || !found {
		return nil, err
	}
	return &t, nil
}

// homeOf is the tenant whose home namespace it is.
func (r reader) homeOf(ctx context.Context, namespace string) (*v1alpha1.Tenant, error) {
	name, home := strings.CutPrefix(namespace, v1alpha1.HomePrefix)
	if !home {
		return nil, refusef("metadata.namespace: %s: want a tenant's home namespace, tenant-<tenant>", namespace)
	}
	var t v1alpha1.Tenant
	found, err := r.get(ctx, "", name, &t)
	if err != nil {
		return nil, err
	}
	if !found {
		return nil, refusef("metadata.namespace: %s: there is no tenant %q: h8s tenant create %s, or name another tenant's home namespace", namespace, name, name)
	}
	return &t, nil
}

// authorizer says who is an operator.
type authorizer struct{ client client.Client }

// operator says whether u may do what no tenant may: whoever may change Tenants.
func (a authorizer) operator(ctx context.Context, u authenticationv1.UserInfo) (bool, error) {
	if slices.Contains(u.Groups, "system:masters") || trustedUser(u) {
		return true, nil
	}
	review := &authorizationv1.SubjectAccessReview{Spec: authorizationv1.SubjectAccessReviewSpec{
		User: u.Username, Groups: u.Groups, UID: u.UID,
		ResourceAttributes: &authorizationv1.ResourceAttributes{
			Group: v1alpha1.GroupVersion.Group, Version: "*", Resource: "tenants", Verb: "update",
		},
	}}
	if len(u.Extra) > 0 {
		review.Spec.Extra = map[string]authorizationv1.ExtraValue{}
		for k, v := range u.Extra {
			review.Spec.Extra[k] = authorizationv1.ExtraValue(v)
		}
	}
	if err := a.client.Create(ctx, review); err != nil {
		return false, fmt.Errorf("ask whether %s is an operator: %w", u.Username, err)
	}
	return review.Status.Allowed, nil
}

// trustedUser is one of the cluster's own controllers.
func trustedUser(u authenticationv1.UserInfo) bool {
	return (u.Username == ControllerUser && slices.Contains(u.Groups, ControllerGroup)) ||
		u.Username == "system:kube-controller-manager" ||
		slices.Contains(u.Groups, "system:serviceaccounts:kube-system")
}

// refusal is a decision, unlike an error that keeps one from being made.
type refusal struct{ message string }

func (r refusal) Error() string { return r.message }

func refusef(format string, args ...any) error { return refusal{fmt.Sprintf(format, args...)} }
