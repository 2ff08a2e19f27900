// Package csr owns the decision which certificates the cluster signs for nodes and for
// tenants' users. The decision is a pure function; a reconciler fetches what it needs and
// writes the answer down. It must not know keys, nor how certificates are signed.
package csr

import (
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/rsa"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"encoding/pem"
	"fmt"
	"net/netip"
	"regexp"
	"slices"
	"strings"

	certificatesv1 "k8s.io/api/certificates/v1"
	"k8s.io/apimachinery/pkg/util/validation"

	v1alpha1 "github.com/hypernetes/hypernetes/api/hypernetes/v1alpha1"
)

// Names that are ours or Kubernetes'.
const (
	groupNodes      = "system:nodes"
	groupMasters    = "system:masters"
	nodePrefix      = "system:node:"
	kubeProxy       = "system:kube-proxy"
	groupKubeProxy  = "system:node-proxier"
	kubestackPrefix = "h8s:kubestack:"
	groupKubestacks = "h8s:kubestacks"
	csiNodePrefix   = "h8s:csi-node:"
	groupCSINodes   = "h8s:csi-nodes"
	// keystonePrefix begins the names of users who log in with Keystone.
	keystonePrefix = "keystone:"
)

// maxSeconds is the longest life that is asked for: a year, leap or not.
const maxSeconds = 366 * 24 * 60 * 60

// Answer to a request.
type Answer int

// Answers.
const (
	// Ignore leaves a request to others: it is none of our kinds.
	Ignore Answer = iota
	// Wait asks again later: what is needed to decide is not there yet.
	Wait
	// Approve signs.
	Approve
	// Deny refuses for good.
	Deny
)

// String names an answer.
func (a Answer) String() string { return [...]string{"Ignore", "Wait", "Approve", "Deny"}[a] }

// Decision is an answer and why.
type Decision struct {
	Answer  Answer
	Reason  string
	Message string
}

// Facts are what the cluster knows.
type Facts struct {
	// Tenant returns a tenant's owners, and whether there is such a tenant.
	Tenant func(name string) (owners []string, exists bool)
	// Node returns a node's addresses and names, and whether there is such a node.
	Node func(name string) (addresses []string, exists bool)
	// Foreign says whether an address is another node's or means something else to every
	// node, like that of a Service.
	Foreign func(node string, a netip.Addr) bool
}

func deny(reason, format string, args ...any) Decision {
	return Decision{Deny, reason, fmt.Sprintf(format, args...)}
}

// who is what of a requester counts.
type who struct {
	node    string
	master  bool
	tenants map[string][]v1alpha1.Role
}

func requester(s certificatesv1.CertificateSigningRequestSpec) who {
	w := who{tenants: map[string][]v1alpha1.Role{}, master: slices.Contains(s.Groups, groupMasters)}
	if n, ok := strings.CutPrefix(s.Username, nodePrefix); ok && slices.Contains(s.Groups, groupNodes) {
		w.node = n
	}
	for _, g := range s.Groups {
		if t, r, ok := parseGroup(g); ok {
			w.tenants[t] = append(w.tenants[t], r)
		}
	}
	return w
}

// parseGroup reads a group of a tenant's users.
func parseGroup(g string) (tenant string, role v1alpha1.Role, ok bool) {
	rest, ok := strings.CutPrefix(g, v1alpha1.GroupPrefix)
	if !ok {
		return "", "", false
	}
	tenant, r, ok := strings.Cut(rest, ":")
	role = v1alpha1.Role(r)
	if !ok || len(validation.IsDNS1123Label(tenant)) > 0 || len(tenant) > 40 ||
		!slices.Contains([]v1alpha1.Role{v1alpha1.RoleReader, v1alpha1.RoleMember, v1alpha1.RoleManager}, role) {
		return "", "", false
	}
	return tenant, role, true
}

// special says whether a name means something to the API server or to us.
func special(name string) bool {
	return strings.HasPrefix(name, "system:") || strings.HasPrefix(name, "h8s:") || strings.HasPrefix(name, "kubeadm:") ||
		strings.HasPrefix(name, keystonePrefix)
}

// Decide answers a request.
func Decide(s certificatesv1.CertificateSigningRequestSpec, f Facts) Decision {
	w := requester(s)
	switch s.SignerName {
	case certificatesv1.KubeAPIServerClientSignerName, certificatesv1.KubeletServingSignerName:
	case certificatesv1.KubeAPIServerClientKubeletSignerName:
		if len(w.tenants) > 0 && w.node == "" && !w.master {
			return deny("TenantNode", "spec.signerName: a tenant's user is not a node")
		}
		return Decision{Message: "kubelets' own certificates are Kubernetes' to approve"}
	default:
		return Decision{Message: "another's signer"}
	}
	cr, err := parse(s.Request)
	if err != nil {
		return deny("Malformed", "spec.request: %v", err)
	}
	if s.SignerName == certificatesv1.KubeletServingSignerName {
		return serving(s, cr, w, f)
	}
	return clientCertificate(s, cr, w, f)
}

// clientCertificate decides about certificates that the API server takes for a user.
func clientCertificate(s certificatesv1.CertificateSigningRequestSpec, cr *x509.CertificateRequest, w who, f Facts) Decision {
	cn, orgs := cr.Subject.CommonName, cr.Subject.Organization
	tenant, user, isUser := tenantUser(cn, orgs)
	concerns := isUser || w.node != "" || len(w.tenants) > 0 || special(cn) || slices.ContainsFunc(orgs, special)
	if !concerns {
		return Decision{Message: "neither from nor for anybody of ours"}
	}
	if w.master && !isUser {
		return Decision{Message: "an administrator's request for another kind of user: approve it by hand"}
	}
	if w.node == "" && !w.master && len(w.tenants) == 0 && !ownerOf(f, s.Username, tenant, isUser) {
		// Neither a node, nor an administrator, nor a tenant's: somebody else's business, say
		// a bootstrap token's or another approver's.
		return Decision{Message: "the requester is nobody of ours"}
	}
	if d, bad := plain(s, cr, certificatesv1.UsageClientAuth); bad {
		return d
	}
	if n := len(cr.DNSNames) + len(cr.IPAddresses) + len(cr.EmailAddresses) + len(cr.URIs); n > 0 {
		return deny("AlternativeNames", "spec.request: a client's certificate has no alternative names, this has %d", n)
	}
	if w.node != "" && !isUser {
		return nodeClient(w.node, cn, orgs)
	}
	if !isUser {
		return deny("Subject", "spec.request: subject CN=%q O=%q: want CN=<tenant>:<user> and the one organisation h8s:tenant:<tenant>:<role>, role reader, member or manager", cn, orgs)
	}
	if strings.HasPrefix(s.Username, keystonePrefix) && !w.master {
		// It would outlive the role, the token and the project.
		return deny("KeystoneUser", "%s logs in with Keystone, and so do other users of its project: give them a role there (openstack role add), a certificate cannot be taken back", s.Username)
	}
	if special(cn) {
		return deny("Subject", "spec.request: subject CN=%q: names that begin so have a meaning of their own", cn)
	}
	owners, exists := f.Tenant(tenant)
	switch {
	case !w.master && !slices.Contains(w.tenants[tenant], v1alpha1.RoleManager) && !slices.Contains(owners, s.Username):
		// Whether there is such a tenant is not told.
		return deny("NotManager", "only the operator and managers of tenant %q may ask for its users' certificates", tenant)
	case !exists:
		return deny("NoTenant", "there is no tenant %q", tenant)
	}
	return Decision{Approve, "TenantUser", fmt.Sprintf("user %s of tenant %s, asked for by %s", user, tenant, s.Username)}
}

func ownerOf(f Facts, user, tenant string, isUser bool) bool {
	if !isUser {
		return false
	}
	owners, _ := f.Tenant(tenant)
	return slices.Contains(owners, user)
}

// nodeClient decides about what a node needs beside its kubelet's certificate.
func nodeClient(node, cn string, orgs []string) Decision {
	switch {
	case cn == kubestackPrefix+node && slices.Equal(orgs, []string{groupKubestacks}):
		return Decision{Approve, "Kubestack", "kubestack of node " + node}
	case cn == csiNodePrefix+node && slices.Equal(orgs, []string{groupCSINodes}):
		return Decision{Approve, "CSINode", "volume plugin of node " + node}
	case cn == kubeProxy && (len(orgs) == 0 || slices.Equal(orgs, []string{groupKubeProxy})):
		return Decision{Approve, "KubeProxy", "kube-proxy of node " + node}
	}
	return deny("Subject", "spec.request: subject CN=%q O=%q: node %s may ask for CN=%s%s O=%s, CN=%s%s O=%s and CN=%s only",
		cn, orgs, node, kubestackPrefix, node, groupKubestacks, csiNodePrefix, node, groupCSINodes, kubeProxy)
}

// serving decides about kubelets' certificates as servers.
func serving(s certificatesv1.CertificateSigningRequestSpec, cr *x509.CertificateRequest, w who, f Facts) Decision {
	if w.node == "" {
		if w.master {
			return Decision{Message: "an administrator's request: approve it by hand"}
		}
		return deny("NotNode", "only a node may ask for its kubelet's certificate, not %q", s.Username)
	}
	if d, bad := plain(s, cr, certificatesv1.UsageServerAuth); bad {
		return d
	}
	if cr.Subject.CommonName != nodePrefix+w.node || !slices.Equal(cr.Subject.Organization, []string{groupNodes}) {
		return deny("Subject", "spec.request: subject CN=%q O=%q: want CN=%s%s O=%s",
			cr.Subject.CommonName, cr.Subject.Organization, nodePrefix, w.node, groupNodes)
	}
	if len(cr.EmailAddresses)+len(cr.URIs) > 0 || len(cr.DNSNames)+len(cr.IPAddresses) == 0 {
		return deny("AlternativeNames", "spec.request: want the node's names and addresses as alternative names and nothing else")
	}
	addresses, exists := f.Node(w.node)
	if !exists || (len(addresses) == 0 && len(cr.IPAddresses) > 0) {
		return Decision{Wait, "NodeUnknown", "node " + w.node + " has not said its addresses yet"}
	}
	for _, name := range cr.DNSNames {
		if name != w.node {
			return deny("AlternativeNames", "spec.request: DNS name %q is not the node's name %q", name, w.node)
		}
	}
	for _, ip := range cr.IPAddresses {
		a, ok := netip.AddrFromSlice(ip)
		a = a.Unmap()
		if !ok || a.IsLoopback() || a.IsUnspecified() || a.IsMulticast() || f.Foreign(w.node, a) {
			return deny("AlternativeNames", "spec.request: address %s is not node %s's alone", ip, w.node)
		}
		if !slices.ContainsFunc(addresses, func(s string) bool {
			b, err := netip.ParseAddr(s)
			return err == nil && b.Unmap() == a
		}) {
			return Decision{Wait, "AddressUnknown", fmt.Sprintf("address %s is not among those of node %s (yet)", ip, w.node)}
		}
	}
	return Decision{Approve, "KubeletServing", "kubelet of node " + w.node}
}

// plain checks what every certificate that we approve must be.
func plain(s certificatesv1.CertificateSigningRequestSpec, cr *x509.CertificateRequest, usage certificatesv1.KeyUsage) (Decision, bool) {
	allowed := []certificatesv1.KeyUsage{usage, certificatesv1.UsageDigitalSignature, certificatesv1.UsageKeyEncipherment}
	for i, u := range s.Usages {
		if !slices.Contains(allowed, u) || slices.Contains(s.Usages[:i], u) {
			return deny("Usages", "spec.usages: %q: want %q and at most %q and %q", u, usage, allowed[1], allowed[2]), true
		}
	}
	if !slices.Contains(s.Usages, usage) {
		return deny("Usages", "spec.usages: want %q", usage), true
	}
	if e := s.ExpirationSeconds; e != nil && (*e > maxSeconds || *e <= 0) {
		return deny("Expiration", "spec.expirationSeconds: %d: want at most %d (a year)", *e, maxSeconds), true
	}
	if err := strength(cr); err != nil {
		return deny("Key", "spec.request: %v", err), true
	}
	return Decision{}, false
}

func strength(cr *x509.CertificateRequest) error {
	switch k := cr.PublicKey.(type) {
	case *rsa.PublicKey:
		if n := k.N.BitLen(); n < 2048 || n > 8192 {
			return fmt.Errorf("RSA key of %d bits: want 2048 to 8192", n)
		}
	case *ecdsa.PublicKey:
		if n := k.Params().BitSize; n < 256 {
			return fmt.Errorf("elliptic key of %d bits: want 256 or more", n)
		}
	case ed25519.PublicKey:
	default:
		return fmt.Errorf("a key of an unknown kind: want RSA, ECDSA or Ed25519")
	}
	return nil
}

var (
	userName = regexp.MustCompile(`^[A-Za-z0-9]([A-Za-z0-9@._-]{0,61}[A-Za-z0-9])?$`)
	oidCN    = asn1.ObjectIdentifier{2, 5, 4, 3}
	oidO     = asn1.ObjectIdentifier{2, 5, 4, 10}
	oidSAN   = asn1.ObjectIdentifier{2, 5, 29, 17}
	oidUsage = asn1.ObjectIdentifier{2, 5, 29, 15}
	oidExt   = asn1.ObjectIdentifier{2, 5, 29, 37}
)

// tenantUser reads the subject of a tenant's user.
func tenantUser(cn string, orgs []string) (tenant, user string, ok bool) {
	if len(orgs) != 1 {
		return "", "", false
	}
	tenant, _, ok = parseGroup(orgs[0])
	if !ok {
		return "", "", false
	}
	user, ok = strings.CutPrefix(cn, tenant+":")
	return tenant, user, ok && userName.MatchString(user)
}

// parse reads a request and refuses what a certificate of ours never has: subjects that
// could be read in two ways, and extensions that would make it more than it seems.
func parse(text []byte) (*x509.CertificateRequest, error) {
	if len(text) > 64<<10 {
		return nil, fmt.Errorf("longer than 64 KiB")
	}
	block, rest := pem.Decode(text)
	if block == nil || block.Type != "CERTIFICATE REQUEST" || len(strings.TrimSpace(string(rest))) > 0 {
		return nil, fmt.Errorf("want one PEM block CERTIFICATE REQUEST")
	}
	cr, err := x509.ParseCertificateRequest(block.Bytes)
	if err != nil {
		return nil, err
	}
	if err := cr.CheckSignature(); err != nil {
		return nil, fmt.Errorf("signature: %w", err)
	}
	if err := subject(cr.Subject); err != nil {
		return nil, err
	}
	for _, e := range cr.Extensions {
		if !e.Id.Equal(oidSAN) && !e.Id.Equal(oidUsage) && !e.Id.Equal(oidExt) {
			return nil, fmt.Errorf("extension %s: want none but alternative names and key usage", e.Id)
		}
	}
	return cr, nil
}

func subject(n pkix.Name) error {
	names := 0
	for _, a := range n.Names {
		text, isText := a.Value.(string)
		switch {
		case !isText || strings.ContainsFunc(text, func(r rune) bool { return r < 0x20 || r == 0x7f }):
			return fmt.Errorf("subject: %s is not plain text", a.Type)
		case a.Type.Equal(oidCN):
			names++
		case !a.Type.Equal(oidO):
			return fmt.Errorf("subject: attribute %s: want CN and O only", a.Type)
		}
	}
	if names != 1 {
		return fmt.Errorf("subject: %d common names: want one", names)
	}
	return nil
}
