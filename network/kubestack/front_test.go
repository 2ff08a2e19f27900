package kubestack

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/util/intstr"
	"k8s.io/utils/ptr"
	"sigs.k8s.io/controller-runtime/pkg/client"

	v1alpha1 "github.com/hypernetes/hypernetes/api/hypernetes/v1alpha1"
	"github.com/hypernetes/hypernetes/network/edge/edgetest"
	"github.com/hypernetes/hypernetes/network/netns"
)

// briefly asks once: what is lost on the way while things change is soon asked again.
func briefly(t *testing.T, from *netns.NS, proto, address string) (string, error) {
	ctx, cancel := context.WithTimeout(t.Context(), time.Second)
	defer cancel()
	c, err := from.DialContext(ctx, proto, address)
	if err != nil {
		return "", err
	}
	defer func() { _ = c.Close() }()
	if err := c.SetDeadline(time.Now().Add(time.Second)); err != nil {
		return "", err
	}
	if _, err := c.Write([]byte("?\n")); err != nil {
		return "", err
	}
	b := make([]byte, 256)
	n, err := c.Read(b)
	return strings.TrimSpace(string(b[:n])), err
}

// asks waits for an answer, as somebody remembers for a moment what was there before.
func asks(t *testing.T, from *netns.NS, proto, address, want string) {
	t.Helper()
	eventually(t, proto+" "+address, func() error {
		got, err := briefly(t, from, proto, address)
		if err == nil && got != want {
			err = fmt.Errorf("answer %q, want %q", got, want)
		}
		return err
	})
}

// A Service's Port in a Network that Neutron carries: clients from outside come by a
// floating IP, to a node with Pods or without. The controller's part is the test's.
func TestFronts(t *testing.T) {
	plugs := &recorder{}
	w := newWorld(t, 2, func(p *Parts) { p.Patience, p.Wirer = Patience{Made: 4 * time.Second, Wired: 4 * time.Second}, plugs })
	done := make(chan struct{})
	var wg sync.WaitGroup
	t.Cleanup(func() { close(done); wg.Wait() })
	c := newCloud(w, done, &wg)
	red := c.neutron("red", 1)
	one, two := w.nodes[w.rig.Nodes[0].Name], w.nodes[w.rig.Nodes[1].Name]
	outside, router := w.rig.Outside, c.carriers[red.Namespace].Router
	const floating = "100.64.0.190"
	edgetest.Command(w.rig, router, "sh", "-c", "ip addr add "+floating+"/32 dev eth1; nft 'add chain inet nat pre { type nat hook prerouting priority -100; }; add rule inet nat pre ip daddr "+floating+" dnat ip to 192.168.0.50; "+
		// As Neutron's routers do it for who is inside.
		"add rule inet nat post iifname eth0 oifname eth0 ct status dnat masquerade'")
	six := w.pod(1, "red-web", "six", map[string]string{v1alpha1.AnnotationAddress: "192.168.0.6"})
	svc := w.service("red-web", "s", six)
	svc.Spec.Type, svc.Spec.AllocateLoadBalancerNodePorts = corev1.ServiceTypeLoadBalancer, ptr.To(false)
	svc.Spec.Ports = append(svc.Spec.Ports, corev1.ServicePort{Name: "u", Port: 53, Protocol: corev1.ProtocolUDP, TargetPort: intstr.FromInt32(80)})
	slice := &discoveryv1.EndpointSlice{}
	for _, err := range []error{w.api.Update(t.Context(), svc), w.api.Get(t.Context(), client.ObjectKeyFromObject(svc), slice)} {
		if err != nil {
			t.Fatal(err)
		}
	}
	slice.Ports = append(slice.Ports, discoveryv1.EndpointPort{Name: ptr.To("u"), Port: ptr.To(int32(80)), Protocol: ptr.To(corev1.ProtocolUDP)})
	if err := w.api.Update(t.Context(), slice); err != nil {
		t.Fatal(err)
	}
	port := &v1alpha1.Port{
		ObjectMeta: metav1.ObjectMeta{Namespace: red.Namespace, Name: "default.192-168-0-50", Labels: map[string]string{v1alpha1.LabelNetwork: "default", v1alpha1.LabelService: string(svc.UID)}},
		Spec: v1alpha1.PortSpec{
			Network: "default", NetworkUID: string(red.UID), Addresses: []string{"192.168.0.50"}, Node: one.Name,
			Service: &v1alpha1.ServiceRef{Namespace: "red-web", Name: "s", UID: string(svc.UID)},
		},
	}
	w.create(port)
	// Nobody else on that node is in the Network; those who are elsewhere see the front.
	asks(t, outside, "tcp", floating+":8080", "red-web/six 192.168.0.50")
	asks(t, outside, "udp", floating+":53", "red-web/six 192.168.0.50")
	edgetest.Refuse(t, outside, "tcp", floating+":8081")
	five := w.pod(0, "red-web", "five", map[string]string{v1alpha1.AnnotationAddress: "192.168.0.5"})
	answers(t, five, "192.168.0.50:8080", "red-web/six 192.168.0.5")
	answers(t, six, floating+":8080", "red-web/six 192.168.0.50") // through the router

	update := func(f func()) {
		t.Helper()
		eventually(t, "update", func() error {
			for _, o := range []client.Object{port, svc, slice} {
				if err := w.api.Get(t.Context(), client.ObjectKeyFromObject(o), o); err != nil {
					return err
				}
			}
			f()
			for _, o := range []client.Object{port, svc, slice} {
				if err := w.api.Update(t.Context(), o); err != nil {
					return err
				}
			}
			return nil
		})
	}
	// A Pod on the front's node, and only it: it sees the client.
	update(func() {
		slice.Endpoints = []discoveryv1.Endpoint{{Addresses: []string{"192.168.0.5"}, NodeName: &one.Name, Conditions: discoveryv1.EndpointConditions{Ready: ptr.To(true)}}}
	})
	asks(t, outside, "tcp", floating+":8080", "red-web/five 100.64.0.200")
	asks(t, outside, "udp", floating+":53", "red-web/five 100.64.0.200")
	conn, err := outside.DialContext(t.Context(), "tcp", floating+":8080")
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = conn.Close() }()
	one.stop()
	one.start()
	asks(t, outside, "tcp", floating+":8080", "red-web/five 100.64.0.200")
	if got, err := edgetest.Again(conn); err != nil || got != "red-web/five 100.64.0.200" {
		t.Errorf("a connection from before: %q, %v", got, err)
	}
	update(func() { svc.Spec.LoadBalancerSourceRanges = []string{"198.51.100.0/24"} })
	eventually(t, "source ranges", func() error {
		if got, err := briefly(t, outside, "tcp", floating+":8080"); err == nil {
			return fmt.Errorf("answer %q", got)
		}
		return nil
	})
	update(func() { svc.Spec.LoadBalancerSourceRanges = []string{"100.64.0.0/24"} })
	asks(t, outside, "tcp", floating+":8080", "red-web/five 100.64.0.200")
	// Clients' addresses are wanted: only where there are endpoints, wherever it is.
	update(func() {
		svc.Spec.ExternalTrafficPolicy = corev1.ServiceExternalTrafficPolicyLocal
		slice.Endpoints = append(slice.Endpoints, discoveryv1.Endpoint{Addresses: []string{"192.168.0.6"}, NodeName: &two.Name, Conditions: discoveryv1.EndpointConditions{Ready: ptr.To(true)}})
	})
	for range 8 {
		asks(t, outside, "tcp", floating+":8080", "red-web/five 100.64.0.200")
	}
	// To another node, and with another port at the provider.
	update(func() { port.Spec.Node = two.Name })
	asks(t, outside, "tcp", floating+":8080", "red-web/six 100.64.0.200")
	was := port.Status.ProviderPortID
	old := port.DeepCopy()
	port.Status.ProviderPortID = uuid()
	if err := w.api.Status().Patch(t.Context(), port, client.MergeFrom(old)); err != nil {
		t.Fatal(err)
	}
	eventually(t, "it is plugged anew", func() error {
		taps := append(one.taps(), two.taps()...)
		if slices.Contains(taps, "tap"+was[:11]) || !slices.Contains(taps, "tap"+port.Status.ProviderPortID[:11]) || len(taps) != 3 {
			return fmt.Errorf("uplinks %v", taps)
		}
		return nil
	})
	asks(t, outside, "udp", floating+":53", "red-web/six 100.64.0.200")
	// Back to a node that nobody else is on, and away.
	if _, err := one.cni.Del(t.Context(), five.request); err != nil {
		t.Fatal(err)
	}
	update(func() {
		port.Spec.Node, svc.Spec.ExternalTrafficPolicy = one.Name, corev1.ServiceExternalTrafficPolicyCluster
	})
	asks(t, outside, "udp", floating+":53", "red-web/six 192.168.0.50")
	if err := w.api.Delete(t.Context(), port); err != nil {
		t.Fatal(err)
	}
	eventually(t, "nothing is left", func() error {
		ids, err := one.d.edges.List()
		if taps := append(one.taps(), two.taps()...); err != nil || len(ids) > 0 || len(taps) != 1 {
			return fmt.Errorf("%v, edges %v, uplinks %v", err, ids, taps)
		}
		return nil
	})
	edgetest.Refuse(t, outside, "tcp", floating+":8080")
	for _, n := range w.rig.Nodes {
		if got := c.carriers[red.Namespace].Refused(n); got != "0" {
			t.Errorf("%s: the agent refused %s frames of uplinks", n.Name, got)
		}
	}
	if len(plugs.got) > 0 {
		t.Errorf("%v", plugs.got)
	}
}
