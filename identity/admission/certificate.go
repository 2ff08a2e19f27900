package admission

import (
	"crypto/x509"
	"encoding/pem"
	"strings"

	authenticationv1 "k8s.io/api/authentication/v1"

	v1alpha1 "github.com/hypernetes/hypernetes/api/hypernetes/v1alpha1"
)

// maxCertificateRequest is far more than a request for a user's certificate.
const maxCertificateRequest = 64 << 10

// checkCertificate refuses requests of a tenant's users for anybody but users of the same
// tenant. The approver decides; this only keeps what it would refuse from lying about for
// somebody to approve by hand.
func checkCertificate(u authenticationv1.UserInfo, signer string, request []byte) error {
	var tenant string
	manager := false
	for _, g := range u.Groups {
		rest, ours := strings.CutPrefix(g, v1alpha1.GroupPrefix)
		if !ours {
			continue
		}
		t, role, _ := strings.Cut(rest, ":")
		if tenant != "" && t != tenant {
			return refusef("spec.groups: you are in groups of the tenants %s and %s: use a certificate for one of them", tenant, t)
		}
		tenant = t
		manager = manager || v1alpha1.Role(role) == v1alpha1.RoleManager
	}
	if tenant == "" {
		return nil
	}
	if signer != "kubernetes.io/kube-apiserver-client" {
		return refusef("spec.signerName: %s: tenants may ask for kubernetes.io/kube-apiserver-client only", signer)
	}
	if !manager {
		return refusef("spec.request: only managers of tenant %s may ask for certificates: ask one of them", tenant)
	}
	if len(request) > maxCertificateRequest {
		return refusef("spec.request: %d bytes: want at most %d", len(request), maxCertificateRequest)
	}
	block, rest := pem.Decode(request)
	if block == nil || block.Type != "CERTIFICATE REQUEST" || len(strings.TrimSpace(string(rest))) > 0 {
		return refusef("spec.request: want one PEM block of type CERTIFICATE REQUEST")
	}
	csr, err := x509.ParseCertificateRequest(block.Bytes)
	if err != nil {
		return refusef("spec.request: %v: want a PKCS#10 request", err)
	}
	user, mine := strings.CutPrefix(csr.Subject.CommonName, tenant+":")
	if !mine || user == "" {
		return refusef("spec.request: common name %q: want %s:<user>", csr.Subject.CommonName, tenant)
	}
	if len(csr.Subject.Organization) == 0 {
		return refusef("spec.request: no organisation: want %s, for example", v1alpha1.Group(tenant, v1alpha1.RoleMember))
	}
	for _, o := range csr.Subject.Organization {
		switch o {
		case v1alpha1.Group(tenant, v1alpha1.RoleReader), v1alpha1.Group(tenant, v1alpha1.RoleMember), v1alpha1.Group(tenant, v1alpha1.RoleManager):
		default:
			return refusef("spec.request: organisation %q: want %s<role>, with role reader, member or manager", o, v1alpha1.GroupPrefix+tenant+":")
		}
	}
	return nil
}
