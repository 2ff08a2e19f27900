package kubestack

import (
	"context"
	"net/netip"
	"reflect"
	"slices"
	"sync"
	"time"

	admissionv1 "k8s.io/api/admissionregistration/v1"
	coordinationv1 "k8s.io/api/coordination/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/fields"
	"k8s.io/apimachinery/pkg/labels"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/types"
	"sigs.k8s.io/controller-runtime/pkg/client"

	v1alpha1 "github.com/hypernetes/hypernetes/api/hypernetes/v1alpha1"
	"github.com/hypernetes/hypernetes/network/announcer"
	"github.com/hypernetes/hypernetes/network/claim"
)

// cluster is what is known of the whole cluster.
type cluster struct {
	group      *group
	bindings   *source[*v1alpha1.TenantNamespace]
	networks   *source[*v1alpha1.Network]
	floating   *source[*v1alpha1.FloatingIP]
	nodes      *source[*corev1.Node]
	namespaces *source[*metav1.PartialObjectMetadata]
	leases     *source[*coordinationv1.Lease]
	// fronts are Ports that Services have.
	fronts     *source[*v1alpha1.Port]
	kubernetes *source[*corev1.Service]
	mutating   *source[*admissionv1.MutatingWebhookConfiguration]
	validating *source[*admissionv1.ValidatingWebhookConfiguration]
	apis       *source[*unstructured.Unstructured]

	mu sync.Mutex
	// unready is since when nodes say that they are not ready, of those seen ready before.
	unready map[string]time.Time
}

// watchCluster begins. one is told of a Network something changed for, all that something
// did which concerns any.
func watchCluster(ctx context.Context, c client.WithWatch, one func(types.NamespacedName), all func()) *cluster {
	g := newGroup(ctx)
	k := &cluster{group: g, unready: map[string]time.Time{}}
	k.bindings = watchAll(g, c, &v1alpha1.TenantNamespace{}, &v1alpha1.TenantNamespaceList{}, func(was, is *v1alpha1.TenantNamespace) {
		if was != nil && is != nil && was.Spec.Network == is.Spec.Network && isBound(was) == isBound(is) && was.Status.NetworkUID == is.Status.NetworkUID {
			return
		}
		for _, b := range []*v1alpha1.TenantNamespace{was, is} {
			if b != nil {
				one(types.NamespacedName{Namespace: b.Namespace, Name: b.Spec.Network})
			}
		}
		all()
	})
	k.networks = watchAll(g, c, &v1alpha1.Network{}, &v1alpha1.NetworkList{}, func(was, is *v1alpha1.Network) {
		if was != nil && is != nil && sameNetwork(was, is) {
			return
		}
		if is == nil {
			is = was
		}
		one(client.ObjectKeyFromObject(is))
	})
	k.floating = watchAll(g, c, &v1alpha1.FloatingIP{}, &v1alpha1.FloatingIPList{}, func(was, is *v1alpha1.FloatingIP) {
		if was != nil && is != nil && was.Status.Network == is.Status.Network && was.Status.Target == is.Status.Target &&
			was.Status.Address == is.Status.Address && was.DeletionTimestamp.IsZero() == is.DeletionTimestamp.IsZero() {
			return
		}
		for _, f := range []*v1alpha1.FloatingIP{was, is} {
			if f != nil && f.Status.Network != "" {
				one(types.NamespacedName{Namespace: f.Namespace, Name: f.Status.Network})
			}
		}
	})
	k.nodes = watchAll(g, c, &corev1.Node{}, &corev1.NodeList{}, func(was, is *corev1.Node) {
		k.remember(was, is)
		// The kubelet writes its Node all the time; little of that matters here.
		if was == nil || is == nil || !reflect.DeepEqual(readNode(was, netip.Addr{}), readNode(is, netip.Addr{})) {
			all()
		}
	})
	meta := &metav1.PartialObjectMetadata{}
	meta.SetGroupVersionKind(corev1.SchemeGroupVersion.WithKind("Namespace"))
	metaList := &metav1.PartialObjectMetadataList{}
	metaList.SetGroupVersionKind(corev1.SchemeGroupVersion.WithKind("NamespaceList"))
	k.namespaces = watchAll(g, c, meta, metaList, func(was, is *metav1.PartialObjectMetadata) {
		if was == nil || is == nil || !reflect.DeepEqual(was.Labels, is.Labels) {
			all()
		}
	})
	k.leases = watchAll(g, c, &coordinationv1.Lease{}, &coordinationv1.LeaseList{}, func(was, is *coordinationv1.Lease) {
		if was != nil && is != nil && reflect.DeepEqual(was.Spec.HolderIdentity, is.Spec.HolderIdentity) && reflect.DeepEqual(was.Labels, is.Labels) && reflect.DeepEqual(was.Annotations, is.Annotations) {
			return
		}
		all()
	},
		client.InNamespace(v1alpha1.ClaimNamespace), client.MatchingLabels{claim.LabelKind: claim.Address})
	k.fronts = watchAll(g, c, &v1alpha1.Port{}, &v1alpha1.PortList{}, func(was, is *v1alpha1.Port) {
		if was != nil && is != nil && reflect.DeepEqual(was.Spec, is.Spec) && reflect.DeepEqual(was.Status, is.Status) && was.DeletionTimestamp.IsZero() == is.DeletionTimestamp.IsZero() {
			return
		}
		for _, p := range []*v1alpha1.Port{was, is} {
			if p != nil {
				one(types.NamespacedName{Namespace: p.Namespace, Name: p.Spec.Network})
			}
		}
	}, client.HasLabels{v1alpha1.LabelService})
	k.kubernetes = watchAll(g, c, &corev1.Service{}, &corev1.ServiceList{}, func(was, is *corev1.Service) { all() },
		client.InNamespace(corev1.NamespaceDefault), client.MatchingFieldsSelector{Selector: fields.OneTermEqualSelector(metav1.ObjectNameField, "kubernetes")})
	k.mutating = watchAll(g, c, &admissionv1.MutatingWebhookConfiguration{}, &admissionv1.MutatingWebhookConfigurationList{}, func(was, is *admissionv1.MutatingWebhookConfiguration) { all() })
	k.validating = watchAll(g, c, &admissionv1.ValidatingWebhookConfiguration{}, &admissionv1.ValidatingWebhookConfigurationList{}, func(was, is *admissionv1.ValidatingWebhookConfiguration) { all() })
	gvk := schema.GroupVersionKind{Group: "apiregistration.k8s.io", Version: "v1", Kind: "APIService"}
	api, apis := &unstructured.Unstructured{}, &unstructured.UnstructuredList{}
	api.SetGroupVersionKind(gvk)
	apis.SetGroupVersionKind(gvk.GroupVersion().WithKind("APIServiceList"))
	k.apis = watchAll(g, c, api, apis, func(was, is *unstructured.Unstructured) { all() },
		client.MatchingLabelsSelector{Selector: labels.NewSelector().Add(notAutomanaged()...)})
	return k
}

// sameNetwork tells whether two versions of a Network are one for a node: how many Ports it
// has changes with every Pod.
func sameNetwork(a, b *v1alpha1.Network) bool {
	x, y := a.Status, b.Status
	x.Ports, y.Ports, x.FreeAddresses, y.FreeAddresses = 0, 0, 0, 0
	return a.UID == b.UID && a.DeletionTimestamp.IsZero() == b.DeletionTimestamp.IsZero() && reflect.DeepEqual(a.Spec, b.Spec) && reflect.DeepEqual(x, y)
}

// notAutomanaged leaves out the API server's own APIServices, which are most.
func notAutomanaged() []labels.Requirement {
	r, err := labels.NewRequirement("kube-aggregator.kubernetes.io/automanaged", "!", nil)
	if err != nil {
		panic(err) // a constant
	}
	return []labels.Requirement{*r}
}

// bound is a namespace's Network: the TenantNamespace that says so and has been bound.
func (k *cluster) bound(namespace string) (types.NamespacedName, types.UID, bool) {
	for _, b := range k.bindings.list() {
		if b.Name == namespace && isBound(b) {
			return types.NamespacedName{Namespace: b.Namespace, Name: b.Spec.Network}, types.UID(b.Status.NetworkUID), true
		}
	}
	return types.NamespacedName{}, "", false
}

// isBound also of one that is going: its Pods live until they are gone.
func isBound(b *v1alpha1.TenantNamespace) bool {
	return b.Status.Phase == v1alpha1.NamespaceBound || b.Status.Phase == v1alpha1.NamespaceTerminating && b.Status.NamespaceUID != ""
}

// namespacesOf are those bound to a Network, with their labels.
func (k *cluster) namespacesOf(network types.NamespacedName) map[string]map[string]string {
	out := map[string]map[string]string{}
	for _, b := range k.bindings.list() {
		if b.Namespace == network.Namespace && b.Spec.Network == network.Name && isBound(b) {
			set := map[string]string{corev1.LabelMetadataName: b.Name}
			if ns, ok := k.namespaces.get(b.Name); ok {
				set = ns.Labels
			}
			out[b.Name] = set
		}
	}
	return out
}

// allNodes are all nodes, by name. own says of which family their addresses are.
func (k *cluster) allNodes(own netip.Addr) map[string]node {
	out := map[string]node{}
	k.mu.Lock()
	defer k.mu.Unlock()
	for _, o := range k.nodes.list() {
		n := readNode(o, own)
		n.Ready = k.ready(n)
		out[n.Name] = n
	}
	return out
}

// ready tells whether a node may announce; k.mu is held.
func (k *cluster) ready(n node) bool {
	since, ok := k.unready[n.Name]
	return n.Ready || ok && time.Since(since) < announcer.Grace
}

// remember notes a node that was ready and says that it no longer is.
func (k *cluster) remember(was, is *corev1.Node) {
	k.mu.Lock()
	defer k.mu.Unlock()
	switch {
	case is == nil:
		delete(k.unready, was.Name)
	case announcer.Readiness(is).Status != corev1.ConditionFalse:
		delete(k.unready, is.Name)
	case was != nil && announcer.Readiness(was).Status == corev1.ConditionTrue:
		k.unready[is.Name] = time.Now()
	}
}

func readNode(n *corev1.Node, own netip.Addr) node {
	out := node{Name: n.Name, Zone: n.Labels[corev1.LabelTopologyZone], ExcludedFromLB: announcer.Excluded(n)}
	_, out.ControlPlane = n.Labels["node-role.kubernetes.io/control-plane"]
	for _, a := range n.Status.Addresses {
		ip, err := netip.ParseAddr(a.Address)
		if err != nil || a.Type == corev1.NodeHostName {
			continue
		}
		out.Addresses = append(out.Addresses, ip)
		if a.Type == corev1.NodeInternalIP && !out.Address.IsValid() && (!own.IsValid() || ip.BitLen() == own.BitLen()) {
			out.Address = ip
		}
	}
	cidrs := n.Spec.PodCIDRs
	if len(cidrs) == 0 && n.Spec.PodCIDR != "" {
		cidrs = []string{n.Spec.PodCIDR}
	}
	for _, s := range cidrs {
		if p, err := netip.ParsePrefix(s); err == nil {
			out.PodCIDRs = append(out.PodCIDRs, p)
		}
	}
	out.Ready = announcer.Readiness(n).Status == corev1.ConditionTrue
	return out
}

// vips are the external addresses of Services, by the Service's namespace/name.
func (k *cluster) vips() map[string][]vip {
	out := map[string][]vip{}
	for _, l := range k.leases.list() {
		if c, ok := claim.Of(l); ok && c.Address.IsValid() && c.Owner.Kind == "Service" {
			key := c.Owner.Namespace + "/" + c.Owner.Name
			out[key] = append(out[key], vip{Address: c.Address, UID: c.Owner.UID})
		}
	}
	return out
}

// frontsOf are the Ports that Services have in a Network; of all Networks if it is nil.
func (k *cluster) frontsOf(network *types.NamespacedName) []*v1alpha1.Port {
	return slices.DeleteFunc(k.fronts.list(), func(p *v1alpha1.Port) bool {
		return p.Spec.Service == nil || p.Spec.Pod != nil || p.Spec.Node == "" || !p.DeletionTimestamp.IsZero() ||
			network != nil && (p.Namespace != network.Namespace || p.Spec.Network != network.Name)
	})
}

// floatingOf are the floating IPs that lead into a Network: what the FloatingIP says must
// be what the claim says.
func (k *cluster) floatingOf(network types.NamespacedName) []floating {
	var out []floating
	for _, f := range k.floating.list() {
		if f.Namespace != network.Namespace || f.Status.Network != network.Name || f.Status.Target == "" || f.DeletionTimestamp != nil {
			continue
		}
		a, err := netip.ParseAddr(f.Status.Address)
		if err != nil {
			continue
		}
		target, err := netip.ParseAddr(f.Status.Target)
		if err != nil || target.BitLen() != a.BitLen() {
			continue
		}
		l, ok := k.leases.get(v1alpha1.ClaimNamespace + "/" + claim.AddressName(a))
		if !ok {
			continue
		}
		if c, ok := claim.Of(l); ok && c.Owner == claim.OwnerOf("FloatingIP", f) {
			out = append(out, floating{Address: a, Target: target})
		}
	}
	slices.SortFunc(out, func(a, b floating) int { return a.Address.Compare(b.Address) })
	return out
}

// exported are the Services the API server calls, by namespace/name.
func (k *cluster) exported() map[string]bool {
	out := map[string]bool{}
	add := func(c admissionv1.WebhookClientConfig) {
		if c.Service != nil {
			out[c.Service.Namespace+"/"+c.Service.Name] = true
		}
	}
	for _, m := range k.mutating.list() {
		for _, w := range m.Webhooks {
			add(w.ClientConfig)
		}
	}
	for _, v := range k.validating.list() {
		for _, w := range v.Webhooks {
			add(w.ClientConfig)
		}
	}
	for _, a := range k.apis.list() {
		namespace, _, _ := unstructured.NestedString(a.Object, "spec", "service", "namespace")
		name, ok, _ := unstructured.NestedString(a.Object, "spec", "service", "name")
		if ok {
			out[namespace+"/"+name] = true
		}
	}
	return out
}
