package controller

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"fmt"
	"net/netip"
	"strings"
	"testing"

	certificatesv1 "k8s.io/api/certificates/v1"
	coordinationv1 "k8s.io/api/coordination/v1"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/utils/ptr"
	"sigs.k8s.io/controller-runtime/pkg/client"

	v1alpha1 "github.com/hypernetes/hypernetes/api/hypernetes/v1alpha1"
	"github.com/hypernetes/hypernetes/network/claim"
	"github.com/hypernetes/hypernetes/test/controlplane"
)

func poolOf(name string, quarantine int32, tenants []string, addresses ...string) *v1alpha1.AddressPool {
	return &v1alpha1.AddressPool{ObjectMeta: metav1.ObjectMeta{Name: name},
		Spec: v1alpha1.AddressPoolSpec{Addresses: addresses, Tenants: tenants, QuarantineSeconds: &quarantine}}
}

func (c *cluster) pool(p *v1alpha1.AddressPool) *v1alpha1.AddressPool {
	c.t.Helper()
	c.create(p)
	c.says(p, func() []metav1.Condition { return p.Status.Conditions }, "Ready", "True", "Ready", "")
	return p
}

func serviceOf(namespace, name string) *corev1.Service {
	return &corev1.Service{ObjectMeta: metav1.ObjectMeta{Namespace: namespace, Name: name}, Spec: corev1.ServiceSpec{
		Type: corev1.ServiceTypeLoadBalancer, AllocateLoadBalancerNodePorts: ptr.To(false),
		Ports: []corev1.ServicePort{{Name: "a", Port: 80}, {Name: "b", Port: 53, Protocol: corev1.ProtocolUDP}},
	}}
}

// ingress waits until a Service has just this address, "" for none.
func (c *cluster) ingress(s *corev1.Service, want string) {
	c.t.Helper()
	c.eventually("address of "+s.Name, func() error {
		if err := c.get(s); err != nil {
			return err
		}
		in := s.Status.LoadBalancer.Ingress
		if want == "" && len(in) == 0 || len(in) == 1 && in[0].IP == want {
			return nil
		}
		return fmt.Errorf("%+v, want %q", in, want)
	})
	if want == "" {
		return
	}
	l := &coordinationv1.Lease{ObjectMeta: metav1.ObjectMeta{Namespace: "h8s-system", Name: claim.AddressName(netip.MustParseAddr(want))}}
	if err := c.get(l); err != nil || l.Spec.HolderIdentity == nil || *l.Spec.HolderIdentity != claim.OwnerOf("Service", s).String() {
		c.t.Errorf("the claim of %s: %v %+v", want, err, l.Spec)
	}
}

func TestAddresses(t *testing.T) {
	c := start(t)
	blue := tenantOf("blue")
	blue.Spec.Quota.LoadBalancers = ptr.To(int32(2))
	c.create(blue)
	c.active(blue)
	c.tenant("red")
	c.space("blue", "web")
	c.space("red", "shop")
	c.create(namespaceOf("ops"))
	free := c.pool(poolOf("all", 0, nil, "192.0.2.10-192.0.2.13"))
	reds := c.pool(poolOf("reds", 3600, []string{"red"}, "198.51.100.0/30"))

	t.Run("services", func(t *testing.T) {
		a, b := serviceOf("web", "a"), serviceOf("web", "b")
		c.create(a)
		c.ingress(a, "192.0.2.10")
		c.event(a, "AddressAllocated")
		b.Annotations = map[string]string{"hypernetes.io/address": "192.0.2.12"}
		c.create(b)
		c.ingress(b, "192.0.2.12")
		if b.Status.LoadBalancer.Ingress[0].IPMode == nil {
			t.Error("no ipMode")
		}

		over := serviceOf("web", "over")
		c.create(over)
		c.event(over, "QuotaExceeded")
		c.ingress(over, "")
		c.delete(over)

		for name, x := range map[string]struct {
			change func(*corev1.Service)
			reason string
		}{
			"others-pool": {func(s *corev1.Service) { s.Annotations["hypernetes.io/pool"] = "reds" }, "NoPool"},
			"no-pool":     {func(s *corev1.Service) { s.Annotations["hypernetes.io/pool"] = "none" }, "NoPool"},
			"outside":     {func(s *corev1.Service) { s.Spec.LoadBalancerIP = "203.0.113.9" }, "AddressNotInPool"},
			"reds-addr":   {func(s *corev1.Service) { s.Annotations["hypernetes.io/address"] = "198.51.100.1" }, "AddressNotInPool"},
			"taken":       {func(s *corev1.Service) { s.Annotations["hypernetes.io/address"] = "192.0.2.10" }, "AddressInUse"},
			"nonsense":    {func(s *corev1.Service) { s.Annotations["hypernetes.io/address"] = "elsewhere" }, "Invalid"},
			"local":       {func(s *corev1.Service) { s.Spec.ExternalTrafficPolicy = corev1.ServiceExternalTrafficPolicyLocal }, "Invalid"},
			"family":      {func(s *corev1.Service) { s.Annotations["hypernetes.io/address"] = "2001:db8::1" }, "Invalid"},
		} {
			s := serviceOf("ops", name)
			s.Annotations = map[string]string{}
			x.change(s)
			c.create(s)
			c.event(s, x.reason)
			c.ingress(s, "")
			c.delete(s)
		}

		// What somebody writes into the status does not stay.
		a.Status.LoadBalancer.Ingress = []corev1.LoadBalancerIngress{{IP: "192.0.2.12"}}
		if err := c.admin.Status().Update(t.Context(), a); err != nil {
			t.Fatal(err)
		}
		c.ingress(a, "192.0.2.10")
		// A claim that is lost is made again.
		c.delete(&coordinationv1.Lease{ObjectMeta: metav1.ObjectMeta{Namespace: "h8s-system", Name: "address-192-0-2-10"}})
		c.eventually("claimed again", func() error {
			return c.get(&coordinationv1.Lease{ObjectMeta: metav1.ObjectMeta{Namespace: "h8s-system", Name: "address-192-0-2-10"}})
		})
		c.ingress(a, "192.0.2.10")

		c.update(b, func() { b.Annotations["hypernetes.io/address"] = "192.0.2.13" })
		c.ingress(b, "192.0.2.13")
		c.gone(&coordinationv1.Lease{ObjectMeta: metav1.ObjectMeta{Namespace: "h8s-system", Name: "address-192-0-2-12"}})
		c.update(b, func() { b.Spec.Type = corev1.ServiceTypeClusterIP })
		c.ingress(b, "")
		c.gone(&coordinationv1.Lease{ObjectMeta: metav1.ObjectMeta{Namespace: "h8s-system", Name: "address-192-0-2-13"}})

		// A Service that goes while nobody looks.
		c.stop()
		c.delete(a)
		c.run()
		c.gone(&coordinationv1.Lease{ObjectMeta: metav1.ObjectMeta{Namespace: "h8s-system", Name: "address-192-0-2-10"}})

		foreign := serviceOf("web", "foreign")
		foreign.Spec.LoadBalancerClass = ptr.To("example.com/other")
		c.create(foreign)
		mine := serviceOf("web", "mine")
		mine.Spec.LoadBalancerClass = ptr.To("hypernetes.io/pool")
		c.create(mine)
		c.ingress(mine, "192.0.2.10")
		c.ingress(foreign, "")
		c.delete(mine, foreign)

		// Every address taken; the next one freed goes to who waits.
		var all []*corev1.Service
		for i := range 4 {
			s := serviceOf("ops", fmt.Sprint("s", i))
			c.create(s)
			c.ingress(s, fmt.Sprint("192.0.2.", 10+i))
			all = append(all, s)
		}
		waits := serviceOf("ops", "waits")
		c.create(waits)
		c.event(waits, "PoolExhausted")
		c.eventually("free", func() error {
			if err := c.get(free); err != nil || free.Status.Free != 0 || free.Status.Total != 4 {
				return fmt.Errorf("%v %+v", err, free.Status)
			}
			return nil
		})
		c.delete(all[2])
		c.ingress(waits, "192.0.2.12")
		c.delete(all[0], all[1], all[3], waits)
		c.eventually("all free", func() error {
			if err := c.get(free); err != nil || free.Status.Free != 4 {
				return fmt.Errorf("%v %+v", err, free.Status)
			}
			return nil
		})
	})

	floating := func(tenant, name string) *v1alpha1.FloatingIP {
		return &v1alpha1.FloatingIP{ObjectMeta: metav1.ObjectMeta{Namespace: v1alpha1.Home(tenant), Name: name}}
	}
	says := func(f *v1alpha1.FloatingIP, phase, reason, text string) {
		t.Helper()
		status := metav1.ConditionFalse
		if reason == "Active" {
			status = metav1.ConditionTrue
		}
		c.says(f, func() []metav1.Condition { return f.Status.Conditions }, "Ready", status, reason, text)
		if f.Status.Phase != phase {
			t.Errorf("phase %s, want %s", f.Status.Phase, phase)
		}
	}
	t.Run("floating", func(t *testing.T) {
		n := networkOf("blue", "default", "")
		c.networkSays(n, v1alpha1.NetworkActive, "Active", "")
		for _, node := range []string{"n1", "n2"} {
			c.create(&corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: node}})
		}
		f := floating("blue", "f")
		f.Spec.Pod = &v1alpha1.PodName{Namespace: "web", Name: "p"}
		c.create(f)
		says(f, "Held", "PodNotFound", "there is no Pod p in namespace web")
		if f.Status.Address != "192.0.2.10" || f.Status.Pool != "all" {
			t.Errorf("%+v", f.Status)
		}
		pod := podOf("web", "p")
		c.create(pod)
		says(f, "Held", "PodNotPlugged", "")
		c.port(n, "10.0.0.2", pod, "n1")
		says(f, "Active", "Active", "192.0.2.10 leads to 10.0.0.2 on node n1")
		second := floating("blue", "g")
		second.Spec.Port = "default.10-0-0-2"
		c.create(second)
		says(second, "Held", "TargetTaken", "FloatingIP f")
		c.update(f, func() { f.Spec.Pod = nil })
		says(f, "Held", "NoTarget", "")
		says(second, "Active", "Active", "leads to 10.0.0.2")
		c.update(f, func() { f.Spec.Pod = &v1alpha1.PodName{Namespace: "web", Name: "p"} })
		says(f, "Held", "TargetTaken", "FloatingIP g")
		c.delete(second)
		c.gone(second)
		says(f, "Active", "Active", "192.0.2.10 leads to 10.0.0.2 on node n1")
		// The Pod is made anew elsewhere: the address moves with it.
		c.delete(pod)
		says(f, "Held", "PodNotFound", "")
		if f.Status.Target != "" || f.Status.Node != "" {
			t.Errorf("%+v", f.Status)
		}
		pod = podOf("web", "p")
		c.create(pod)
		c.port(n, "10.0.0.7", pod, "n2")
		says(f, "Active", "Active", "192.0.2.10 leads to 10.0.0.7 on node n2")

		// Nobody reaches into another tenant.
		thief := floating("red", "thief")
		thief.Spec = v1alpha1.FloatingIPSpec{Pool: "reds", Pod: &v1alpha1.PodName{Namespace: "web", Name: "p"}}
		c.create(thief)
		says(thief, "Held", "NotYours", "web is not a namespace of this tenant")
		intruder := floating("blue", "intruder")
		intruder.Spec.Address = "198.51.100.1"
		c.create(intruder)
		says(intruder, "Pending", "AddressNotInPool", "no AddressPool you may use")
		ambiguous := floating("red", "ambiguous")
		c.create(ambiguous)
		says(ambiguous, "Pending", "PoolAmbiguous", "choose one of all, reds")
		c.delete(intruder, ambiguous)

		// An address is kept back from others, not from who had it.
		address := thief.Status.Address
		c.delete(thief)
		c.gone(thief)
		l := &coordinationv1.Lease{ObjectMeta: metav1.ObjectMeta{Namespace: "h8s-system", Name: claim.AddressName(netip.MustParseAddr(address))}}
		if err := c.get(l); err != nil || l.Spec.HolderIdentity != nil || *l.Spec.LeaseDurationSeconds != 3600 {
			t.Errorf("%v %+v", err, l.Spec)
		}
		next := floating("red", "next")
		next.Spec.Pool = "reds"
		c.create(next)
		says(next, "Held", "NoTarget", "name spec.port or spec.pod")
		if next.Status.Address == address {
			t.Errorf("%s is given away again at once", address)
		}
		back := floating("red", "back")
		back.Spec.Address = address
		c.create(back)
		says(back, "Held", "NoTarget", "")
		none := floating("red", "none")
		none.Spec.Pool = "reds"
		c.create(none)
		says(none, "Pending", "PoolExhausted", "no free address")

		// The pool shrinks and goes under its users.
		c.update(reds, func() { reds.Spec.Addresses = []string{next.Status.Address} })
		c.says(reds, func() []metav1.Condition { return reds.Status.Conditions }, "AddressesOutside", "True", "InUseOutside", address)
		if reds.Status.Total != 1 || reds.Status.Free != 0 {
			t.Errorf("%+v", reds.Status)
		}
		c.delete(reds)
		c.says(reds, func() []metav1.Condition { return reds.Status.Conditions }, v1alpha1.ConditionBlocked, "True", "InUse", next.Status.Address)
		c.delete(next, back, none)
		c.gone(reds)
	})

	t.Run("bad pools", func(t *testing.T) {
		for name, x := range map[string]struct{ addresses, reason, text string }{
			"services": {"10.96.0.0/24", "Invalid", "Service range"},
			"local":    {"127.0.0.1", "Invalid", "127.0.0.0/8"},
			"overlaps": {"192.0.2.12-192.0.2.40", "Overlap", "AddressPool all"},
			"reversed": {"192.0.2.60-192.0.2.50", "Invalid", "ends before it begins"},
		} {
			p := poolOf(name, 1, nil, x.addresses)
			c.create(p)
			c.says(p, func() []metav1.Condition { return p.Status.Conditions }, "Ready", "False", x.reason, x.text)
			c.delete(p)
			c.gone(p)
		}
		for _, bad := range []string{"", "x", "192.0.2.0/33", "a-b"} {
			if err := c.admin.Create(t.Context(), poolOf("bad", 1, nil, bad)); !apierrors.IsInvalid(err) {
				t.Errorf("%q: %v", bad, err)
			}
		}
	})

	t.Run("certificates", func(t *testing.T) {
		key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
		if err != nil {
			t.Fatal(err)
		}
		for name, x := range map[string]struct {
			user, group, cn, org string
			want                 certificatesv1.RequestConditionType
			reason               string
		}{
			"own":     {"blue:ann", "h8s:tenant:blue:manager", "blue:bob", "h8s:tenant:blue:member", certificatesv1.CertificateApproved, "TenantUser"},
			"foreign": {"blue:ann", "h8s:tenant:blue:manager", "red:bob", "h8s:tenant:red:member", certificatesv1.CertificateDenied, "NotManager"},
			"admin":   {"admin", "system:masters", "red:bob", "h8s:tenant:red:manager", certificatesv1.CertificateApproved, "TenantUser"},
			// The API server itself refuses system:masters in O.
			"node": {"blue:ann", "h8s:tenant:blue:manager", "system:node:n1", "system:nodes", certificatesv1.CertificateDenied, "Subject"},
		} {
			der, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{Subject: pkix.Name{CommonName: x.cn, Organization: []string{x.org}}}, key)
			if err != nil {
				t.Fatal(err)
			}
			user, err := client.New(controlplane.As(c.cfg, x.user, x.group, "system:authenticated"), client.Options{Scheme: controlplane.Scheme()})
			if err != nil {
				t.Fatal(err)
			}
			r := &certificatesv1.CertificateSigningRequest{ObjectMeta: metav1.ObjectMeta{Name: name}, Spec: certificatesv1.CertificateSigningRequestSpec{
				Request: pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE REQUEST", Bytes: der}), SignerName: certificatesv1.KubeAPIServerClientSignerName,
				Usages: []certificatesv1.KeyUsage{certificatesv1.UsageClientAuth}, ExpirationSeconds: ptr.To(int32(86400)),
			}}
			if err := user.Create(t.Context(), r); err != nil {
				t.Fatal(err)
			}
			c.eventually("decision "+name, func() error {
				if err := user.Get(t.Context(), client.ObjectKeyFromObject(r), r); err != nil {
					return err
				}
				if len(r.Status.Conditions) != 1 || r.Status.Conditions[0].Type != x.want || r.Status.Conditions[0].Reason != x.reason {
					return fmt.Errorf("%+v", r.Status.Conditions)
				}
				return nil
			})
		}
	})
}

func TestFlags(t *testing.T) {
	for name, args := range map[string][]string{
		"kubeconfig":      {},
		"service-cidrs":   {"--kubeconfig=x", "--webhook-address=", "--service-cidrs=x"},
		"reserved-cidrs":  {"--kubeconfig=x", "--webhook-address=", "--reserved-cidrs=10.0.0.0"},
		"webhook-cert":    {"--kubeconfig=x"},
		"webhook-address": {"--kubeconfig=x", "--webhook-address=nowhere"},
		"health-address":  {"--kubeconfig=x", "--webhook-address=", "--health-address=1"},
		"fabric-mtu":      {"--kubeconfig=x", "--webhook-address=", "--fabric-mtu=20"},
		"argument":        {"--kubeconfig=x", "start"},
	} {
		if _, err := Flags(args, t.Output()); err == nil {
			t.Errorf("%s: no error", name)
		} else if got := err.Error(); !strings.Contains(got, name) {
			t.Errorf("%q does not name %s", got, name)
		}
	}
	if _, err := Flags([]string{"--kubeconfig=x", "--webhook-address="}, t.Output()); err != nil {
		t.Error(err)
	}
}
