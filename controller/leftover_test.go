package controller

import (
	"fmt"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"sigs.k8s.io/controller-runtime/pkg/client"

	v1alpha1 "github.com/hypernetes/hypernetes/api/hypernetes/v1alpha1"
	"github.com/hypernetes/hypernetes/network/provider"
	"github.com/hypernetes/hypernetes/network/provider/neutron/neutrontest"
)

// TestLeftovers takes objects away behind the controller's back: what was made for them
// goes, whatever its kind, and nothing else does.
func TestLeftovers(t *testing.T) {
	cloud := neutrontest.New(t)
	c := startWith(t, func(o *Options) {
		o.OpenStack.CloudConfig, o.OpenStack.Cloud = cloud.CloudsYAML(t), "admin"
		o.Networks = Networks{Default: provider.Neutron, Resync: 300 * time.Millisecond, Poll: 50 * time.Millisecond}
	})
	for name, project := range map[string]string{"blue": neutrontest.Alpha, "red": neutrontest.Beta} {
		tn := tenantOf(name)
		tn.Spec.Keystone = &v1alpha1.KeystoneProject{ProjectID: project}
		c.create(tn)
		c.active(tn)
		c.networkSays(networkOf(name, "default", ""), v1alpha1.NetworkActive, "Active", "")
	}
	second := networkOf("blue", "second", "10.7.0.0/24")
	c.create(second)
	c.networkSays(second, v1alpha1.NetworkActive, "Active", "")
	c.space("blue", "web")
	node := &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: "n1"}}
	c.create(node)
	old := node.DeepCopy()
	node.Status.Conditions = []corev1.NodeCondition{{Type: corev1.NodeReady, Status: corev1.ConditionTrue}}
	if err := c.admin.Status().Patch(t.Context(), node, client.MergeFrom(old)); err != nil {
		t.Fatal(err)
	}
	s := serviceOf("web", "s")
	c.create(s)
	c.eventually("load balancer", func() error {
		if err := c.get(s); err != nil || len(s.Status.LoadBalancer.Ingress) != 1 {
			return fmt.Errorf("%v %+v", err, s.Status)
		}
		return nil
	})
	f := &v1alpha1.FloatingIP{ObjectMeta: metav1.ObjectMeta{Namespace: "tenant-blue", Name: "f"}}
	c.create(f)
	kept := &v1alpha1.FloatingIP{ObjectMeta: metav1.ObjectMeta{Namespace: "tenant-blue", Name: "kept"}}
	c.create(kept)
	for _, f := range []*v1alpha1.FloatingIP{f, kept} {
		c.eventually("address", func() error {
			if err := c.get(f); err != nil || f.Status.Address == "" {
				return fmt.Errorf("%v %+v", err, f.Status)
			}
			return nil
		})
	}
	claimed := c.port(second, "10.7.0.9", nil, "")
	c.says(claimed, func() []metav1.Condition { return claimed.Status.Conditions }, "Ready", "True", "Active", "")
	red := networkOf("red", "default", "")
	if err := c.get(red); err != nil {
		t.Fatal(err)
	}
	first := networkOf("blue", "default", "")
	if err := c.get(first); err != nil {
		t.Fatal(err)
	}

	c.stop()
	ports := &v1alpha1.PortList{}
	if err := c.admin.List(t.Context(), ports, client.MatchingLabels{v1alpha1.LabelService: string(s.UID)}); err != nil || len(ports.Items) != 1 {
		t.Fatalf("%v %v", err, ports.Items)
	}
	redTenant := tenantOf("red")
	if err := c.get(redTenant); err != nil {
		t.Fatal(err)
	}
	for _, o := range []client.Object{&ports.Items[0], s, f, claimed, second, red, redTenant} {
		c.update(o, func() { o.SetFinalizers(nil) })
		c.delete(o)
		c.gone(o)
	}
	// Somebody's own, marked as ours of an object that never was; another cluster's; and a
	// network of ours that somebody adopts.
	mark := func(n *v1alpha1.Network) string {
		for _, r := range cloud.Get("networks", func(r map[string]any) bool { return r["id"] == n.Status.ProviderNetworkID }) {
			return r["description"].(string)
		}
		t.Fatalf("no network %s", n.Status.ProviderNetworkID)
		return ""
	}
	foreign := cloud.Put("floatingips", map[string]any{"project_id": neutrontest.Alpha, "description": "hypernetes cluster=another uid=" + string(s.UID), "tags": []any{"hypernetes"}})
	machine := cloud.Put("ports", map[string]any{"network_id": neutrontest.External, "project_id": neutrontest.Alpha, "device_owner": "compute:x", "description": mark(second), "fixed_ips": []any{}})
	adopting := networkOf("blue", "adopting", "")
	adopting.Spec.Subnets, adopting.Spec.ProviderNetworkID = nil, second.Status.ProviderNetworkID
	c.create(adopting)
	c.run()

	has := func(kind, id string) bool {
		return len(cloud.Get(kind, func(r map[string]any) bool { return r["id"] == id })) > 0
	}
	c.eventually("leftovers are gone", func() error {
		var left []string
		for id, kind := range map[string]string{
			second.Status.ProviderRouterID: "routers", second.Status.ProviderGroupID: "security-groups", claimed.Status.ProviderPortID: "ports",
			red.Status.ProviderNetworkID: "networks", red.Status.ProviderRouterID: "routers", red.Status.ProviderGroupID: "security-groups",
			f.Status.ProviderID: "floatingips", ports.Items[0].Status.ProviderPortID: "ports",
		} {
			if has(kind, id) {
				left = append(left, kind+" "+id)
			}
		}
		if n := len(cloud.Get("floatingips", nil)); n != 2 {
			left = append(left, fmt.Sprintf("%d floating IPs", n))
		}
		if len(left) > 0 {
			return fmt.Errorf("left: %v", left)
		}
		return nil
	})
	blue := tenantOf("blue")
	if err := c.get(blue); err != nil {
		t.Fatal(err)
	}
	c.event(blue, "Collected")
	for id, kind := range map[string]string{
		first.Status.ProviderNetworkID: "networks", first.Status.ProviderRouterID: "routers", first.Status.ProviderGroupID: "security-groups",
		second.Status.ProviderNetworkID: "networks", kept.Status.ProviderID: "floatingips", foreign: "floatingips", machine: "ports", neutrontest.External: "networks",
	} {
		if !has(kind, id) {
			t.Errorf("%s %s is gone, and was to stay", kind, id)
		}
	}
	// Nobody adopts it any more.
	c.delete(adopting)
	c.gone(adopting)
	c.eventually("the network is gone too", func() error {
		if has("networks", second.Status.ProviderNetworkID) {
			return fmt.Errorf("it is there")
		}
		return nil
	})
}
