package admission

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"regexp"
	"slices"
	"strings"

	"github.com/containerd/errdefs"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/util/validation"

	v1alpha1 "github.com/hypernetes/hypernetes/api/hypernetes/v1alpha1"
	"github.com/hypernetes/hypernetes/network/probe"
)

// maxNICs of a Pod, the first among them.
const maxNICs = 8

// maxRequest bounds the annotations that ask for NICs and addresses.
const maxRequest = 4 << 10

// hyper says whether a RuntimeClass puts a virtual machine around the Pod, in whose runtime
// probes can be carried out from the Pod's edge.
func hyper(class string) bool { return strings.HasPrefix(class, "hyper") }

// shapePod makes a tenant's Pod what it has to be: a RuntimeClass of the tenant's, and no
// probe that a node would dial.
func shapePod(pod *corev1.Pod, tenant *v1alpha1.Tenant, rewrite func(*corev1.Pod) error) error {
	class := ""
	if pod.Spec.RuntimeClassName != nil {
		class = *pod.Spec.RuntimeClassName
	}
	allowed := tenant.Spec.RuntimeClasses
	if len(allowed) == 0 {
		return refusef("spec.runtimeClassName: tenant %s may use none: ask the operator to fill spec.runtimeClasses of the Tenant", tenant.Name)
	}
	if class == "" {
		class = allowed[0]
		pod.Spec.RuntimeClassName = &class
	}
	if !slices.Contains(allowed, class) {
		return refusef("spec.runtimeClassName: %s: tenant %s may use %s: use one of these, or leave it out", class, tenant.Name, strings.Join(allowed, ", "))
	}
	if !hyper(class) {
		if at := probe.Network(pod); len(at) > 0 {
			return refusef("%s: a Pod of RuntimeClass %s is probed by the node, which has no way into its Network: use an exec probe", strings.Join(at, ", "), class)
		}
		return nil
	}
	if err := rewrite(pod); err != nil {
		if errdefs.IsInvalidArgument(err) {
			return refusal{err.Error()}
		}
		return err
	}
	return nil
}

var annotations = struct{ networks, address string }{
	"metadata.annotations[" + v1alpha1.AnnotationNetworks + "]", "metadata.annotations[" + v1alpha1.AnnotationAddress + "]",
}

var interfaceName = regexp.MustCompile(`^[a-z][a-z0-9_.-]{0,14}$`)

// parseNetworks reads AnnotationNetworks, untrusted.
func parseNetworks(text string) ([]v1alpha1.NetworkRequest, error) {
	at := annotations.networks
	if len(text) > maxRequest {
		return nil, refusef("%s: %d bytes: want at most %d", at, len(text), maxRequest)
	}
	var requests []v1alpha1.NetworkRequest
	d := json.NewDecoder(bytes.NewReader([]byte(text)))
	d.DisallowUnknownFields()
	err := d.Decode(&requests)
	if err == nil {
		if _, more := d.Token(); !errors.Is(more, io.EOF) {
			err = errors.New("text after the list")
		}
	}
	if err != nil {
		return nil, refusef(`%s: %v: want a JSON list like [{"name": "net2", "addresses": ["10.1.0.5"]}]`, at, err)
	}
	if len(requests) > maxNICs-1 {
		return nil, refusef("%s: %d Networks: a Pod has at most %d NICs, the first of which is its namespace's", at, len(requests), maxNICs)
	}
	taken := map[string]bool{"lo": true, "eth0": true}
	for i := range requests {
		r := &requests[i]
		if r.Interface == "" {
			r.Interface = fmt.Sprintf("net%d", i+1)
		}
		if !interfaceName.MatchString(r.Interface) {
			return nil, refusef("%s[%d].interface: %q: want at most 15 of a-z, 0-9, _, . and -, a letter first", at, i, r.Interface)
		}
		if taken[r.Interface] {
			return nil, refusef("%s[%d].interface: %s: there is one of that name: choose another", at, i, r.Interface)
		}
		taken[r.Interface] = true
		if len(validation.IsDNS1123Label(r.Name)) > 0 {
			return nil, refusef("%s[%d].name: %q: name a Network of your tenant", at, i, r.Name)
		}
	}
	return requests, nil
}

// checkPod validates what a Pod asks of Networks.
func (h *decider) checkPod(ctx context.Context, namespace string, pod *corev1.Pod) error {
	more, hasMore := pod.Annotations[v1alpha1.AnnotationNetworks]
	address, hasAddress := pod.Annotations[v1alpha1.AnnotationAddress]
	if !hasMore && !hasAddress {
		return nil
	}
	tenant, err := h.read.tenantOf(ctx, namespace)
	if err != nil {
		return err
	}
	if tenant == nil {
		return refusef("metadata.namespace: %s: belongs to no tenant: leave the annotations hypernetes.io/* out", namespace)
	}
	home := v1alpha1.Home(tenant.Name)
	if hasMore {
		requests, err := parseNetworks(more)
		if err != nil {
			return err
		}
		for i, r := range requests {
			at := fmt.Sprintf("%s[%d]", annotations.networks, i)
			n, err := h.network(ctx, home, r.Name)
			if err != nil {
				return err
			}
			if n == nil {
				return refusef("%s.name: %s: tenant %s has no Network of that name: h8s network list shows those it has", at, r.Name, tenant.Name)
			}
			if err := checkAddresses(at+".addresses", r.Addresses, n); err != nil {
				return err
			}
		}
	}
	if !hasAddress {
		return nil
	}
	var binding v1alpha1.TenantNamespace
	found, err := h.read.get(ctx, home, namespace, &binding)
	if err != nil {
		return err
	}
	if !found {
		return refusef("%s: namespace %s is in no Network: create a TenantNamespace of that name in %s", annotations.address, namespace, home)
	}
	if name, isPort := strings.CutPrefix(address, "port/"); isPort {
		if len(validation.IsDNS1123Subdomain(name)) > 0 {
			return refusef("%s: %q: want port/<name of a Port>, or an address", annotations.address, address)
		}
		var port v1alpha1.Port
		found, err := h.read.get(ctx, home, name, &port)
		if err != nil {
			return err
		}
		if !found {
			return refusef("%s: %s: tenant %s has no Port of that name: create it, or give an address", annotations.address, address, tenant.Name)
		}
		if port.Spec.Network != binding.Spec.Network {
			return refusef("%s: %s: is in Network %s, but the namespace is in %s: name a Port of that Network", annotations.address, address, port.Spec.Network, binding.Spec.Network)
		}
		return nil
	}
	if len(address) > maxRequest {
		return refusef("%s: %d bytes: want at most %d", annotations.address, len(address), maxRequest)
	}
	n, err := h.network(ctx, home, binding.Spec.Network)
	if err != nil {
		return err
	}
	if n == nil {
		return refusef("%s: %s: Network %s of the namespace does not exist: create it first", annotations.address, address, binding.Spec.Network)
	}
	var list []string
	for a := range strings.SplitSeq(address, ",") {
		list = append(list, strings.TrimSpace(a))
	}
	return checkAddresses(annotations.address, list, n)
}

func (h *decider) network(ctx context.Context, home, name string) (*v1alpha1.Network, error) {
	var n v1alpha1.Network
	found, err := h.read.get(ctx, home, name, &n)
	if err != nil || !found {
		return nil, err
	}
	return &n, nil
}

// checkAddresses says whether a Pod may have addresses in n: inside a subnet, at most one
// of each family, and not the gateway's nor the network's own.
func checkAddresses(at string, addresses []string, n *v1alpha1.Network) error {
	if len(addresses) > 2 {
		return refusef("%s: %d addresses: want at most one of each family", at, len(addresses))
	}
	families := map[bool]bool{}
	for _, text := range addresses {
		a, err := netip.ParseAddr(text)
		if err != nil || a.Zone() != "" || a.Is4In6() {
			return refusef("%s: %q: want an IP address", at, text)
		}
		if families[a.Is4()] {
			return refusef("%s: %s: want at most one address of each family", at, text)
		}
		families[a.Is4()] = true
		if err := usable(at, a, n); err != nil {
			return err
		}
	}
	return nil
}

func usable(at string, a netip.Addr, n *v1alpha1.Network) error {
	var inside []string
	for _, s := range subnets(n) {
		p, err := netip.ParsePrefix(s.CIDR)
		if err != nil {
			continue
		}
		if !p.Contains(a) {
			inside = append(inside, s.CIDR)
			continue
		}
		switch {
		case a.String() == s.Gateway:
			return refusef("%s: %s: is the gateway of Network %s: choose another of %s", at, a, n.Name, s.CIDR)
		case a == p.Masked().Addr():
			return refusef("%s: %s: is the network's own address: choose another of %s", at, a, s.CIDR)
		case a.Is4() && !p.Contains(a.Next()):
			return refusef("%s: %s: is the broadcast address: choose another of %s", at, a, s.CIDR)
		}
		return nil
	}
	return refusef("%s: %s: outside Network %s: choose one of %s", at, a, n.Name, strings.Join(inside, ", "))
}

// controllerOf is the owner that controls an object.
func controllerOf(o metav1.Object, kind string) string {
	if r := metav1.GetControllerOf(o); r != nil && r.Kind == kind {
		return r.Name
	}
	return ""
}
