package controller

import (
	"fmt"
	"net/http"
	"slices"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/utils/ptr"
	"sigs.k8s.io/controller-runtime/pkg/client"

	v1alpha1 "github.com/hypernetes/hypernetes/api/hypernetes/v1alpha1"
	network "github.com/hypernetes/hypernetes/network/controller"
	"github.com/hypernetes/hypernetes/network/provider"
	"github.com/hypernetes/hypernetes/network/provider/neutron/neutrontest"
)

// TestFront is the Port and the floating IP of a Service, in a cloud without load
// balancers.
func TestFront(t *testing.T) {
	cloud := neutrontest.New(t)
	c := startWith(t, func(o *Options) {
		o.OpenStack.CloudConfig, o.OpenStack.Cloud = cloud.CloudsYAML(t), "admin"
		o.Networks = Networks{Default: provider.Neutron, Resync: 300 * time.Millisecond, Poll: 50 * time.Millisecond}
	})
	blue := tenantOf("blue")
	blue.Spec.Keystone = &v1alpha1.KeystoneProject{ProjectID: neutrontest.Alpha}
	blue.Spec.Quota.LoadBalancers = ptr.To(int32(2))
	c.create(blue)
	c.active(blue)
	n := networkOf("blue", "default", "")
	c.networkSays(n, v1alpha1.NetworkActive, "Active", "")
	c.space("blue", "web")
	ready := func(name string, is corev1.ConditionStatus) {
		t.Helper()
		node := &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: name}}
		if err := c.get(node); err != nil {
			c.create(node)
		}
		old := node.DeepCopy()
		node.Status.Conditions = []corev1.NodeCondition{{Type: corev1.NodeReady, Status: is}}
		if err := c.admin.Status().Patch(t.Context(), node, client.MergeFrom(old)); err != nil {
			t.Fatal(err)
		}
	}
	ready("n1", corev1.ConditionTrue)
	ready("n2", corev1.ConditionTrue)
	vips := func() []map[string]any {
		return cloud.Get("ports", func(r map[string]any) bool { return r["device_owner"] == "hypernetes:vip" })
	}
	address := func(s *corev1.Service, prefix string) string {
		t.Helper()
		a := ""
		c.eventually("address", func() error {
			if err := c.get(s); err != nil || len(s.Status.LoadBalancer.Ingress) != 1 || !strings.HasPrefix(s.Status.LoadBalancer.Ingress[0].IP, prefix) {
				return fmt.Errorf("%v %+v", err, s.Status)
			}
			a = s.Status.LoadBalancer.Ingress[0].IP
			return nil
		})
		return a
	}
	portOf := func(s *corev1.Service) *v1alpha1.Port {
		t.Helper()
		list := &v1alpha1.PortList{}
		if err := c.admin.List(t.Context(), list, client.MatchingLabels{v1alpha1.LabelService: string(s.UID)}); err != nil || len(list.Items) != 1 {
			t.Fatalf("%v %+v", err, list.Items)
		}
		return &list.Items[0]
	}
	leads := func(a string) {
		t.Helper()
		c.eventually("floating IP", func() error {
			f, v := cloud.Get("floatingips", nil), vips()
			if len(f) != 1 || len(v) != 1 || f[0]["port_id"] != v[0]["id"] || f[0]["floating_ip_address"] != a {
				return fmt.Errorf("%v %v, want %s", f, v, a)
			}
			return nil
		})
	}
	// Without a class, as there is no AddressPool and no Octavia; the answer to the first
	// creations is lost.
	cloud.Fail(neutrontest.Fault{Times: 1, Method: http.MethodPost, Path: "/ports", Status: 500, After: true})
	cloud.Fail(neutrontest.Fault{Times: 1, Method: http.MethodPost, Path: "/floatingips", Status: 500, After: true})
	s := serviceOf("web", "s")
	c.create(s)
	first := address(s, "172.24.4.")
	leads(first)
	port := portOf(s)
	h := vips()[0]
	if r := port.Spec.Service; h["binding:host_id"] != port.Spec.Node || h["device_id"] != string(s.UID) || h["project_id"] != neutrontest.Alpha || r.Name != "s" || r.Namespace != "web" ||
		port.Spec.Pod != nil || !slices.Contains(s.Finalizers, network.FinalizerFront) {
		t.Errorf("%v %+v %v", h, port.Spec, s.Finalizers)
	}
	// What others change is put right, at the same address.
	cloud.Delete("floatingips", func(map[string]any) bool { return true })
	leads(first)
	c.event(s, "Repaired")
	cloud.Edit("floatingips", func(r map[string]any) { r["port_id"], r["fixed_ip_address"] = nil, nil })
	leads(first)
	was := h["id"]
	cloud.Delete("ports", func(r map[string]any) bool { return r["id"] == was })
	leads(first)
	if got := vips()[0]; got["id"] == was || got["mac_address"] != h["mac_address"] {
		t.Errorf("%v, was %v", got, h)
	}
	// Its node is lost; the controller too.
	c.stop()
	lost := port.Spec.Node
	other := map[string]string{"n1": "n2", "n2": "n1"}[lost]
	ready(lost, corev1.ConditionUnknown)
	c.run()
	bound := func(to string) {
		t.Helper()
		c.eventually("bound to "+to, func() error {
			if v := vips(); len(v) != 1 || v[0]["binding:host_id"] != to {
				return fmt.Errorf("%v", v)
			}
			return nil
		})
	}
	bound(other)
	c.event(s, "Moved")
	leads(first)
	// It does not go back by itself, but to where the endpoints are if they must see clients.
	ready(lost, corev1.ConditionTrue)
	slice := &discoveryv1.EndpointSlice{
		ObjectMeta:  metav1.ObjectMeta{Namespace: "web", Name: "s-1", Labels: map[string]string{discoveryv1.LabelServiceName: "s"}},
		AddressType: discoveryv1.AddressTypeIPv4, Endpoints: []discoveryv1.Endpoint{{Addresses: []string{"10.0.0.5"}, NodeName: &lost}},
	}
	c.create(slice)
	c.update(s, func() { s.Spec.ExternalTrafficPolicy = corev1.ServiceExternalTrafficPolicyLocal })
	bound(lost)
	c.update(slice, func() { slice.Endpoints[0].NodeName = nil }) // none anywhere: it stays
	c.update(slice, func() {
		slice.Endpoints = []discoveryv1.Endpoint{{Addresses: []string{"10.0.0.6"}, NodeName: &other}}
	})
	bound(other)
	leads(first)
	// Only inside, and out again.
	c.update(s, func() { s.Annotations = map[string]string{network.AnnotationInternal: "true"} })
	if a := address(s, "10.0."); a != port.Spec.Addresses[0] || len(cloud.Get("floatingips", nil)) > 0 {
		t.Errorf("%s, %v", a, cloud.Get("floatingips", nil))
	}
	c.update(s, func() {
		s.Annotations = map[string]string{network.AnnotationAddress: "172.24.4.77"}
	})
	address(s, "172.24.4.77")
	leads("172.24.4.77")
	// A quota, and a class that does not fit.
	second, third := serviceOf("web", "second"), serviceOf("web", "third")
	second.Spec.LoadBalancerClass = ptr.To(network.FrontClass)
	c.create(second)
	address(second, "172.24.4.")
	c.create(third)
	c.event(third, "QuotaExceeded")
	c.delete(second)
	c.gone(second)
	address(third, "172.24.4.")
	foreign := serviceOf("default", "foreign")
	foreign.Spec.LoadBalancerClass = ptr.To(network.FrontClass)
	c.create(foreign)
	c.event(foreign, "NoNetwork")
	c.delete(foreign)
	c.gone(foreign)
	// Gone while Neutron does not do it: the Service waits. Another takes its finalizer away.
	cloud.Fail(neutrontest.Fault{Times: 3, Method: http.MethodDelete, Path: "/floatingips", Status: 503})
	c.delete(s)
	c.gone(s)
	c.stop()
	c.update(third, func() { third.Finalizers = nil })
	c.delete(third)
	c.gone(third)
	c.run()
	nothing := func() {
		t.Helper()
		c.eventually("nothing is left", func() error {
			list := &v1alpha1.PortList{}
			if err := c.admin.List(t.Context(), list); err != nil {
				return err
			}
			if f, v := cloud.Get("floatingips", nil), vips(); len(f)+len(v)+len(list.Items) > 0 {
				return fmt.Errorf("%v %v %v", f, v, list.Items)
			}
			return nil
		})
	}
	nothing()
	// One that is no load balancer any more.
	last := serviceOf("web", "last")
	c.create(last)
	address(last, "172.24.4.")
	c.update(last, func() {
		last.Spec.Type, last.Spec.AllocateLoadBalancerNodePorts = corev1.ServiceTypeClusterIP, nil
		last.Spec.LoadBalancerClass = nil
	})
	nothing()
	c.eventually("plain", func() error {
		if err := c.get(last); err != nil || len(last.Finalizers) > 0 || len(last.Status.LoadBalancer.Ingress) > 0 {
			return fmt.Errorf("%v %v %+v", err, last.Finalizers, last.Status)
		}
		return nil
	})
	// A node that Neutron cannot bind to is left for another, and it is said why.
	ready("n1", corev1.ConditionUnknown)
	ready("n3", corev1.ConditionTrue) // without an agent
	ready("n2", corev1.ConditionUnknown)
	unbound := serviceOf("web", "unbound")
	c.create(unbound)
	c.event(unbound, v1alpha1.ReasonBindingFailed)
	ready("n2", corev1.ConditionTrue)
	bound("n2")
	leads(address(unbound, "172.24.4."))
	c.event(unbound, v1alpha1.ReasonBindingFailed, "clients cannot come in by node n3, node n2 is tried: Neutron cannot bind port", "no L2 agent on a host of that name")
	c.delete(unbound)
	c.gone(unbound)
	nothing()
	// Where there is an AddressPool, who says nothing is of that.
	c.pool(poolOf("p", 0, nil, "203.0.113.0/29"))
	pooled := serviceOf("web", "pooled")
	c.create(pooled)
	address(pooled, "203.0.113.")
	nothing()
}
