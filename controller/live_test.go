package controller

import (
	"context"
	"fmt"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/utils/ptr"

	v1alpha1 "github.com/hypernetes/hypernetes/api/hypernetes/v1alpha1"
	"github.com/hypernetes/hypernetes/network/loadbalancer/octavia"
	"github.com/hypernetes/hypernetes/network/openstack"
	"github.com/hypernetes/hypernetes/network/provider"
	"github.com/hypernetes/hypernetes/network/provider/neutron"
	"github.com/hypernetes/hypernetes/test/openstack/openstacktest"
)

// TestLive is the controllers with a real Neutron and, where there is one, a real Octavia,
// whose drivers do nothing: its load balancers have no packets and no real VIP.
func TestLive(t *testing.T) {
	cloud := openstacktest.Up(t)
	transport := &http.Transport{DialContext: cloud.DialContext}
	c := startWith(t, func(o *Options) {
		o.OpenStack.CloudConfig, o.OpenStack.Cloud = cloud.ConfigFile(), "admin"
		o.Networks = Networks{Default: provider.Neutron, External: openstacktest.ExternalNetwork, Transport: transport, Resync: 10 * time.Second, Octavia: "amphora"}
	})
	c.patience = 2 * time.Minute
	alpha, err := cloud.Provider(t.Context(), "alpha")
	if err != nil {
		t.Fatal(err)
	}
	project, err := openstacktest.ProjectID(alpha)
	if err != nil {
		t.Fatal(err)
	}
	n := networkOf("blue", "default", "")
	t.Cleanup(func() { c.leave(transport, project, n) })
	blue := tenantOf("blue")
	blue.Spec.Keystone = &v1alpha1.KeystoneProject{ProjectID: project}
	c.create(blue)
	c.active(blue)
	c.networkSays(n, v1alpha1.NetworkActive, "Active", "provider neutron")
	space := c.space("blue", "web")
	host, _ := cloud.Node(1)
	c.create(&corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: host}})
	pod := podOf("web", "p")
	c.create(pod)
	begun := time.Now()
	port := c.port(n, "10.0.0.5", pod, host)
	c.says(port, func() []metav1.Condition { return port.Status.Conditions }, "Ready", "True", "Active", "")
	t.Logf("port: %s after %s", port.Status.ProviderPortID, time.Since(begun).Round(time.Millisecond))

	t.Run("floating", func(t *testing.T) {
		f := &v1alpha1.FloatingIP{ObjectMeta: metav1.ObjectMeta{Namespace: "tenant-blue", Name: "f"}}
		f.Spec.Pod = &v1alpha1.PodName{Namespace: "web", Name: "p"}
		c.create(f)
		c.says(f, func() []metav1.Condition { return f.Status.Conditions }, "Ready", "True", "Active", "leads to 10.0.0.5")
		if !strings.HasPrefix(f.Status.Address, "172.24.4.") {
			t.Errorf("%+v", f.Status)
		}
		c.delete(f)
		c.gone(f)
	})
	t.Run("octavia", func(t *testing.T) {
		o, err := openstack.New(openstack.Options{File: cloud.ConfigFile(), Name: "admin", Transport: transport})
		if err != nil {
			t.Fatal(err)
		}
		lb, err := o.Client(t.Context(), openstack.LoadBalancer, "")
		if err != nil {
			t.Skipf("no Octavia here: %v", err)
		}
		tcp := corev1.ProtocolTCP
		slice := &discoveryv1.EndpointSlice{
			ObjectMeta:  metav1.ObjectMeta{Namespace: "web", Name: "s-1", Labels: map[string]string{discoveryv1.LabelServiceName: "s"}},
			AddressType: discoveryv1.AddressTypeIPv4, Ports: []discoveryv1.EndpointPort{{Name: ptr.To("a"), Port: ptr.To(int32(8080)), Protocol: &tcp}},
			Endpoints: []discoveryv1.Endpoint{{Addresses: []string{"10.0.0.5"}}},
		}
		c.create(slice)
		s := serviceOf("web", "s")
		s.Spec.LoadBalancerClass, s.Annotations = ptr.To(octavia.Class), map[string]string{octavia.AnnotationInternal: "true"}
		c.create(s)
		c.eventually("address", func() error {
			if err := c.get(s); err != nil || len(s.Status.LoadBalancer.Ingress) != 1 {
				return fmt.Errorf("%v %+v", err, s.Status)
			}
			return nil
		})
		query := url.Values{}
		for _, b := range listOf(t, lb, "loadbalancers", nil) {
			if d, _ := b["description"].(string); strings.Contains(d, string(s.UID)) {
				query.Set("loadbalancer_id", b["id"].(string))
			}
		}
		state := func() string {
			text := ""
			for _, l := range listOf(t, lb, "listeners", nil) {
				if !strings.Contains(fmt.Sprint(l["loadbalancers"]), query.Get("loadbalancer_id")) {
					continue
				}
				text += fmt.Sprint(l["protocol"], " ", l["protocol_port"], " ", l["allowed_cidrs"], ": ")
				id, _ := l["default_pool_id"].(string)
				if id == "" {
					continue
				}
				all, err := openstack.List[map[string]any](t.Context(), lb, openstack.Collection{Path: "lbaas/pools/" + id + "/members", Key: "members"}, nil)
				if err != nil {
					return err.Error()
				}
				for _, m := range all {
					text += fmt.Sprint(m["address"], " ", m["protocol_port"], " ")
				}
			}
			return text
		}
		is := func(want ...string) {
			t.Helper()
			c.eventually("load balancer", func() error {
				got := state()
				for _, w := range want {
					if !strings.Contains(got, w) {
						return fmt.Errorf("%q lacks %q", got, w)
					}
				}
				return nil
			})
		}
		is("TCP 80 <nil>: 10.0.0.5 8080", "UDP 53 <nil>: ")
		c.update(slice, func() {
			slice.Endpoints = append(slice.Endpoints, discoveryv1.Endpoint{Addresses: []string{"10.0.0.6"}})
		})
		is("10.0.0.6 8080")
		c.update(s, func() {
			s.Spec.Ports = append(s.Spec.Ports[:1], corev1.ServicePort{Name: "c", Port: 443})
			s.Spec.LoadBalancerSourceRanges = []string{"198.51.100.0/24"}
			s.Spec.SessionAffinity = corev1.ServiceAffinityClientIP
		})
		is("TCP 80 [198.51.100.0/24]: ", "TCP 443 [198.51.100.0/24]: ")
		c.eventually("sticky", func() error {
			for _, p := range listOf(t, lb, "pools", query) {
				if p["session_persistence"] == nil {
					return fmt.Errorf("%v", p)
				}
			}
			if strings.Contains(state(), "UDP") {
				return fmt.Errorf("%s", state())
			}
			return nil
		})
		// Without a class it is Octavia's too.
		plain := serviceOf("web", "plain")
		plain.Annotations = map[string]string{octavia.AnnotationInternal: "true"}
		c.create(plain)
		c.eventually("address of one without a class", func() error {
			if err := c.get(plain); err != nil || len(plain.Status.LoadBalancer.Ingress) != 1 {
				return fmt.Errorf("%v %+v", err, plain.Status)
			}
			for _, b := range listOf(t, lb, "loadbalancers", nil) {
				if d, _ := b["description"].(string); strings.Contains(d, string(plain.UID)) {
					return nil
				}
			}
			return fmt.Errorf("no load balancer of Octavia's")
		})
		c.delete(plain)
		c.gone(plain)
		c.delete(s)
		c.gone(s)
		for _, b := range listOf(t, lb, "loadbalancers", nil) {
			if d, _ := b["description"].(string); strings.Contains(d, string(s.UID)) && b["provisioning_status"] != "DELETED" {
				t.Errorf("left: %v", b)
			}
		}
	})
	c.delete(pod)
	c.gone(port)
	c.delete(space)
	c.gone(space)
	c.delete(n)
	c.gone(n)
	if n.Status.ProviderNetworkID != "" {
		o, err := openstack.New(openstack.Options{File: cloud.ConfigFile(), Name: "admin", Transport: transport})
		if err != nil {
			t.Fatal(err)
		}
		client, err := o.Client(context.Background(), openstack.Network, "")
		if err != nil {
			t.Fatal(err)
		}
		left, err := openstack.Get[map[string]any](context.Background(), client, openstack.Collection{Path: "networks", One: "network"}, n.Status.ProviderNetworkID)
		if err != nil || left != nil {
			t.Errorf("left: %v %v", left, err)
		}
	}
}

// leave removes what a test that failed left in the cloud.
func (c *cluster) leave(transport *http.Transport, project string, n *v1alpha1.Network) {
	if !c.t.Failed() {
		return
	}
	c.stop()
	cloud, err := openstack.New(openstack.Options{File: filepath.Join(os.Getenv("H8S_OPENSTACK"), "clouds.yaml"), Name: "admin", Transport: transport})
	if err != nil {
		c.t.Error(err)
		return
	}
	ctx, cancel := context.WithTimeout(context.Background(), 2*time.Minute)
	defer cancel()
	ns := &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: metav1.NamespaceSystem}}
	if err := c.get(ns); err != nil {
		c.t.Error(err)
		return
	}
	if lb, err := cloud.Client(ctx, openstack.LoadBalancer, ""); err == nil {
		balancers := openstack.Collection{Path: "lbaas/loadbalancers", Key: "loadbalancers"}
		all, _ := openstack.List[map[string]any](ctx, lb, balancers, nil)
		for _, b := range all {
			if d, _ := b["description"].(string); strings.Contains(d, string(ns.UID)) {
				_ = openstack.Remove(ctx, lb, balancers, b["id"].(string), url.Values{"cascade": {"true"}})
			}
		}
	}
	p := neutron.New(neutron.Options{Cloud: cloud, Cluster: string(ns.UID), Projects: func(context.Context, string) (string, error) { return project, nil }})
	if err := p.Release(ctx, n); err != nil {
		c.t.Error(err)
	}
}

func listOf(t *testing.T, c *openstack.Client, kind string, q url.Values) []map[string]any {
	all, err := openstack.List[map[string]any](t.Context(), c, openstack.Collection{Path: "lbaas/" + kind, Key: kind}, q)
	if err != nil {
		t.Log(err)
	}
	return all
}
