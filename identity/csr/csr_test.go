package csr

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"encoding/pem"
	"net"
	"net/netip"
	"net/url"
	"slices"
	"strings"
	"testing"

	certificatesv1 "k8s.io/api/certificates/v1"
)

var key, _ = ecdsa.GenerateKey(elliptic.P256(), rand.Reader)

func request(t *testing.T, template x509.CertificateRequest, signer any) []byte {
	t.Helper()
	der, err := x509.CreateCertificateRequest(rand.Reader, &template, signer)
	if err != nil {
		t.Fatal(err)
	}
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE REQUEST", Bytes: der})
}

func subjectOf(cn string, orgs ...string) x509.CertificateRequest {
	return x509.CertificateRequest{Subject: pkix.Name{CommonName: cn, Organization: orgs}}
}

var facts = Facts{
	Tenant: func(name string) ([]string, bool) {
		return map[string][]string{"blue": {"olga"}, "red": nil}[name], slices.Contains([]string{"blue", "red", "keystone", "system"}, name)
	},
	Node: func(name string) ([]string, bool) {
		switch name {
		case "n1":
			return []string{"192.0.2.1", "2001:db8::1", "10.96.0.1", "192.0.2.2"}, true
		case "new":
			return nil, true
		}
		return nil, false
	},
	Foreign: func(_ string, a netip.Addr) bool {
		return a == netip.MustParseAddr("10.96.0.1") || a == netip.MustParseAddr("192.0.2.2")
	},
}

func TestDecide(t *testing.T) {
	const clientSigner, servingSigner = certificatesv1.KubeAPIServerClientSignerName, certificatesv1.KubeletServingSignerName
	usages := func(u ...certificatesv1.KeyUsage) []certificatesv1.KeyUsage { return u }
	clientUse := usages(certificatesv1.UsageClientAuth, certificatesv1.UsageDigitalSignature)
	servingUse := usages(certificatesv1.UsageServerAuth, certificatesv1.UsageDigitalSignature)
	seconds := func(n int32) *int32 { return &n }
	weak, err := rsa.GenerateKey(rand.Reader, 1024)
	if err != nil {
		t.Fatal(err)
	}
	type spec = certificatesv1.CertificateSigningRequestSpec
	with := func(r x509.CertificateRequest, f func(*x509.CertificateRequest)) x509.CertificateRequest {
		f(&r)
		return r
	}
	manager := func(r x509.CertificateRequest) spec {
		return spec{Username: "blue:ann", Groups: []string{"h8s:tenant:blue:manager", "system:authenticated"}, SignerName: clientSigner, Usages: clientUse, Request: request(t, r, key)}
	}
	master := func(r x509.CertificateRequest) spec {
		s := manager(r)
		s.Username, s.Groups = "admin", []string{"system:masters", "system:authenticated"}
		return s
	}
	node := func(r x509.CertificateRequest) spec {
		s := manager(r)
		s.Username, s.Groups = "system:node:n1", []string{"system:nodes", "system:authenticated"}
		return s
	}
	serving := func(r x509.CertificateRequest) spec {
		s := node(r)
		s.SignerName, s.Usages = servingSigner, servingUse
		return s
	}
	change := func(s spec, f func(*spec)) spec { f(&s); return s }
	bob := subjectOf("blue:bob", "h8s:tenant:blue:member")
	n1 := with(subjectOf("system:node:n1", "system:nodes"), func(r *x509.CertificateRequest) {
		r.DNSNames, r.IPAddresses = []string{"n1"}, []net.IP{net.ParseIP("192.0.2.1"), net.ParseIP("2001:db8::1")}
	})

	for name, c := range map[string]struct {
		spec   spec
		answer Answer
		reason string
	}{
		"operator for a user":       {master(bob), Approve, "TenantUser"},
		"manager for a user":        {manager(bob), Approve, "TenantUser"},
		"manager for a manager":     {manager(subjectOf("blue:eve", "h8s:tenant:blue:manager")), Approve, "TenantUser"},
		"owner for a user":          {change(manager(bob), func(s *spec) { s.Username, s.Groups = "olga", []string{"system:authenticated"} }), Approve, "TenantUser"},
		"a day":                     {change(manager(bob), func(s *spec) { s.ExpirationSeconds = seconds(86400) }), Approve, "TenantUser"},
		"a year":                    {change(manager(bob), func(s *spec) { s.ExpirationSeconds = seconds(365 * 86400) }), Approve, "TenantUser"},
		"key encipherment":          {change(manager(bob), func(s *spec) { s.Usages = append(usages(certificatesv1.UsageKeyEncipherment), clientUse...) }), Approve, "TenantUser"},
		"kubestack":                 {node(subjectOf("h8s:kubestack:n1", "h8s:kubestacks")), Approve, "Kubestack"},
		"volume plugin":             {node(subjectOf("h8s:csi-node:n1", "h8s:csi-nodes")), Approve, "CSINode"},
		"kube-proxy":                {node(subjectOf("system:kube-proxy")), Approve, "KubeProxy"},
		"kube-proxy with its group": {node(subjectOf("system:kube-proxy", "system:node-proxier")), Approve, "KubeProxy"},
		"kubelet serving":           {serving(n1), Approve, "KubeletServing"},

		"a Keystone user asks":   {change(manager(bob), func(s *spec) { s.Username = "keystone:5c07a3bf12524da78ca06c12f76d37e7" }), Deny, "KeystoneUser"},
		"a Keystone user's name": {change(manager(subjectOf("keystone:5c07a3bf", "h8s:tenant:keystone:member")), func(s *spec) { s.Groups = []string{"h8s:tenant:keystone:manager"} }), Deny, "Subject"},
		"a system tenant's user": {master(subjectOf("system:kube-scheduler", "h8s:tenant:system:member")), Deny, "Subject"},
		"masters in O":           {manager(subjectOf("blue:bob", "system:masters")), Deny, "Subject"},
		"masters beside":         {manager(subjectOf("blue:bob", "h8s:tenant:blue:member", "system:masters")), Deny, "Subject"},
		"two roles":              {manager(subjectOf("blue:bob", "h8s:tenant:blue:member", "h8s:tenant:blue:manager")), Deny, "Subject"},
		"another tenant":         {manager(subjectOf("red:bob", "h8s:tenant:red:member")), Deny, "NotManager"},
		"another tenant's group": {manager(subjectOf("blue:bob", "h8s:tenant:red:member")), Deny, "Subject"},
		"another tenant's name":  {manager(subjectOf("red:bob", "h8s:tenant:blue:member")), Deny, "Subject"},
		"no tenant":              {manager(subjectOf("green:bob", "h8s:tenant:green:member")), Deny, "NotManager"},
		"operator for no tenant": {master(subjectOf("green:bob", "h8s:tenant:green:member")), Deny, "NoTenant"},
		"a role there is not":    {manager(subjectOf("blue:bob", "h8s:tenant:blue:owner")), Deny, "Subject"},
		"the controller":         {manager(subjectOf("h8s:controller", "h8s:controllers")), Deny, "Subject"},
		"a system user":          {manager(subjectOf("system:kube-controller-manager")), Deny, "Subject"},
		"a node":                 {manager(subjectOf("system:node:n1", "system:nodes")), Deny, "Subject"},
		"anything else":          {manager(subjectOf("bob", "friends")), Deny, "Subject"},
		"colons":                 {manager(subjectOf("blue:bob:system:masters", "h8s:tenant:blue:member")), Deny, "Subject"},
		"no user":                {manager(subjectOf("blue:", "h8s:tenant:blue:member")), Deny, "Subject"},
		"long name":              {manager(subjectOf("blue:"+strings.Repeat("x", 64), "h8s:tenant:blue:member")), Deny, "Subject"},
		"a member asks":          {change(manager(bob), func(s *spec) { s.Groups = []string{"h8s:tenant:blue:member"} }), Deny, "NotManager"},
		"a forged group":         {change(manager(bob), func(s *spec) { s.Groups = []string{"h8s:tenant:red:manager", "h8s:tenant:blue:manager:x"} }), Deny, "NotManager"},
		"DNS name":               {manager(with(bob, func(r *x509.CertificateRequest) { r.DNSNames = []string{"kubernetes"} })), Deny, "AlternativeNames"},
		"address":                {manager(with(bob, func(r *x509.CertificateRequest) { r.IPAddresses = []net.IP{net.IPv4(10, 96, 0, 1)} })), Deny, "AlternativeNames"},
		"URI":                    {manager(with(bob, func(r *x509.CertificateRequest) { r.URIs = []*url.URL{{Scheme: "spiffe", Host: "x"}} })), Deny, "AlternativeNames"},
		"e-mail":                 {manager(with(bob, func(r *x509.CertificateRequest) { r.EmailAddresses = []string{"a@b"} })), Deny, "AlternativeNames"},
		"server auth":            {change(manager(bob), func(s *spec) { s.Usages = append(usages(certificatesv1.UsageServerAuth), clientUse...) }), Deny, "Usages"},
		"cert sign":              {change(manager(bob), func(s *spec) { s.Usages = append(usages(certificatesv1.UsageCertSign), clientUse...) }), Deny, "Usages"},
		"any usage":              {change(manager(bob), func(s *spec) { s.Usages = usages(certificatesv1.UsageAny) }), Deny, "Usages"},
		"no usage":               {change(manager(bob), func(s *spec) { s.Usages = nil }), Deny, "Usages"},
		"usage twice":            {change(manager(bob), func(s *spec) { s.Usages = append(usages(certificatesv1.UsageClientAuth), clientUse...) }), Deny, "Usages"},
		"ten years":              {change(manager(bob), func(s *spec) { s.ExpirationSeconds = seconds(10 * 365 * 86400) }), Deny, "Expiration"},
		"a weak key":             {change(manager(bob), func(s *spec) { s.Request = request(t, bob, weak) }), Deny, "Key"},
		"nonsense":               {change(manager(bob), func(s *spec) { s.Request = []byte("hello") }), Deny, "Malformed"},
		"two blocks":             {change(manager(bob), func(s *spec) { s.Request = append(slices.Clone(s.Request), s.Request...) }), Deny, "Malformed"},
		"two common names": {manager(with(bob, func(r *x509.CertificateRequest) {
			r.Subject.ExtraNames = []pkix.AttributeTypeAndValue{{Type: oidCN, Value: "admin"}, {Type: oidCN, Value: "blue:bob"}}
		})), Deny, "Malformed"},
		"another attribute": {manager(with(bob, func(r *x509.CertificateRequest) {
			r.Subject.OrganizationalUnit = []string{"system:masters"}
		})), Deny, "Malformed"},
		"control characters": {manager(subjectOf("blue:bob\n", "h8s:tenant:blue:member")), Deny, "Malformed"},
		"an authority": {manager(with(bob, func(r *x509.CertificateRequest) {
			r.ExtraExtensions = []pkix.Extension{{Id: asn1.ObjectIdentifier{2, 5, 29, 19}, Critical: true, Value: []byte{0x30, 3, 1, 1, 0xff}}}
		})), Deny, "Malformed"},
		"a tenant as kubelet":        {change(manager(n1), func(s *spec) { s.SignerName = certificatesv1.KubeAPIServerClientKubeletSignerName }), Deny, "TenantNode"},
		"a tenant as server":         {change(serving(n1), func(s *spec) { s.Username, s.Groups = "blue:ann", []string{"h8s:tenant:blue:manager"} }), Deny, "NotNode"},
		"volume plugin, other node":  {node(subjectOf("h8s:csi-node:n2", "h8s:csi-nodes")), Deny, "Subject"},
		"keeper of volumes":          {node(subjectOf("h8s:csi-controller", "h8s:csi-controllers")), Deny, "Subject"},
		"kubestack of another node":  {node(subjectOf("h8s:kubestack:n2", "h8s:kubestacks")), Deny, "Subject"},
		"kubestack, more groups":     {node(subjectOf("h8s:kubestack:n1", "h8s:kubestacks", "system:masters")), Deny, "Subject"},
		"a node as controller":       {node(subjectOf("h8s:controller", "h8s:controllers")), Deny, "Subject"},
		"a node as a tenant's user":  {node(bob), Deny, "NotManager"},
		"kube-proxy as master":       {node(subjectOf("system:kube-proxy", "system:masters")), Deny, "Subject"},
		"serving another node":       {serving(with(n1, func(r *x509.CertificateRequest) { r.Subject.CommonName = "system:node:n2" })), Deny, "Subject"},
		"serving another name":       {serving(with(n1, func(r *x509.CertificateRequest) { r.DNSNames = []string{"n1", "kubernetes.default.svc"} })), Deny, "AlternativeNames"},
		"serving a Service":          {serving(with(n1, func(r *x509.CertificateRequest) { r.IPAddresses = []net.IP{net.ParseIP("10.96.0.1")} })), Deny, "AlternativeNames"},
		"serving a neighbour":        {serving(with(n1, func(r *x509.CertificateRequest) { r.IPAddresses = []net.IP{net.ParseIP("192.0.2.2")} })), Deny, "AlternativeNames"},
		"serving loopback":           {serving(with(n1, func(r *x509.CertificateRequest) { r.IPAddresses = []net.IP{net.ParseIP("127.0.0.1")} })), Deny, "AlternativeNames"},
		"serving nothing":            {serving(subjectOf("system:node:n1", "system:nodes")), Deny, "AlternativeNames"},
		"serving, client auth":       {change(serving(n1), func(s *spec) { s.Usages = clientUse }), Deny, "Usages"},
		"a node that only says so":   {change(serving(n1), func(s *spec) { s.Groups = []string{"system:authenticated"} }), Deny, "NotNode"},
		"serving, address not known": {serving(with(n1, func(r *x509.CertificateRequest) { r.IPAddresses = []net.IP{net.ParseIP("192.0.2.77")} })), Wait, "AddressUnknown"},
		"serving, new node": {change(serving(with(n1, func(r *x509.CertificateRequest) {
			r.Subject.CommonName, r.DNSNames = "system:node:new", []string{"new"}
		})), func(s *spec) { s.Username = "system:node:new" }), Wait, "NodeUnknown"},

		"another signer":                 {change(manager(bob), func(s *spec) { s.SignerName = "example.com/x" }), Ignore, ""},
		"kubelet client":                 {change(node(n1), func(s *spec) { s.SignerName = certificatesv1.KubeAPIServerClientKubeletSignerName }), Ignore, ""},
		"operator for somebody":          {master(subjectOf("carol", "ops")), Ignore, ""},
		"operator for a master":          {master(subjectOf("carol", "system:masters")), Ignore, ""},
		"a stranger for a stranger":      {change(manager(subjectOf("carol", "ops")), func(s *spec) { s.Username, s.Groups = "dave", nil }), Ignore, ""},
		"a stranger for a tenant's user": {change(manager(bob), func(s *spec) { s.Username, s.Groups = "dave", nil }), Ignore, ""},
	} {
		t.Run(name, func(t *testing.T) {
			d := Decide(c.spec, facts)
			if d.Answer != c.answer || d.Reason != c.reason {
				t.Errorf("%+v, want %v %s", d, c.answer, c.reason)
			}
			if d.Message == "" {
				t.Error("no message")
			}
		})
	}
}

func FuzzParse(f *testing.F) {
	der, _ := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{Subject: pkix.Name{CommonName: "blue:bob"}}, key)
	f.Add(der)
	f.Fuzz(func(t *testing.T, der []byte) {
		cr, err := parse(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE REQUEST", Bytes: der}))
		if err == nil && cr.CheckSignature() != nil {
			t.Fatal("a request whose signature is wrong")
		}
	})
}
