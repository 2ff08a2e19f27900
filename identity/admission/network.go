package admission

import (
	"context"
	"fmt"
	"slices"
	"strings"

	admissionv1 "k8s.io/api/admission/v1"
	"k8s.io/apimachinery/pkg/api/equality"
	"sigs.k8s.io/controller-runtime/pkg/client"

	v1alpha1 "github.com/hypernetes/hypernetes/api/hypernetes/v1alpha1"
	"github.com/hypernetes/hypernetes/network/subnet"
)

// subnets of a Network as accepted, or as they will be.
func subnets(n *v1alpha1.Network) []v1alpha1.SubnetStatus {
	have := subnet.Normalise(n.Spec, n.Status.Subnets)
	if len(have) == 0 {
		return n.Status.Subnets
	}
	return have
}

func (r request) network(ctx context.Context, now, old *v1alpha1.Network) error {
	if r.Operation == admissionv1.Delete {
		return r.deleteNetwork(ctx, old)
	}
	tenant, err := r.h.read.homeOf(ctx, now.Namespace)
	if err != nil {
		return err
	}
	// What is stored may have been accepted under other limits and must stay editable.
	if old != nil && equality.Semantic.DeepEqual(old.Spec, now.Spec) {
		return nil
	}
	if err := checkNetwork(now, tenant, r.h.Options); err != nil {
		return err
	}
	if now.Spec.HostAccess == v1alpha1.HostRouted {
		if err := r.routed(ctx, now, old); err != nil {
			return err
		}
	}
	if r.Operation != admissionv1.Create {
		return nil
	}
	have, err := r.h.networks(ctx, now.Namespace)
	if err != nil {
		return err
	}
	return checkQuota("networks", "Networks", len(have), tenant.Spec.Quota.Networks, v1alpha1.DefaultQuotaNetworks, tenant)
}

// checkNetwork is what can be said of a Network without looking at others.
func checkNetwork(n *v1alpha1.Network, tenant *v1alpha1.Tenant, o Options) error {
	if id := n.Spec.TenantID; id != "" && id != tenant.Name && (tenant.Spec.Keystone == nil || id != tenant.Spec.Keystone.ProjectID) {
		return refusef("spec.tenantID: %s: namespace %s belongs to tenant %s: put its name there, or leave it out, or use the home namespace of the tenant that is meant", id, n.Namespace, tenant.Name)
	}
	if p := n.Spec.Provider; p != "" && !slices.Contains(o.providers(), p) {
		return refusef("spec.provider: %s: this cluster has %s: use one of these, or leave it out", p, strings.Join(o.providers(), ", "))
	}
	if errs := subnet.ValidateNetwork(n.Spec, o.limits()); len(errs) > 0 {
		var all []string
		for _, e := range errs {
			all = append(all, e.Error())
		}
		return refusal{strings.Join(all, "; ")}
	}
	return nil
}

// routed decides on HostAccess Routed, which makes addresses of a tenant mean something on
// every node.
func (r request) routed(ctx context.Context, now, old *v1alpha1.Network) error {
	operator, err := authorizer{r.h.write}.operator(ctx, r.UserInfo)
	if err != nil {
		return err
	}
	same := old != nil && old.Spec.HostAccess == v1alpha1.HostRouted && equality.Semantic.DeepEqual(old.Spec.Subnets, now.Spec.Subnets)
	if !operator && !same {
		return refusef("spec.hostAccess: Routed: gives the nodes a way to your addresses, which the operator grants: use Isolated, or ask the operator to make this change")
	}
	var all v1alpha1.NetworkList
	if err := r.h.read.cached.List(ctx, &all); err != nil {
		return err
	}
	for _, other := range all.Items {
		if other.Spec.HostAccess != v1alpha1.HostRouted || (other.Namespace == now.Namespace && other.Name == now.Name) {
			continue
		}
		if mine, theirs, overlap := subnet.Overlap(subnets(now), subnets(&other)); overlap {
			// Whose it is stays unsaid to who cannot see it.
			whose := "of another routed Network"
			if operator {
				whose = fmt.Sprintf("of Network %s/%s", other.Namespace, other.Name)
			}
			return refusef("spec.subnets: %s: overlaps with %s %s: Networks with hostAccess Routed need ranges of their own: choose another", mine, theirs, whose)
		}
	}
	return nil
}

// maxUsers are named in a refusal.
const maxUsers = 10

func (r request) deleteNetwork(ctx context.Context, n *v1alpha1.Network) error {
	if trustedUser(r.UserInfo) {
		// Deletion of the tenant, in the order its controller knows.
		return nil
	}
	home := n.Namespace
	var namespaces v1alpha1.TenantNamespaceList
	if err := r.h.read.cached.List(ctx, &namespaces, client.InNamespace(home)); err != nil {
		return err
	}
	var ports v1alpha1.PortList
	if err := r.h.read.cached.List(ctx, &ports, client.InNamespace(home)); err != nil {
		return err
	}
	return checkUnused(n.Name, namespaces.Items, ports.Items)
}

// checkUnused refuses the deletion of a Network with the list of who is in it.
func checkUnused(network string, namespaces []v1alpha1.TenantNamespace, ports []v1alpha1.Port) error {
	var users []string
	for _, ns := range namespaces {
		if ns.Spec.Network == network {
			users = append(users, "namespace "+ns.Name)
		}
	}
	slices.Sort(users)
	bound := len(users)
	for _, p := range ports {
		switch {
		case p.Spec.Network != network:
		case p.Spec.Pod != nil:
			users = append(users, fmt.Sprintf("Pod %s/%s (port %s)", p.Spec.Pod.Namespace, p.Spec.Pod.Name, p.Name))
		case p.Spec.Service != nil:
			users = append(users, fmt.Sprintf("Service %s/%s (port %s)", p.Spec.Service.Namespace, p.Spec.Service.Name, p.Name))
		default:
			users = append(users, "port "+p.Name)
		}
	}
	if len(users) == 0 {
		return nil
	}
	slices.Sort(users[bound:])
	if more := len(users) - maxUsers; more > 0 {
		users = append(users[:maxUsers], fmt.Sprintf("and %d more", more))
	}
	return refusef("network %s is in use by %s: delete these first", network, strings.Join(users, ", "))
}

// checkQuota refuses one more than the tenant may have.
func checkQuota(field, what string, have int, limit *int32, otherwise int32, tenant *v1alpha1.Tenant) error {
	most := otherwise
	if limit != nil {
		most = *limit
	}
	if have < int(most) {
		return nil
	}
	return refusef("quota of tenant %s: %d of %d %s used: delete one, or ask the operator to raise spec.quota.%s of the Tenant", tenant.Name, have, most, what, field)
}
