package controller

import (
	"context"
	"fmt"
	"hash/fnv"
	"net"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	v1alpha1 "github.com/hypernetes/hypernetes/api/hypernetes/v1alpha1"
	"github.com/hypernetes/hypernetes/network/openstack"
	"github.com/hypernetes/hypernetes/network/provider"
	"github.com/hypernetes/hypernetes/test/openstack/faultproxy"
	"github.com/hypernetes/hypernetes/test/openstack/openstacktest"
)

// TestLiveSpoilt is TestSpoilt with a real Keystone and Neutron, which a proxy keeps the
// controllers from. test/e2e/openstack's TestInjected has Pods and packets too.
func TestLiveSpoilt(t *testing.T) {
	cloud := openstacktest.Up(t)
	proxy := faultproxy.New(cloud.DialContext)
	front := httptest.NewServer(proxy)
	t.Cleanup(front.Close)
	transport := &http.Transport{DialContext: func(ctx context.Context, network, _ string) (net.Conn, error) {
		return (&net.Dialer{}).DialContext(ctx, network, front.Listener.Addr().String())
	}}
	direct := &http.Transport{DialContext: cloud.DialContext}
	c := startWith(t, func(o *Options) {
		o.OpenStack.CloudConfig, o.OpenStack.Cloud = cloud.ConfigFile(), "admin"
		o.Networks = Networks{Default: provider.Neutron, External: openstacktest.ExternalNetwork, Transport: transport, Resync: 10 * time.Second}
	})
	c.patience = 8 * time.Minute
	alpha, err := cloud.Provider(t.Context(), "alpha")
	if err != nil {
		t.Fatal(err)
	}
	project, err := openstacktest.ProjectID(alpha)
	if err != nil {
		t.Fatal(err)
	}
	host, _ := cloud.Node(1)
	c.create(&corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: host}})
	blue := tenantOf("blue")
	blue.Spec.Keystone = &v1alpha1.KeystoneProject{ProjectID: project}
	c.create(blue)
	c.active(blue)
	first := networkOf("blue", "default", "")
	t.Cleanup(func() { c.leave(direct, project, first) })
	c.networkSays(first, v1alpha1.NetworkActive, "Active", "provider neutron")

	// What this test's cluster has at Neutron, asked past the proxy.
	admin, err := openstack.New(openstack.Options{File: cloud.ConfigFile(), Name: "admin", Transport: direct})
	if err != nil {
		t.Fatal(err)
	}
	neutron, err := admin.Client(t.Context(), openstack.Network, "")
	if err != nil {
		t.Fatal(err)
	}
	ns := &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: metav1.NamespaceSystem}}
	if err := c.get(ns); err != nil {
		t.Fatal(err)
	}
	has := func(more map[string]int) error {
		for kind, want := range map[string]int{"networks": 1, "routers": 1, "security-groups": 1, "ports": 0, "floatingips": 0} {
			all, err := openstack.List[map[string]any](t.Context(), neutron, openstack.Collection{Path: kind, Key: strings.ReplaceAll(kind, "-", "_")}, nil)
			if err != nil {
				return err
			}
			n := 0
			for _, x := range all {
				if strings.Contains(fmt.Sprint(x["description"]), string(ns.UID)) {
					n++
				}
			}
			if n != want+more[kind] {
				return fmt.Errorf("%d %s, want %d", n, kind, want+more[kind])
			}
		}
		return nil
	}
	faults := []faultproxy.Rule{
		{Name: "401", Status: 401},
		{Name: "409", Status: 409, Body: `{"NeutronError": {"type": "RetryRequest", "message": "conflict", "detail": ""}}`},
		{Name: "429", Status: 429, Header: map[string]string{"Retry-After": "1"}},
		{Name: "500", Status: 500, Body: "<html>", After: true},
		{Name: "cut", Cut: true, After: true},
	}
	for round := range 2 {
		spoilt := func(what string, f func()) {
			t.Helper()
			var rules []faultproxy.Rule
			for i, r := range faults {
				r.Each, r.Times = true, 1
				r.Pick = func(kind string) bool {
					h := fnv.New32a()
					_, _ = h.Write([]byte(kind))
					return (int(h.Sum32()%uint32(len(faults)))+round)%len(faults) == i
				}
				rules = append(rules, r)
			}
			begun := time.Now()
			proxy.Set(rules...)
			f()
			counts := proxy.Counts()
			proxy.Set()
			n := 0
			for _, v := range counts {
				n += v
			}
			t.Logf("round %d, %s: spoilt %v, %s", round, what, counts, time.Since(begun).Round(time.Millisecond))
			if n < 8 {
				t.Errorf("only %d requests were spoilt", n)
			}
		}
		n := networkOf("blue", fmt.Sprint("n", round), fmt.Sprintf("10.%d.0.0/24", 30+round))
		f := &v1alpha1.FloatingIP{ObjectMeta: metav1.ObjectMeta{Namespace: "tenant-blue", Name: fmt.Sprint("f", round)}}
		var port *v1alpha1.Port
		spoilt("made", func() {
			c.create(n)
			c.networkSays(n, v1alpha1.NetworkActive, "Active", "")
			port = c.port(n, fmt.Sprintf("10.%d.0.9", 30+round), nil, host)
			c.says(port, func() []metav1.Condition { return port.Status.Conditions }, "Ready", "True", "Active", "")
			c.create(f)
			c.eventually("address", func() error {
				if err := c.get(f); err != nil || f.Status.Address == "" {
					return fmt.Errorf("%v %+v", err, f.Status)
				}
				return nil
			})
			if err := has(map[string]int{"networks": 1, "routers": 1, "security-groups": 1, "ports": 1, "floatingips": 1}); err != nil {
				t.Error(err)
			}
		})
		spoilt("removed", func() {
			c.delete(f)
			c.gone(f)
			c.delete(port)
			c.gone(port)
			c.delete(n)
			c.gone(n)
		})
		c.eventually("nothing is left", func() error { return has(nil) })
	}
	c.delete(first)
	c.gone(first)
}
