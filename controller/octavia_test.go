package controller

import (
	"fmt"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/utils/ptr"

	v1alpha1 "github.com/hypernetes/hypernetes/api/hypernetes/v1alpha1"
	"github.com/hypernetes/hypernetes/network/loadbalancer/octavia"
	"github.com/hypernetes/hypernetes/network/provider"
	"github.com/hypernetes/hypernetes/network/provider/neutron/neutrontest"
)

// TestOctavia is a Service's load balancer from its creation to its end.
func TestOctavia(t *testing.T) {
	cloud := neutrontest.New(t)
	cloud.Balancers(true)
	c := startWith(t, func(o *Options) {
		o.OpenStack.CloudConfig, o.OpenStack.Cloud = cloud.CloudsYAML(t), "admin"
		o.Networks = Networks{Default: provider.Neutron, Resync: 300 * time.Millisecond, Poll: 50 * time.Millisecond}
	})
	blue := tenantOf("blue")
	blue.Spec.Keystone = &v1alpha1.KeystoneProject{ProjectID: neutrontest.Alpha}
	c.create(blue)
	c.active(blue)
	c.networkSays(networkOf("blue", "default", ""), v1alpha1.NetworkActive, "Active", "")
	c.space("blue", "web")

	tcp := corev1.ProtocolTCP
	slice := &discoveryv1.EndpointSlice{
		ObjectMeta:  metav1.ObjectMeta{Namespace: "web", Name: "s-1", Labels: map[string]string{discoveryv1.LabelServiceName: "s"}},
		AddressType: discoveryv1.AddressTypeIPv4, Ports: []discoveryv1.EndpointPort{{Name: ptr.To("a"), Port: ptr.To(int32(8080)), Protocol: &tcp}},
		// The last one is no Pod of the Network.
		Endpoints: []discoveryv1.Endpoint{{Addresses: []string{"10.0.0.5"}}, {Addresses: []string{"10.0.0.6"}, Conditions: discoveryv1.EndpointConditions{Ready: ptr.To(false)}}, {Addresses: []string{"192.0.2.1"}}},
	}
	c.create(slice)
	s := serviceOf("web", "s")
	s.Spec.LoadBalancerClass = ptr.To(octavia.Class)
	c.create(s)
	address := ""
	c.eventually("address", func() error {
		if err := c.get(s); err != nil || len(s.Status.LoadBalancer.Ingress) != 1 {
			return fmt.Errorf("%v %+v", err, s.Status)
		}
		address = s.Status.LoadBalancer.Ingress[0].IP
		return nil
	})
	if !strings.HasPrefix(address, "172.24.4.") {
		t.Errorf("%+v", s.Status)
	}
	state := func() string {
		text := ""
		for _, l := range cloud.Get("listeners", nil) {
			text += fmt.Sprint(l["protocol"], " ", l["protocol_port"], " ", l["allowed_cidrs"], ":")
			for _, p := range cloud.Get("pools", func(r map[string]any) bool { return r["id"] == l["default_pool_id"] }) {
				for _, m := range cloud.Get("members", func(r map[string]any) bool { return r["pool"] == p["id"] }) {
					text += fmt.Sprint(" ", m["address"], " ", m["protocol_port"])
				}
				if p["session_persistence"] != nil {
					text += " sticky"
				}
			}
			text += "; "
		}
		return text
	}
	is := func(want string) {
		t.Helper()
		c.eventually("load balancer", func() error {
			if got := state(); got != want {
				return fmt.Errorf("%q, want %q", got, want)
			}
			return nil
		})
	}
	is("TCP 80 <nil>: 10.0.0.5 8080; UDP 53 <nil>:; ")
	if all := cloud.Get("loadbalancers", nil); len(all) != 1 || all[0]["project_id"] != neutrontest.Alpha {
		t.Errorf("%v", all)
	}
	c.update(slice, func() { slice.Endpoints[1].Conditions.Ready = ptr.To(true) })
	is("TCP 80 <nil>: 10.0.0.5 8080 10.0.0.6 8080; UDP 53 <nil>:; ")
	c.update(s, func() {
		s.Spec.Ports = s.Spec.Ports[:1]
		s.Spec.Ports = append(s.Spec.Ports, corev1.ServicePort{Name: "c", Port: 443})
		s.Spec.LoadBalancerSourceRanges = []string{"198.51.100.0/24"}
		s.Spec.SessionAffinity = corev1.ServiceAffinityClientIP
	})
	is("TCP 80 [198.51.100.0/24]: 10.0.0.5 8080 10.0.0.6 8080 sticky; TCP 443 [198.51.100.0/24]: sticky; ")
	// What others change is put right; what Octavia gives up is made anew, at the same address.
	cloud.Edit("listeners", func(r map[string]any) { r["allowed_cidrs"] = nil })
	is("TCP 80 [198.51.100.0/24]: 10.0.0.5 8080 10.0.0.6 8080 sticky; TCP 443 [198.51.100.0/24]: sticky; ")
	was := cloud.Get("loadbalancers", nil)[0]["id"]
	cloud.Edit("loadbalancers", func(r map[string]any) { r["provisioning_status"] = "ERROR" })
	c.event(s, "LoadBalancerError")
	c.eventually("another one", func() error {
		all := cloud.Get("loadbalancers", nil)
		f := cloud.Get("floatingips", nil)
		if len(all) != 1 || all[0]["id"] == was || len(f) != 1 || f[0]["port_id"] != all[0]["vip_port_id"] || f[0]["floating_ip_address"] != address {
			return fmt.Errorf("%v %v", all, f)
		}
		return nil
	})
	// Only inside.
	c.update(s, func() { s.Annotations = map[string]string{octavia.AnnotationInternal: "true"} })
	c.eventually("internal", func() error {
		if err := c.get(s); err != nil || len(cloud.Get("floatingips", nil)) > 0 || !strings.HasPrefix(s.Status.LoadBalancer.Ingress[0].IP, "10.0.0.") {
			return fmt.Errorf("%v %+v", err, s.Status)
		}
		return nil
	})
	// One that does not finish what is made whole gets it part by part.
	cloud.Hangs(true)
	whole := state()
	cloud.Edit("loadbalancers", func(r map[string]any) { r["provisioning_status"] = "ERROR" })
	c.event(s, "LoadBalancerStuck")
	is(whole)
	cloud.Quota("loadbalancers", 1)
	over := serviceOf("web", "over")
	over.Spec.LoadBalancerClass = ptr.To(octavia.Class)
	c.create(over)
	c.event(over, "QuotaExceeded")
	c.delete(over)
	c.gone(over)
	second := serviceOf("web", "second")
	second.Spec.LoadBalancerClass = ptr.To(octavia.Class)
	cloud.NoQuota()
	c.create(second)
	c.eventually("a second one", func() error {
		if n := len(cloud.Get("floatingips", nil)); n != 1 {
			return fmt.Errorf("%d floating IPs", n)
		}
		return nil
	})
	c.delete(second)
	c.gone(second)
	foreign := serviceOf("default", "foreign")
	foreign.Spec.LoadBalancerClass = ptr.To(octavia.Class)
	c.create(foreign)
	c.event(foreign, "NoNetwork")
	c.delete(foreign)
	c.gone(foreign)
	// Without a class, as there is no AddressPool: it is Octavia's, and stays that when there is
	// one.
	plain := serviceOf("web", "plain")
	c.create(plain)
	c.eventually("one without a class", func() error {
		if err := c.get(plain); err != nil || len(plain.Status.LoadBalancer.Ingress) != 1 || !strings.HasPrefix(plain.Status.LoadBalancer.Ingress[0].IP, "172.24.4.") || len(cloud.Get("loadbalancers", nil)) != 2 {
			return fmt.Errorf("%v %+v", err, plain.Status)
		}
		return nil
	})
	if len(cloud.Get("ports", func(r map[string]any) bool { return r["device_owner"] == "hypernetes:vip" })) > 0 {
		t.Error("it has a port of its own too")
	}
	was = cloud.Get("loadbalancers", nil)[1]["id"]
	c.pool(poolOf("p", 0, nil, "203.0.113.0/29"))
	pooled := serviceOf("web", "pooled")
	c.create(pooled)
	c.eventually("one of the AddressPool", func() error {
		if err := c.get(pooled); err != nil || len(pooled.Status.LoadBalancer.Ingress) != 1 || !strings.HasPrefix(pooled.Status.LoadBalancer.Ingress[0].IP, "203.0.113.") {
			return fmt.Errorf("%v %+v", err, pooled.Status)
		}
		return nil
	})
	c.update(plain, func() { plain.Spec.Ports = plain.Spec.Ports[:1] })
	c.eventually("its listeners", func() error {
		all := cloud.Get("listeners", func(r map[string]any) bool { return r["loadbalancer"] == was })
		if err := c.get(plain); err != nil || len(all) != 1 || !strings.HasPrefix(plain.Status.LoadBalancer.Ingress[0].IP, "172.24.4.") {
			return fmt.Errorf("%v %v %+v", err, all, plain.Status)
		}
		return nil
	})
	c.delete(plain)
	c.gone(plain)
	c.delete(pooled)
	c.gone(pooled)
	if left := cloud.Get("loadbalancers", func(r map[string]any) bool { return r["id"] == was }); len(left) > 0 {
		t.Errorf("left: %v", left)
	}
	// Who may edit a Service may take its finalizer away: what is left is found.
	c.update(s, func() { delete(s.Annotations, octavia.AnnotationInternal) })
	c.eventually("floating IP again", func() error {
		if n := len(cloud.Get("floatingips", nil)); n != 1 {
			return fmt.Errorf("%d floating IPs", n)
		}
		return nil
	})
	c.stop()
	c.update(s, func() { s.Finalizers = nil })
	c.delete(s)
	c.gone(s)
	c.run()
	c.eventually("swept", func() error {
		if left := append(cloud.Get("loadbalancers", nil), cloud.Get("floatingips", nil)...); len(left) > 0 {
			return fmt.Errorf("%v", left)
		}
		return nil
	})
	for _, kind := range []string{"loadbalancers", "listeners", "pools", "members", "floatingips"} {
		if left := cloud.Get(kind, nil); len(left) > 0 {
			t.Errorf("%s left: %v", kind, left)
		}
	}
}
