package admission

import (
	"context"
	"fmt"
	"net/netip"
	"slices"
	"strings"

	admissionv1 "k8s.io/api/admission/v1"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/equality"
	"sigs.k8s.io/controller-runtime/pkg/client"

	v1alpha1 "github.com/hypernetes/hypernetes/api/hypernetes/v1alpha1"
	"github.com/hypernetes/hypernetes/network/subnet"
)

// tenantNamespace decides on a binding. A Network that does not exist yet is no reason to
// refuse: the seeds create the two in any order, and the binding is Pending meanwhile.
func (r request) tenantNamespace(ctx context.Context, now, _ *v1alpha1.TenantNamespace) error {
	if r.Operation != admissionv1.Create {
		return nil
	}
	tenant, err := r.h.read.homeOf(ctx, now.Namespace)
	if err != nil {
		return err
	}
	var all v1alpha1.TenantNamespaceList
	if err := r.h.read.cached.List(ctx, &all); err != nil {
		return err
	}
	have := 0
	for _, other := range all.Items {
		if other.Namespace == now.Namespace {
			have++
			continue
		}
		if other.Name == now.Name {
			// Whose it is, is nobody's business.
			return refusef("metadata.name: %s: the name is taken: choose another, for example %s-%s", now.Name, tenant.Name, now.Name)
		}
	}
	return checkQuota("namespaces", "namespaces", have, tenant.Spec.Quota.Namespaces, v1alpha1.DefaultQuotaNamespaces, tenant)
}

// port decides on an address claimed beforehand. Ports of Pods are claimed by nodes, which
// do not ask here.
func (r request) port(ctx context.Context, now, _ *v1alpha1.Port) error {
	if r.Operation != admissionv1.Create {
		return nil
	}
	if now.Spec.Service != nil && !trustedUser(r.UserInfo) {
		return refusef("spec.service: %s/%s: only the cluster gives Services Ports: leave it out, and make a Service of type LoadBalancer", now.Spec.Service.Namespace, now.Spec.Service.Name)
	}
	tenant, err := r.h.read.homeOf(ctx, now.Namespace)
	if err != nil {
		return err
	}
	n, err := r.h.network(ctx, now.Namespace, now.Spec.Network)
	if err != nil {
		return err
	}
	if n == nil {
		return refusef("spec.network: %s: tenant %s has no Network of that name: create it first", now.Spec.Network, tenant.Name)
	}
	if uid := now.Spec.NetworkUID; uid != "" && uid != string(n.UID) {
		return refusef("spec.networkUID: %s: Network %s is %s: leave it out", uid, n.Name, n.UID)
	}
	if err := checkAddresses("spec.addresses", now.Spec.Addresses, n); err != nil {
		return err
	}
	var all v1alpha1.PortList
	if err := r.h.read.cached.List(ctx, &all, client.InNamespace(now.Namespace)); err != nil {
		return err
	}
	if len(now.Spec.Addresses) > 1 {
		for _, other := range all.Items {
			for _, a := range other.Spec.Addresses {
				if other.Spec.Network == n.Name && other.Name != now.Name && a == now.Spec.Addresses[1] {
					return refusef("spec.addresses[1]: %s: taken by port %s: choose another", a, other.Name)
				}
			}
		}
	}
	return checkQuota("ports", "Ports", len(all.Items), tenant.Spec.Quota.Ports, v1alpha1.DefaultQuotaPorts, tenant)
}

func (r request) floatingIP(ctx context.Context, now, old *v1alpha1.FloatingIP) error {
	if r.Operation == admissionv1.Delete || (old != nil && equality.Semantic.DeepEqual(old.Spec, now.Spec)) {
		return nil
	}
	tenant, err := r.h.read.homeOf(ctx, now.Namespace)
	if err != nil {
		return err
	}
	var pools v1alpha1.AddressPoolList
	if err := r.h.read.cached.List(ctx, &pools); err != nil {
		return err
	}
	if err := checkFloatingIP(now, tenant, pools.Items); err != nil {
		return err
	}
	if pod := now.Spec.Pod; pod != nil {
		var binding v1alpha1.TenantNamespace
		found, err := r.h.read.get(ctx, now.Namespace, pod.Namespace, &binding)
		if err != nil {
			return err
		}
		if !found {
			return refusef("spec.pod.namespace: %s: not a namespace of tenant %s: name one of its own", pod.Namespace, tenant.Name)
		}
	}
	if r.Operation != admissionv1.Create {
		return nil
	}
	var all v1alpha1.FloatingIPList
	if err := r.h.read.cached.List(ctx, &all, client.InNamespace(now.Namespace)); err != nil {
		return err
	}
	return checkQuota("floatingIPs", "FloatingIPs", len(all.Items), tenant.Spec.Quota.FloatingIPs, v1alpha1.DefaultQuotaFloatingIPs, tenant)
}

// checkFloatingIP says whether the tenant may have an address of the pool it names. Pools
// of others are as good as none.
func checkFloatingIP(f *v1alpha1.FloatingIP, tenant *v1alpha1.Tenant, pools []v1alpha1.AddressPool) error {
	var allowed []v1alpha1.AddressPool
	var names []string
	for _, p := range pools {
		if len(p.Spec.Tenants) == 0 || slices.Contains(p.Spec.Tenants, tenant.Name) {
			allowed = append(allowed, p)
			names = append(names, p.Name)
		}
	}
	offer := "there is none, ask the operator for an AddressPool"
	if len(names) > 0 {
		offer = "use " + strings.Join(names, ", ") + ", or leave it out"
	}
	if f.Spec.Pool != "" && !slices.Contains(names, f.Spec.Pool) {
		return refusef("spec.pool: %s: tenant %s has no such AddressPool: %s", f.Spec.Pool, tenant.Name, offer)
	}
	if f.Spec.Address == "" {
		return nil
	}
	a, err := netip.ParseAddr(f.Spec.Address)
	if err != nil {
		return refusef("spec.address: %q: want an IP address", f.Spec.Address)
	}
	var ranges []string
	for _, p := range allowed {
		if f.Spec.Pool != "" && p.Name != f.Spec.Pool {
			continue
		}
		for _, text := range p.Spec.Addresses {
			s, err := parseSpan(text)
			if err == nil && s.contains(a) {
				return nil
			}
			ranges = append(ranges, text)
		}
	}
	if len(ranges) == 0 {
		return refusef("spec.address: %s: no AddressPool has it: %s", a, offer)
	}
	return refusef("spec.address: %s: in no AddressPool of tenant %s: choose one of %s, or leave it out", a, tenant.Name, strings.Join(ranges, ", "))
}

// span is a range of addresses, both ends in it.
type span struct{ first, last netip.Addr }

func (s span) contains(a netip.Addr) bool {
	return s.first.BitLen() == a.BitLen() && s.first.Compare(a) <= 0 && a.Compare(s.last) <= 0
}

func (s span) overlaps(o span) bool {
	return s.first.BitLen() == o.first.BitLen() && s.first.Compare(o.last) <= 0 && o.first.Compare(s.last) <= 0
}

// parseSpan reads a CIDR, an address, or two with a dash between.
func parseSpan(text string) (span, error) {
	if p, err := netip.ParsePrefix(text); err == nil {
		return spanOf(p), nil
	}
	low, high, ranged := strings.Cut(text, "-")
	if !ranged {
		high = low
	}
	first, err := netip.ParseAddr(low)
	if err != nil {
		return span{}, fmt.Errorf("want a CIDR, an address, or a range like 192.0.2.10-192.0.2.20")
	}
	last, err := netip.ParseAddr(high)
	if err != nil || first.Zone() != "" || last.Zone() != "" || first.Is4In6() || last.Is4In6() {
		return span{}, fmt.Errorf("want a CIDR, an address, or a range like 192.0.2.10-192.0.2.20")
	}
	if first.BitLen() != last.BitLen() || last.Less(first) {
		return span{}, fmt.Errorf("the range ends before it begins")
	}
	return span{first, last}, nil
}

func spanOf(p netip.Prefix) span {
	p = p.Masked()
	b := p.Addr().AsSlice()
	for i := p.Bits(); i < len(b)*8; i++ {
		b[i/8] |= 1 << (7 - i%8)
	}
	last, _ := netip.AddrFromSlice(b)
	return span{p.Addr(), last}
}

func (r request) addressPool(ctx context.Context, now, old *v1alpha1.AddressPool) error {
	if r.Operation == admissionv1.Delete || (old != nil && equality.Semantic.DeepEqual(old.Spec.Addresses, now.Spec.Addresses)) {
		return nil
	}
	var pools v1alpha1.AddressPoolList
	if err := r.h.read.cached.List(ctx, &pools); err != nil {
		return err
	}
	var nodes corev1.NodeList
	if err := r.h.read.cached.List(ctx, &nodes); err != nil {
		return err
	}
	var addresses []netip.Addr
	for _, n := range nodes.Items {
		for _, a := range n.Status.Addresses {
			if ip, err := netip.ParseAddr(a.Address); err == nil {
				addresses = append(addresses, ip)
			}
		}
	}
	return checkPool(now, pools.Items, addresses, r.h.Options)
}

// checkPool refuses addresses that are somebody's already. A pool may be part of the nodes'
// own network, reserved though that is for tenants' Networks: that is how the fabric brings
// the addresses to the nodes.
func checkPool(pool *v1alpha1.AddressPool, pools []v1alpha1.AddressPool, nodes []netip.Addr, o Options) error {
	var own []span
	for i, text := range pool.Spec.Addresses {
		at := fmt.Sprintf("spec.addresses[%d]", i)
		s, err := parseSpan(text)
		if err != nil {
			return refusef("%s: %s: %v", at, text, err)
		}
		for j, other := range own {
			if s.overlaps(other) {
				return refusef("%s: %s: overlaps with spec.addresses[%d], %s: leave one out", at, text, j, pool.Spec.Addresses[j])
			}
		}
		own = append(own, s)
		for _, n := range nodes {
			if s.contains(n) {
				return refusef("%s: %s: %s is a node's address: choose a range without it", at, text, n)
			}
		}
		for _, p := range o.ServiceCIDRs {
			if s.overlaps(spanOf(p)) {
				return refusef("%s: %s: overlaps with %s, the cluster's Service range: choose another", at, text, p)
			}
		}
		for _, p := range o.ReservedCIDRs {
			if s.overlaps(spanOf(p)) && !containsAny(p, nodes) {
				return refusef("%s: %s: overlaps with %s, which is reserved: choose another", at, text, p)
			}
		}
		for _, p := range neverEndpoints {
			if s.overlaps(spanOf(netip.MustParsePrefix(p))) {
				return refusef("%s: %s: overlaps with %s, which is no address of a host: choose another", at, text, p)
			}
		}
		for _, other := range pools {
			if other.Name == pool.Name {
				continue
			}
			for _, theirs := range other.Spec.Addresses {
				if o, err := parseSpan(theirs); err == nil && s.overlaps(o) {
					return refusef("%s: %s: overlaps with %s of AddressPool %s: choose another", at, text, theirs, other.Name)
				}
			}
		}
	}
	return nil
}

// tenant decides on the operator's own object: what its default Network would be refused
// for is said here, where it is written.
func (r request) tenant(ctx context.Context, now, old *v1alpha1.Tenant) error {
	if r.Operation == admissionv1.Delete {
		return nil
	}
	if k := now.Spec.Keystone; k != nil && (old == nil || !equality.Semantic.DeepEqual(old.Spec.Keystone, k)) {
		var all v1alpha1.TenantList
		if err := r.h.read.cached.List(ctx, &all); err != nil {
			return err
		}
		if err := checkProject(now, all.Items); err != nil {
			return err
		}
	}
	if now.Spec.DefaultNetwork == nil || len(now.Spec.DefaultNetwork.Subnets) == 0 {
		return nil
	}
	if old != nil && equality.Semantic.DeepEqual(old.Spec.DefaultNetwork, now.Spec.DefaultNetwork) {
		return nil
	}
	var all []string
	for _, e := range subnet.ValidateNetwork(*now.Spec.DefaultNetwork, r.h.limits()) {
		all = append(all, strings.Replace(e.Error(), "spec.", "spec.defaultNetwork.", 1))
	}
	if len(all) > 0 {
		return refusal{strings.Join(all, "; ")}
	}
	return nil
}

// checkProject refuses a Keystone project that is another tenant's.
func checkProject(t *v1alpha1.Tenant, all []v1alpha1.Tenant) error {
	id := t.Spec.Keystone.ProjectID
	for _, other := range all {
		if other.Name != t.Name && other.Spec.Keystone != nil && other.Spec.Keystone.ProjectID == id {
			return refusef("spec.keystone.projectID: %s: tenant %s has this project: a project is one tenant's: name another, or take it from %s first", id, other.Name, other.Name)
		}
	}
	return nil
}

func containsAny(p netip.Prefix, addresses []netip.Addr) bool {
	for _, a := range addresses {
		if p.Contains(a) {
			return true
		}
	}
	return false
}
