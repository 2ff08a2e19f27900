package tenants

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/base64"
	"encoding/pem"
	"fmt"
	"math/big"
	"strings"
	"testing"
	"time"

	"github.com/hypernetes/hypernetes/test/e2e/testcluster"
)

// TestCalled: an admission webhook and an aggregated API that live in a tenant's Network
// are reached by the API server, by Service.
func TestCalled(t *testing.T) {
	t.Parallel()
	c := up(t)
	tn := c.Tenant(t, light...)
	n := tn.Namespace("called", "default")
	where := "{}"
	if onNeutron() {
		// The API server's node has no port in a Network of Neutron but those of its Pods:
		// docs/openstack.md says so.
		where = fmt.Sprintf("{kubernetes.io/hostname: %q}", c.Node)
	}
	cert, key := ownCertificate(t, "called."+n.Name+".svc")
	tn.Apply(fmt.Sprintf(`apiVersion: v1
kind: Secret
metadata: {name: called, namespace: %[1]s}
type: kubernetes.io/tls
data: {tls.crt: %[2]s, tls.key: %[3]s}
---
apiVersion: v1
kind: Pod
metadata: {name: called, namespace: %[1]s, labels: {app: called}}
spec:
  runtimeClassName: runc
  nodeSelector: %[4]s
  terminationGracePeriodSeconds: 1
  containers:
  - name: main
    image: h8s.local/testbox:1
    args: [tls]
    volumeMounts: [{name: tls, mountPath: /tls}]
  volumes: [{name: tls, secret: {secretName: called}}]
---
apiVersion: v1
kind: Service
metadata: {name: called, namespace: %[1]s}
spec: {selector: {app: called}, ports: [{port: 443, targetPort: 8443}]}
`, n.Name, cert, key, where))
	n.Ready("called")
	other := c.Namespace(t)
	group := tn.Name + ".example.org"
	for _, kind := range []string{"validatingwebhookconfiguration", "apiservice"} {
		name := map[string]string{"apiservice": "v1." + group}[kind]
		if name == "" {
			name = tn.Name
		}
		defer c.Kubectl(t, "delete", kind, name, "--ignore-not-found")
	}
	testcluster.ApplyText(t, c.Cluster, fmt.Sprintf(`apiVersion: admissionregistration.k8s.io/v1
kind: ValidatingWebhookConfiguration
metadata: {name: %[2]s}
webhooks:
- name: called.example.org
  admissionReviewVersions: [v1]
  sideEffects: None
  failurePolicy: Fail
  timeoutSeconds: 5
  namespaceSelector: {matchLabels: {kubernetes.io/metadata.name: %[3]s}}
  rules: [{apiGroups: [""], apiVersions: [v1], operations: [CREATE], resources: [configmaps]}]
  clientConfig: {caBundle: %[4]s, service: {namespace: %[1]s, name: called, path: /validate}}
---
apiVersion: apiregistration.k8s.io/v1
kind: APIService
metadata: {name: v1.%[5]s}
spec: {group: %[5]s, version: v1, groupPriorityMinimum: 100, versionPriority: 10, caBundle: %[4]s, service: {namespace: %[1]s, name: called}}
`, n.Name, tn.Name, other.Name, cert, group))
	other.Until("the webhook is asked and admits", time.Minute, func() bool {
		_, err := other.Try("create", "configmap", "fine")
		return err == nil
	})
	if out, err := other.Try("create", "configmap", "refused"); err == nil || !strings.Contains(err.Error(), "testbox refuses refused") {
		t.Errorf("the webhook is not asked: %v %s", err, out)
	}
	c.Kubectl(t, "wait", "apiservice/v1."+group, "--for=condition=Available", "--timeout=60s")
	if out := c.Kubectl(t, "get", "--raw", "/apis/"+group+"/v1"); !strings.Contains(out, `"APIResourceList"`) {
		t.Errorf("the aggregated API: %s", out)
	}
}

// ownCertificate is a server's certificate that is its own authority, and its key: PEM in
// base64.
func ownCertificate(t *testing.T, name string) (cert, private string) {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: name}, DNSNames: []string{name},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(24 * time.Hour),
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageDigitalSignature | x509.KeyUsageCertSign,
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth},
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, &key.PublicKey, key)
	if err != nil {
		t.Fatal(err)
	}
	keyDER, err := x509.MarshalECPrivateKey(key)
	if err != nil {
		t.Fatal(err)
	}
	text := func(kind string, b []byte) string {
		return base64.StdEncoding.EncodeToString(pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: b}))
	}
	return text("CERTIFICATE", der), text("EC PRIVATE KEY", keyDER)
}
