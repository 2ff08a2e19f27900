package admission

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"net/netip"
	"strings"
	"testing"

	authenticationv1 "k8s.io/api/authentication/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/util/intstr"

	v1alpha1 "github.com/hypernetes/hypernetes/api/hypernetes/v1alpha1"
	"github.com/hypernetes/hypernetes/network/probe"
)

// expect checks that err is a refusal that says everything of says, or nil if it is empty.
func expect(t *testing.T, err error, says ...string) {
	t.Helper()
	if len(says) == 0 {
		if err != nil {
			t.Errorf("refused: %v", err)
		}
		return
	}
	var no refusal
	if !errors.As(err, &no) {
		t.Fatalf("got %v, want a refusal", err)
	}
	for _, s := range says {
		if !strings.Contains(no.message, s) {
			t.Errorf("%q does not say %q", no.message, s)
		}
	}
}

func blue() *v1alpha1.Tenant {
	return &v1alpha1.Tenant{ObjectMeta: metav1.ObjectMeta{Name: "blue"}, Spec: v1alpha1.TenantSpec{
		RuntimeClasses: []string{"hyper", "runc"},
		Keystone:       &v1alpha1.KeystoneProject{ProjectID: "065f210a2ca9442aad898ab129426350"},
	}}
}

func TestCheckNetwork(t *testing.T) {
	for _, tt := range []struct {
		name string
		spec v1alpha1.NetworkSpec
		says []string
	}{
		{name: "fine", spec: v1alpha1.NetworkSpec{}},
		{name: "own name", spec: v1alpha1.NetworkSpec{TenantID: "blue"}},
		{name: "own project, as in the seed", spec: v1alpha1.NetworkSpec{TenantID: "065f210a2ca9442aad898ab129426350"}},
		{name: "another tenant", spec: v1alpha1.NetworkSpec{TenantID: "red"}, says: []string{"spec.tenantID: red", "tenant blue", "leave it out"}},
		{name: "provider", spec: v1alpha1.NetworkSpec{Provider: "neutron"}, says: []string{"spec.provider: neutron", "builtin"}},
		{name: "reserved", spec: v1alpha1.NetworkSpec{Subnets: map[string]v1alpha1.Subnet{"a": {CIDR: "100.64.0.0/16"}}}, says: []string{"spec.subnets[a].cidr", "100.64.0.0/24", "choose another"}},
		{name: "gateway outside", spec: v1alpha1.NetworkSpec{Subnets: map[string]v1alpha1.Subnet{"a": {CIDR: "10.1.0.0/24", Gateway: "10.2.0.1"}}}, says: []string{"spec.subnets[a].gateway", "10.2.0.1"}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			n := &v1alpha1.Network{ObjectMeta: metav1.ObjectMeta{Name: "n", Namespace: "tenant-blue"}, Spec: tt.spec}
			if n.Spec.Subnets == nil {
				n.Spec.Subnets = map[string]v1alpha1.Subnet{"a": {CIDR: "192.168.0.0/24"}}
			}
			expect(t, checkNetwork(n, blue(), testOptions()), tt.says...)
		})
	}
}

func TestCheckProject(t *testing.T) {
	usurper, red := blue(), v1alpha1.Tenant{ObjectMeta: metav1.ObjectMeta{Name: "red"}}
	usurper.Name = "usurper"
	expect(t, checkProject(blue(), []v1alpha1.Tenant{*blue(), red}))
	expect(t, checkProject(usurper, []v1alpha1.Tenant{red, *blue()}), "spec.keystone.projectID: 065f210a2ca9442aad898ab129426350", "tenant blue", "name another")
}

func TestCheckUnused(t *testing.T) {
	ns := v1alpha1.TenantNamespace{ObjectMeta: metav1.ObjectMeta{Name: "web"}, Spec: v1alpha1.TenantNamespaceSpec{Network: "net1"}}
	used := v1alpha1.Port{ObjectMeta: metav1.ObjectMeta{Name: "net1.10-0-0-2"}, Spec: v1alpha1.PortSpec{Network: "net1", Pod: &v1alpha1.PodRef{Namespace: "web", Name: "nginx"}}}
	claimed := v1alpha1.Port{ObjectMeta: metav1.ObjectMeta{Name: "net1.10-0-0-3"}, Spec: v1alpha1.PortSpec{Network: "net1"}}
	expect(t, checkUnused("net1", []v1alpha1.TenantNamespace{ns}, []v1alpha1.Port{used, claimed}),
		"network net1", "namespace web", "Pod web/nginx", "port net1.10-0-0-3", "delete these first")
	expect(t, checkUnused("net2", []v1alpha1.TenantNamespace{ns}, []v1alpha1.Port{used, claimed}))
	var many []v1alpha1.Port
	for i := range 500 {
		p := claimed
		p.Name = fmt.Sprintf("net1.10-0-1-%d", i)
		many = append(many, p)
	}
	err := checkUnused("net1", []v1alpha1.TenantNamespace{ns}, many)
	expect(t, err, "and 491 more")
	if len(err.Error()) > 1000 {
		t.Errorf("%d bytes", len(err.Error()))
	}
}

func TestCheckQuota(t *testing.T) {
	expect(t, checkQuota("networks", "Networks", 4, nil, 5, blue()))
	expect(t, checkQuota("networks", "Networks", 5, nil, 5, blue()), "5 of 5 Networks", "spec.quota.networks")
	expect(t, checkQuota("networks", "Networks", 0, new(int32(0)), 5, blue()), "0 of 0")
}

func TestShapePod(t *testing.T) {
	probed := func(p *corev1.Pod) {
		p.Spec.Containers[0].LivenessProbe = &corev1.Probe{ProbeHandler: corev1.ProbeHandler{HTTPGet: &corev1.HTTPGetAction{Port: intstr.FromInt32(80)}}}
	}
	for _, tt := range []struct {
		name, class, becomes string
		change               func(*corev1.Pod)
		tenant               func(*v1alpha1.Tenant)
		says                 []string
	}{
		{name: "none", becomes: "hyper"},
		{name: "allowed", class: "runc", becomes: "runc"},
		{name: "other", class: "gvisor", says: []string{"spec.runtimeClassName: gvisor", "hyper, runc"}},
		{name: "no class at all", tenant: func(t *v1alpha1.Tenant) { t.Spec.RuntimeClasses = nil }, says: []string{"spec.runtimeClassName", "spec.runtimeClasses"}},
		{name: "probe rewritten", becomes: "hyper", change: probed},
		{name: "probe of runc", class: "runc", change: probed, says: []string{"spec.containers[0].livenessProbe.httpGet", "exec probe"}},
		{name: "probe of another host", change: func(p *corev1.Pod) {
			probed(p)
			p.Spec.Containers[0].LivenessProbe.HTTPGet.Host = "10.0.0.1"
		}, says: []string{"host"}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			p := &corev1.Pod{Spec: corev1.PodSpec{Containers: []corev1.Container{{Name: "c"}}}}
			if tt.class != "" {
				p.Spec.RuntimeClassName = &tt.class
			}
			if tt.change != nil {
				tt.change(p)
			}
			tenant := blue()
			if tt.tenant != nil {
				tt.tenant(tenant)
			}
			expect(t, shapePod(p, tenant, probe.Rewrite), tt.says...)
			if tt.says != nil {
				return
			}
			if *p.Spec.RuntimeClassName != tt.becomes {
				t.Errorf("class %s, want %s", *p.Spec.RuntimeClassName, tt.becomes)
			}
			if len(probe.Network(p)) > 0 {
				t.Errorf("network probes are left: %v", probe.Network(p))
			}
		})
	}
}

func TestParseNetworks(t *testing.T) {
	for _, tt := range []struct {
		text string
		says []string
	}{
		{text: `[]`},
		{text: `[{"name":"a"},{"name":"a","interface":"sig0","addresses":["10.0.0.2"]}]`},
		{text: ``, says: []string{"hypernetes.io/networks", "JSON list"}},
		{text: `{}`, says: []string{"JSON list"}},
		{text: `[] []`, says: []string{"text after"}},
		{text: `[{"name":"a","mac":"x"}]`, says: []string{"mac"}},
		{text: `[{"interface":"x"}]`, says: []string{"[0].name"}},
		{text: `[{"name":"a","interface":"eth0"}]`, says: []string{"[0].interface: eth0"}},
		{text: `[{"name":"a","interface":"net2"},{"name":"b"}]`, says: []string{"[1].interface: net2"}},
		{text: `[{"name":"a","interface":"../x"}]`, says: []string{"[0].interface", "../x"}},
		{text: "[" + strings.Repeat(`{"name":"a"},`, 7) + `{"name":"a"}]`, says: []string{"at most 8 NICs"}},
		{text: strings.Repeat(" ", maxRequest+1), says: []string{"at most 4096"}},
	} {
		_, err := parseNetworks(tt.text)
		expect(t, err, tt.says...)
	}
}

func FuzzParseNetworks(f *testing.F) {
	f.Add(`[{"name":"a","interface":"sig0","addresses":["10.0.0.2"]}]`)
	f.Add(`[[[[[`)
	f.Fuzz(func(t *testing.T, text string) {
		requests, err := parseNetworks(text)
		if err == nil && len(requests) >= maxNICs {
			t.Errorf("%d NICs", len(requests)+1)
		}
		if _, err := json.Marshal(requests); err != nil {
			t.Error(err)
		}
	})
}

func TestCheckAddresses(t *testing.T) {
	n := &v1alpha1.Network{ObjectMeta: metav1.ObjectMeta{Name: "n"}, Spec: v1alpha1.NetworkSpec{Subnets: map[string]v1alpha1.Subnet{
		"a": {CIDR: "10.0.0.0/24"}, "b": {CIDR: "fd00:1::/64", Gateway: "fd00:1::5"},
	}}}
	for _, tt := range []struct {
		addresses string
		says      []string
	}{
		{addresses: "10.0.0.2"},
		{addresses: "10.0.0.2,fd00:1::2"},
		{addresses: "10.0.0.2,10.0.0.3", says: []string{"10.0.0.3", "each family"}},
		{addresses: "10.0.0.1", says: []string{"gateway", "10.0.0.0/24"}},
		{addresses: "fd00:1::5", says: []string{"gateway"}},
		{addresses: "10.0.0.0", says: []string{"own address"}},
		{addresses: "10.0.0.255", says: []string{"broadcast"}},
		{addresses: "10.0.1.2", says: []string{"outside Network n", "10.0.0.0/24, fd00:1::/64"}},
		{addresses: "::ffff:10.0.0.2", says: []string{"want an IP address"}},
		{addresses: "fe80::1%eth0", says: []string{"want an IP address"}},
		{addresses: "x", says: []string{`"x"`}},
		{addresses: "10.0.0.2,fd00:1::2,10.0.0.3", says: []string{"3 addresses"}},
	} {
		t.Run(tt.addresses, func(t *testing.T) {
			expect(t, checkAddresses("at", strings.Split(tt.addresses, ","), n), tt.says...)
		})
	}
}

func pool(name string, tenants []string, addresses ...string) v1alpha1.AddressPool {
	return v1alpha1.AddressPool{ObjectMeta: metav1.ObjectMeta{Name: name}, Spec: v1alpha1.AddressPoolSpec{Addresses: addresses, Tenants: tenants}}
}

func TestCheckPool(t *testing.T) {
	others := []v1alpha1.AddressPool{pool("other", nil, "198.51.100.0/25")}
	nodes := []netip.Addr{netip.MustParseAddr("100.64.0.1")}
	for _, tt := range []struct {
		addresses string
		says      []string
	}{
		{addresses: "192.0.2.0/24"},
		{addresses: "192.0.2.10-192.0.2.20"},
		{addresses: "2001:db8::/120"},
		{addresses: "100.64.0.128/25"}, // the nodes' own network
		{addresses: "100.64.0.0/25", says: []string{"spec.addresses[0]: 100.64.0.0/25", "100.64.0.1 is a node's"}},
		{addresses: "10.244.7.0/24", says: []string{"10.244.0.0/16", "reserved"}},
		{addresses: "10.100.0.1", says: []string{"10.96.0.0/12", "Service range"}},
		{addresses: "198.51.100.100-198.51.100.200", says: []string{"198.51.100.0/25 of AddressPool other"}},
		{addresses: "192.0.2.0/24,192.0.2.9", says: []string{"spec.addresses[1]", "overlaps with spec.addresses[0]"}},
		{addresses: "192.0.2.20-192.0.2.10", says: []string{"ends before it begins"}},
		{addresses: "192.0.2.20-2001:db8::1", says: []string{"ends before"}},
		{addresses: "0.0.0.0/0", says: []string{"node's"}},
		{addresses: "224.0.0.0/8", says: []string{"no address of a host"}},
		{addresses: "x", says: []string{"spec.addresses[0]: x"}},
	} {
		t.Run(tt.addresses, func(t *testing.T) {
			p := pool("mine", nil, strings.Split(tt.addresses, ",")...)
			expect(t, checkPool(&p, append(others, p), nodes, testOptions()), tt.says...)
		})
	}
}

func FuzzParseSpan(f *testing.F) {
	for _, s := range []string{"192.0.2.0/24", "192.0.2.1-192.0.2.9", "::/0", "fe80::1%x"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, text string) {
		s, err := parseSpan(text)
		if err == nil && (!s.contains(s.first) || !s.contains(s.last) || !s.overlaps(s)) {
			t.Errorf("%q: %v", text, s)
		}
	})
}

func TestCheckFloatingIP(t *testing.T) {
	pools := []v1alpha1.AddressPool{pool("public", nil, "192.0.2.0/24"), pool("blue", []string{"blue"}, "198.51.100.1-198.51.100.9"), pool("red", []string{"red"}, "203.0.113.0/24")}
	for _, tt := range []struct {
		pool, address string
		pools         []v1alpha1.AddressPool
		says          []string
	}{
		{pools: pools},
		{pool: "blue", address: "198.51.100.3", pools: pools},
		{address: "198.51.100.3", pools: pools},
		{pool: "nowhere", pools: pools, says: []string{"spec.pool: nowhere", "public, blue"}},
		{pool: "red", pools: pools, says: []string{"spec.pool: red", "no such AddressPool", "public, blue"}},
		{address: "203.0.113.3", pools: pools, says: []string{"spec.address: 203.0.113.3", "192.0.2.0/24"}},
		{pool: "public", address: "198.51.100.3", pools: pools, says: []string{"spec.address"}},
		{pool: "x", says: []string{"ask the operator"}},
		{address: "192.0.2.1", says: []string{"ask the operator"}},
	} {
		t.Run(tt.pool+" "+tt.address, func(t *testing.T) {
			f := &v1alpha1.FloatingIP{Spec: v1alpha1.FloatingIPSpec{Pool: tt.pool, Address: tt.address}}
			err := checkFloatingIP(f, blue(), tt.pools)
			expect(t, err, tt.says...)
			if err != nil && strings.Contains(err.Error(), "203.0.113.0/24") {
				t.Errorf("%v tells of another tenant's pool", err)
			}
		})
	}
}

func TestCheckCertificate(t *testing.T) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	request := func(name string, organisations ...string) []byte {
		der, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{Subject: pkix.Name{CommonName: name, Organization: organisations}}, key)
		if err != nil {
			t.Fatal(err)
		}
		return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE REQUEST", Bytes: der})
	}
	const signer = "kubernetes.io/kube-apiserver-client"
	manager := []string{"h8s:tenant:blue:manager"}
	for _, tt := range []struct {
		name    string
		groups  []string
		signer  string
		request []byte
		says    []string
	}{
		{"member", manager, signer, request("blue:ann", "h8s:tenant:blue:member"), nil},
		{"no tenant's business", []string{"system:masters"}, "example.com/x", nil, nil},
		{"asked by a member", []string{"h8s:tenant:blue:member"}, signer, request("blue:ann", "h8s:tenant:blue:member"), []string{"managers"}},
		{"signer", manager, "kubernetes.io/kubelet-serving", nil, []string{"spec.signerName"}},
		{"another tenant", manager, signer, request("blue:ann", "h8s:tenant:red:member"), []string{"h8s:tenant:red:member", "h8s:tenant:blue:"}},
		{"one more", manager, signer, request("blue:ann", "h8s:tenant:blue:member", "system:masters"), []string{"system:masters"}},
		{"unknown role", manager, signer, request("blue:ann", "h8s:tenant:blue:admin"), []string{"h8s:tenant:blue:admin"}},
		{"controller", manager, signer, request("h8s:controller", "h8s:tenant:blue:member"), []string{"common name"}},
		{"prefix of a name", manager, signer, request("blueish:ann", "h8s:tenant:blue:member"), []string{"common name"}},
		{"nothing", manager, signer, request("blue:ann"), []string{"no organisation"}},
		{"two tenants", []string{"h8s:tenant:blue:manager", "h8s:tenant:red:member"}, signer, request("blue:ann", "h8s:tenant:blue:member"), []string{"blue and red"}},
		{"rubbish", manager, signer, []byte("x"), []string{"PEM"}},
		{"rubbish in PEM", manager, signer, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE REQUEST", Bytes: []byte("x")}), []string{"PKCS#10"}},
		{"two", manager, signer, append(request("blue:ann", "h8s:tenant:blue:member"), request("x", "system:masters")...), []string{"one PEM block"}},
		{"huge", manager, signer, make([]byte, maxCertificateRequest+1), []string{"at most"}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			expect(t, checkCertificate(authenticationv1.UserInfo{Groups: tt.groups}, tt.signer, tt.request), tt.says...)
		})
	}
}

func TestOptions(t *testing.T) {
	for _, address := range []string{"", "127.0.0.1", ":9643", "127.0.0.1:0", "127.0.0.1:x", "127.0.0.1:70000"} {
		o := testOptions()
		o.WebhookAddress = address
		if _, _, _, err := o.read(); err == nil || !strings.Contains(err.Error(), "want host:port") {
			t.Errorf("%q: %v", address, err)
		}
	}
}
