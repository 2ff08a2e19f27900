package controller

import (
	"fmt"
	"net/http"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	v1alpha1 "github.com/hypernetes/hypernetes/api/hypernetes/v1alpha1"
	"github.com/hypernetes/hypernetes/network/provider"
	"github.com/hypernetes/hypernetes/network/provider/neutron/neutrontest"
)

// TestNeutron is the whole with a stand-in for Neutron: Networks, Ports and FloatingIPs
// from their creation to their end, what others change, and a Neutron that is away.
func TestNeutron(t *testing.T) {
	cloud := neutrontest.New(t)
	c := startWith(t, func(o *Options) {
		o.OpenStack.CloudConfig, o.OpenStack.Cloud = cloud.CloudsYAML(t), "admin"
		o.Networks = Networks{Default: provider.Neutron, Resync: 300 * time.Millisecond, Poll: 50 * time.Millisecond}
	})
	blue := tenantOf("blue")
	blue.Spec.Keystone = &v1alpha1.KeystoneProject{ProjectID: neutrontest.Alpha}
	c.create(blue)
	c.active(blue)
	n := networkOf("blue", "default", "")
	c.networkSays(n, v1alpha1.NetworkActive, "Active", "provider neutron")
	if n.Status.Provider != "neutron" || n.Status.ProviderNetworkID == "" || n.Status.ProviderRouterID == "" || n.Status.ProviderGroupID == "" || n.Status.MTU != 1450 || n.Status.Subnets[0].ProviderSubnetID == "" {
		t.Errorf("%+v", n.Status)
	}
	c.space("blue", "web")
	for _, node := range []string{"n1", "n2", "n9"} {
		c.create(&corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: node}})
	}
	id := func(r map[string]any) string { return r["id"].(string) }
	byID := func(id string) func(map[string]any) bool {
		return func(r map[string]any) bool { return r["id"] == id }
	}
	conditions := func(p *v1alpha1.Port) func() []metav1.Condition {
		return func() []metav1.Condition { return p.Status.Conditions }
	}
	var pod *corev1.Pod
	var port *v1alpha1.Port

	t.Run("port", func(t *testing.T) {
		cloud.Wires(false)
		pod = podOf("web", "p")
		c.create(pod)
		port = c.port(n, "10.0.0.5", pod, "n1")
		c.says(port, conditions(port), v1alpha1.ConditionWired, "False", "NotWired", "Neutron says DOWN")
		if s := port.Status; s.Phase != v1alpha1.PortActive || s.MAC == "" || s.VIFType != "bridge" || s.ProviderPortID == "" || port.Finalizers[0] != v1alpha1.FinalizerProvider {
			t.Errorf("%+v %v", s, port.Finalizers)
		}
		cloud.Wires(true)
		c.says(port, conditions(port), v1alpha1.ConditionWired, "True", "Wired", "")
		h := cloud.Get("ports", byID(port.Status.ProviderPortID))[0]
		if h["binding:host_id"] != "n1" || h["device_id"] != string(pod.UID) || h["project_id"] != neutrontest.Alpha {
			t.Errorf("%v", h)
		}
	})
	t.Run("faults", func(t *testing.T) {
		cloud.Put("ports", map[string]any{"network_id": n.Status.ProviderNetworkID, "project_id": neutrontest.Alpha, "device_owner": "compute:x", "mac_address": "fa:16:3e:aa:aa:aa",
			"fixed_ips": []any{map[string]any{"ip_address": "10.0.0.66"}}})
		taken := c.port(n, "10.0.0.66", nil, "n1")
		c.says(taken, conditions(taken), "Ready", "False", v1alpha1.ReasonAddressInUse, "10.0.0.66")
		if taken.Status.Phase != v1alpha1.PortFailed {
			t.Errorf("%+v", taken.Status)
		}
		c.event(taken, v1alpha1.ReasonAddressInUse)
		c.delete(taken)
		c.gone(taken)
		unbound := c.port(n, "10.0.0.67", nil, "n9")
		c.says(unbound, conditions(unbound), "Ready", "False", v1alpha1.ReasonBindingFailed, "host n9")
		cloud.Host("n9", "bridge") // the operator starts an agent
		c.says(unbound, conditions(unbound), "Ready", "True", "Active", "")
		c.delete(unbound)
		c.gone(unbound)
		cloud.Quota("ports", 1)
		over := c.port(n, "10.0.0.68", nil, "n1")
		c.says(over, conditions(over), "Ready", "False", "QuotaExceeded", "quota at Neutron is used up")
		cloud.NoQuota()
		c.says(over, conditions(over), "Ready", "True", "Active", "")
		c.delete(over)
		c.gone(over)
	})
	t.Run("drift", func(t *testing.T) {
		was := port.Status
		cloud.Edit("ports", func(r map[string]any) {
			if r["id"] == was.ProviderPortID {
				r["allowed_address_pairs"] = []any{map[string]any{"ip_address": "0.0.0.0/0"}}
			}
		})
		c.eventually("pairs", func() error {
			if p := cloud.Get("ports", byID(was.ProviderPortID))[0]["allowed_address_pairs"]; len(p.([]any)) > 0 {
				return fmt.Errorf("%v", p)
			}
			return nil
		})
		c.event(port, "Repaired")
		cloud.Delete("ports", byID(was.ProviderPortID))
		c.eventually("a port anew", func() error {
			if err := c.get(port); err != nil {
				return err
			}
			if s := port.Status; s.ProviderPortID == was.ProviderPortID || s.MAC != was.MAC || !meta.IsStatusConditionTrue(s.Conditions, v1alpha1.ConditionWired) {
				return fmt.Errorf("%+v", s)
			}
			return nil
		})
		router := n.Status.ProviderRouterID
		cloud.Edit("routers", func(r map[string]any) { r["external_gateway_info"] = nil })
		c.eventually("gateway", func() error {
			if r := cloud.Get("routers", byID(router)); r[0]["external_gateway_info"] == nil {
				return fmt.Errorf("%v", r)
			}
			return nil
		})
		c.event(n, "Repaired")
	})
	t.Run("floating", func(t *testing.T) {
		f := &v1alpha1.FloatingIP{ObjectMeta: metav1.ObjectMeta{Namespace: "tenant-blue", Name: "f"}}
		f.Spec.Pod = &v1alpha1.PodName{Namespace: "web", Name: "p"}
		c.create(f)
		ready := func() []metav1.Condition { return f.Status.Conditions }
		c.says(f, ready, "Ready", "True", "Active", "leads to 10.0.0.5 on node n1")
		if f.Status.Provider != "neutron" || f.Status.Pool != "openstack/public" || !strings.HasPrefix(f.Status.Address, "172.24.4.") {
			t.Errorf("%+v", f.Status)
		}
		address := f.Status.Address
		leads := func(to any) {
			t.Helper()
			c.eventually("floating IP", func() error {
				all := cloud.Get("floatingips", nil)
				if len(all) != 1 || all[0]["port_id"] != to || all[0]["floating_ip_address"] != address {
					return fmt.Errorf("%v, want %v", all, to)
				}
				return nil
			})
		}
		leads(port.Status.ProviderPortID)
		cloud.Delete("floatingips", func(map[string]any) bool { return true })
		leads(port.Status.ProviderPortID)
		cloud.Edit("floatingips", func(r map[string]any) { r["port_id"], r["fixed_ip_address"] = nil, nil })
		leads(port.Status.ProviderPortID)
		// A Neutron that is away changes nothing.
		cloud.Fail(neutrontest.Fault{Times: -1, Status: 503})
		c.says(f, ready, v1alpha1.ConditionInSync, "Unknown", "ProviderUnavailable", "")
		c.says(n, func() []metav1.Condition { return n.Status.Conditions }, v1alpha1.ConditionInSync, "Unknown", "ProviderUnavailable", "")
		if f.Status.Phase != "Active" || f.Status.Target != "10.0.0.5" || n.Status.Phase != v1alpha1.NetworkActive {
			t.Errorf("%+v %+v", f.Status, n.Status)
		}
		cloud.Mend()
		c.says(f, ready, v1alpha1.ConditionInSync, "True", "InSync", "")
		c.update(f, func() { f.Spec.Pod = nil })
		c.says(f, ready, "Ready", "False", "NoTarget", "")
		leads(nil)
		c.delete(f)
		c.gone(f)
		if left := cloud.Get("floatingips", nil); len(left) > 0 {
			t.Errorf("left: %v", left)
		}
	})
	t.Run("crash", func(t *testing.T) {
		// The answer to a creation is lost, and then the controller is: nothing is made twice.
		cloud.Fail(neutrontest.Fault{Times: 1, Method: http.MethodPost, Path: "/ports", Status: 500, After: true})
		p := c.port(n, "10.0.0.40", nil, "n1")
		c.eventually("made", func() error {
			if all := cloud.Get("ports", func(r map[string]any) bool { return r["device_owner"] == "hypernetes:pod" }); len(all) != 2 {
				return fmt.Errorf("%v", all)
			}
			return nil
		})
		c.stop()
		c.run()
		c.says(p, conditions(p), "Ready", "True", "Active", "")
		if all := cloud.Get("ports", func(r map[string]any) bool { return r["device_owner"] == "hypernetes:pod" }); len(all) != 2 {
			t.Errorf("%v", all)
		}
		// Gone while Neutron is away: the Port waits, and says for what.
		cloud.Fail(neutrontest.Fault{Times: -1, Method: http.MethodDelete, Status: 429, Header: map[string]string{"Retry-After": "1"}})
		c.delete(p)
		c.says(p, conditions(p), v1alpha1.ConditionBlocked, "True", "ProviderUnavailable", "429")
		cloud.Mend()
		c.gone(p)
	})
	t.Run("strays", func(t *testing.T) {
		// A request that was given up is carried out in the end, when its Port is gone.
		mark := cloud.Get("ports", byID(port.Status.ProviderPortID))[0]["description"].(string)
		other := strings.Replace(mark, string(port.UID), "9f0f7e3c-0000-4000-8000-000000000000", 1)
		if other == mark {
			t.Fatalf("the mark %q is without %s", mark, port.UID)
		}
		for owner, mark := range map[string]string{"hypernetes:pod": other, "compute:y": other, "hypernetes:pod ": "mine"} {
			cloud.Put("ports", map[string]any{"network_id": n.Status.ProviderNetworkID, "project_id": neutrontest.Alpha, "device_owner": strings.TrimSpace(owner),
				"device_id": "stray", "description": mark, "mac_address": fmt.Sprintf("fa:16:3e:bb:bb:%02x", len(owner))})
		}
		left := func() []map[string]any {
			return cloud.Get("ports", func(r map[string]any) bool { return r["device_id"] == "stray" })
		}
		c.eventually("the stray is gone", func() error {
			if len(left()) != 2 {
				return fmt.Errorf("%v", left())
			}
			return nil
		})
		for _, r := range left() {
			if r["description"] == other && r["device_owner"] == "hypernetes:pod" {
				t.Errorf("another was removed: %v", left())
			}
		}
		c.event(n, "Repaired")
		cloud.Delete("ports", func(r map[string]any) bool { return r["device_id"] == "stray" })
		if len(cloud.Get("ports", byID(port.Status.ProviderPortID))) != 1 {
			t.Error("the Pod's port is gone")
		}
	})
	t.Run("end", func(t *testing.T) {
		// The Pod goes, and nobody says so: the Port is collected, and Neutron's with it.
		c.delete(pod)
		c.gone(port)
		for _, r := range cloud.Get("ports", func(r map[string]any) bool { return r["device_owner"] == "compute:x" }) {
			foreign := id(r)
			tns := spaceOf("blue", "web", "")
			c.delete(tns)
			c.gone(tns)
			c.delete(n)
			c.says(n, func() []metav1.Condition { return n.Status.Conditions }, v1alpha1.ConditionBlocked, "True", "NetworkInUse", foreign)
			cloud.Delete("ports", byID(foreign))
		}
		c.gone(n)
		for _, kind := range []string{"ports", "routers", "security-groups", "security-group-rules", "floatingips"} {
			if left := cloud.Get(kind, nil); len(left) > 0 {
				t.Errorf("%s left: %v", kind, left)
			}
		}
		if left := cloud.Get("networks", nil); len(left) != 1 {
			t.Errorf("networks left: %v", left)
		}
	})
	t.Run("no project", func(t *testing.T) {
		c.create(tenantOf("green"))
		g := networkOf("green", "default", "")
		c.networkSays(g, v1alpha1.NetworkFailed, "NoProject", "tenant green has no OpenStack project")
		own := networkOf("green", "own", "10.9.0.0/24")
		own.Spec.Provider = provider.Builtin
		c.create(own)
		c.networkSays(own, v1alpha1.NetworkActive, "Active", "provider builtin")
		c.delete(own)
		c.gone(own)
	})
}
