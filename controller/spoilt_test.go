package controller

import (
	"fmt"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/utils/ptr"
	"sigs.k8s.io/controller-runtime/pkg/client"

	v1alpha1 "github.com/hypernetes/hypernetes/api/hypernetes/v1alpha1"
	network "github.com/hypernetes/hypernetes/network/controller"
	"github.com/hypernetes/hypernetes/network/loadbalancer/octavia"
	"github.com/hypernetes/hypernetes/network/provider"
	"github.com/hypernetes/hypernetes/network/provider/neutron/neutrontest"
)

// TestSpoilt spoils one request of each kind that the reconcilers make of Keystone, Neutron
// and Octavia while a Network, a Port, a FloatingIP and Services of both kinds come, and
// again while they go. Each kind fails in another way than the next, and in another one in
// the next round, until it has failed in all of them: all becomes what it is to be, and
// nothing is left.
func TestSpoilt(t *testing.T) {
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
	for _, name := range []string{"n1", "n2"} {
		node := &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: name}}
		c.create(node)
		old := node.DeepCopy()
		node.Status.Conditions = []corev1.NodeCondition{{Type: corev1.NodeReady, Status: corev1.ConditionTrue}}
		if err := c.admin.Status().Patch(t.Context(), node, client.MergeFrom(old)); err != nil {
			t.Fatal(err)
		}
	}
	faults := []neutrontest.Fault{
		{Status: 401},
		{Status: 409, Body: `{"NeutronError": {"type": "RetryRequest", "message": "conflict", "detail": ""}}`},
		{Status: 429, Header: map[string]string{"Retry-After": "1"}},
		{Status: 500, After: true},
		{Cut: true, After: true},
		{Status: 503},
	}
	kinds := []string{"networks", "subnets", "routers", "ports", "security-groups", "security-group-rules", "floatingips", "loadbalancers", "listeners", "pools"}
	count := func() map[string]int {
		out := map[string]int{}
		for _, kind := range kinds {
			out[kind] = len(cloud.Get(kind, nil))
		}
		return out
	}
	before := count()
	differ := func(more map[string]int) error {
		now := count()
		for _, kind := range kinds {
			if now[kind] != before[kind]+more[kind] {
				return fmt.Errorf("%d %s, want %d: %v", now[kind], kind, before[kind]+more[kind], cloud.Get(kind, nil))
			}
		}
		return nil
	}
	for round := range faults {
		spoilt := func(what string, f func()) {
			t.Helper()
			begun := time.Now()
			cloud.FailEach(round, faults...)
			cloud.ExpireTokens()
			f()
			n := cloud.Failed()
			cloud.Mend()
			t.Logf("round %d, %s: %d kinds of requests spoilt, %s", round, what, n, time.Since(begun).Round(time.Millisecond))
			if n < 12 {
				t.Errorf("%s: only %d kinds of requests were spoilt", what, n)
			}
		}
		named := func(s string) string { return fmt.Sprint(s, round) }
		second := networkOf("blue", named("second"), fmt.Sprintf("10.%d.0.0/24", 20+round))
		f := &v1alpha1.FloatingIP{ObjectMeta: metav1.ObjectMeta{Namespace: "tenant-blue", Name: named("f")}}
		front, balanced := serviceOf("web", named("front")), serviceOf("web", named("balanced"))
		front.Spec.LoadBalancerClass, balanced.Spec.LoadBalancerClass = ptr.To(network.FrontClass), ptr.To(octavia.Class)
		var claimed *v1alpha1.Port
		spoilt("made", func() {
			c.create(second, f, front, balanced)
			c.networkSays(second, v1alpha1.NetworkActive, "Active", "")
			claimed = c.port(second, fmt.Sprintf("10.%d.0.9", 20+round), nil, "n1")
			c.says(claimed, func() []metav1.Condition { return claimed.Status.Conditions }, v1alpha1.ConditionWired, "True", "Wired", "")
			c.eventually("addresses", func() error {
				for _, s := range []*corev1.Service{front, balanced} {
					if err := c.get(s); err != nil || len(s.Status.LoadBalancer.Ingress) != 1 {
						return fmt.Errorf("%s: %v %+v", s.Name, err, s.Status)
					}
				}
				if err := c.get(f); err != nil || f.Status.Address == "" {
					return fmt.Errorf("%v %+v", err, f.Status)
				}
				return nil
			})
			// The ports: the router's, the Port's, the Service's, and Octavia's VIP.
			c.eventually("one of each", func() error {
				return differ(map[string]int{"networks": 1, "subnets": 1, "routers": 1, "ports": 4, "security-groups": 1, "security-group-rules": 4, "floatingips": 3,
					"loadbalancers": 1, "listeners": 2, "pools": 2})
			})
		})
		spoilt("removed", func() {
			for _, o := range []client.Object{claimed, f, front, balanced} {
				c.delete(o)
			}
			for _, o := range []client.Object{claimed, f, front, balanced} {
				c.gone(o)
			}
			c.delete(second)
			c.gone(second)
		})
		c.eventually("nothing is left", func() error { return differ(nil) })
	}
}
