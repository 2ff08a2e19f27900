package tenant

import (
	"context"
	"maps"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/equality"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"sigs.k8s.io/controller-runtime/pkg/client"

	v1alpha1 "github.com/hypernetes/hypernetes/api/hypernetes/v1alpha1"
)

// objectName of the ResourceQuota and the LimitRange in each namespace of a tenant.
const objectName = "h8s-tenant"

// homeQuota bounds the objects at a tenant's home.
func homeQuota(t *v1alpha1.Tenant) corev1.ResourceList {
	q := t.Spec.Quota
	out := corev1.ResourceList{corev1.ResourcePods: resource.MustParse("0")} // none belongs there
	for kind, n := range map[string]struct {
		set *int32
		def int64
	}{
		"tenantnamespaces": {q.Namespaces, v1alpha1.DefaultQuotaNamespaces},
		"networks":         {q.Networks, v1alpha1.DefaultQuotaNetworks},
		"ports":            {q.Ports, v1alpha1.DefaultQuotaPorts},
		"floatingips":      {q.FloatingIPs, v1alpha1.DefaultQuotaFloatingIPs},
	} {
		v := n.def
		if n.set != nil {
			v = int64(*n.set)
		}
		out[corev1.ResourceName("count/"+kind+"."+v1alpha1.GroupVersion.Group)] = *resource.NewQuantity(v, resource.DecimalSI)
	}
	return out
}

// spaceQuota bounds a namespace of a tenant. Node ports are the node's: none, unless the
// operator says otherwise.
func spaceQuota(t *v1alpha1.Tenant) corev1.ResourceList {
	out := corev1.ResourceList{corev1.ResourceServicesNodePorts: resource.MustParse("0")}
	maps.Copy(out, t.Spec.Quota.PerNamespace)
	return out
}

func (b base) quota(ctx context.Context, namespace string, hard corev1.ResourceList) error {
	want := &corev1.ResourceQuota{
		ObjectMeta: metav1.ObjectMeta{Namespace: namespace, Name: objectName},
		Spec:       corev1.ResourceQuotaSpec{Hard: hard},
	}
	have := &corev1.ResourceQuota{}
	err := b.client.Get(ctx, client.ObjectKeyFromObject(want), have)
	return b.apply(ctx, err, have, want, func() bool {
		same := equality.Semantic.DeepEqual(have.Spec, want.Spec)
		have.Spec = want.Spec
		return same
	})
}

// limits gives containers that state none their requests and limits.
func (b base) limits(ctx context.Context, namespace string, t *v1alpha1.Tenant) error {
	want := &corev1.LimitRange{
		ObjectMeta: metav1.ObjectMeta{Namespace: namespace, Name: objectName},
		Spec: corev1.LimitRangeSpec{Limits: []corev1.LimitRangeItem{{
			Type: corev1.LimitTypeContainer, Default: t.Spec.Quota.ContainerDefaults, DefaultRequest: t.Spec.Quota.ContainerRequests,
		}}},
	}
	have := &corev1.LimitRange{}
	err := b.client.Get(ctx, client.ObjectKeyFromObject(want), have)
	if len(t.Spec.Quota.ContainerDefaults)+len(t.Spec.Quota.ContainerRequests) == 0 {
		if err == nil {
			err = b.client.Delete(ctx, have)
		}
		return client.IgnoreNotFound(err)
	}
	if err == nil && len(have.Spec.Limits) == 1 {
		// The API server fills requests in from limits: what was asked for is compared only.
		i, w := have.Spec.Limits[0], want.Spec.Limits[0]
		if i.Type == w.Type && subset(w.Default, i.Default) && subset(w.DefaultRequest, i.DefaultRequest) &&
			len(i.Default) == len(w.Default) && len(i.Max)+len(i.Min)+len(i.MaxLimitRequestRatio) == 0 &&
			len(i.DefaultRequest) <= len(w.Default)+len(w.DefaultRequest) {
			return nil
		}
	}
	return b.apply(ctx, err, have, want, func() bool { have.Spec = want.Spec; return false })
}

func subset(small, big corev1.ResourceList) bool {
	for k, v := range small {
		if o, ok := big[k]; !ok || o.Cmp(v) != 0 {
			return false
		}
	}
	return true
}

// ignoreGone forgets an error about a namespace that is being deleted: nothing can be made
// in it any more.
func ignoreGone(err error) error {
	if apierrors.HasStatusCause(err, corev1.NamespaceTerminatingCause) {
		return nil
	}
	return err
}
