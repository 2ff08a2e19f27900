package api

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"fmt"
	"math/big"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/go-logr/logr"
	corev1 "k8s.io/api/core/v1"
	nodev1 "k8s.io/api/node/v1"
	rbacv1 "k8s.io/api/rbac/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"
	ctrl "sigs.k8s.io/controller-runtime"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/config"
	metricsserver "sigs.k8s.io/controller-runtime/pkg/metrics/server"
	"sigs.k8s.io/yaml"

	v1alpha1 "github.com/hypernetes/hypernetes/api/hypernetes/v1alpha1"
	"github.com/hypernetes/hypernetes/identity/admission"
	"github.com/hypernetes/hypernetes/test/controlplane"
)

// wait bounds what the API server does soon: policies take effect within seconds.
const wait = 2 * time.Minute

// user is one of those who try.
type user struct {
	client.Client
	set *kubernetes.Clientset
}

// world is a control plane with two tenants, blue and red.
type world struct {
	cfg   *rest.Config
	admin user
	// ann is blue's manager, node, kubestack and csiNode are node n1's, keeper keeps volumes,
	// deputy is a service account
	// with rights on namespaces such as an operator gives to tools, controller is ours.
	ann, node, kubestack, csiNode, keeper, deputy, controller, endpoints user

	stop func()
}

func newUser(t testing.TB, cfg *rest.Config) user {
	t.Helper()
	c, err := client.New(cfg, client.Options{Scheme: controlplane.Scheme()})
	if err != nil {
		t.Fatal(err)
	}
	set, err := kubernetes.NewForConfig(cfg)
	if err != nil {
		t.Fatal(err)
	}
	return user{c, set}
}

func newWorld(t *testing.T) *world {
	ctrl.SetLogger(logr.Discard())
	cfg := controlplane.Start(t)
	as := func(name string, groups ...string) user {
		return newUser(t, controlplane.As(cfg, name, append(groups, "system:authenticated")...))
	}
	w := &world{
		cfg:        cfg,
		admin:      newUser(t, cfg),
		ann:        as("blue:ann", "h8s:tenant:blue:manager"),
		node:       as("system:node:n1", "system:nodes"),
		kubestack:  as("h8s:kubestack:n1", "h8s:kubestacks"),
		csiNode:    as("h8s:csi-node:n1", "h8s:csi-nodes"),
		keeper:     as("h8s:csi-controller", "h8s:csi-controllers"),
		deputy:     as("system:serviceaccount:tools:deputy", "system:serviceaccounts", "system:serviceaccounts:tools"),
		controller: as("h8s:controller", "h8s:controllers"),
		endpoints:  as("system:serviceaccount:kube-system:endpointslice-controller", "system:serviceaccounts", "system:serviceaccounts:kube-system"),
	}
	ctx := t.Context()
	everything := []rbacv1.PolicyRule{
		{APIGroups: []string{"", "apps", "discovery.k8s.io", "rbac.authorization.k8s.io", "certificates.k8s.io"}, Resources: []string{"*"}, Verbs: []string{"*"}},
		{APIGroups: []string{"hypernetes.io"}, Resources: []string{"networks", "networks/status", "tenantnamespaces", "tenantnamespaces/status", "ports", "ports/status", "floatingips", "floatingips/status"}, Verbs: []string{"*"}},
		{APIGroups: []string{"hypernetes.io"}, Resources: []string{"localvolumes", "localvolumes/status", "localsnapshots", "localstores", "localstores/status"}, Verbs: []string{"*"}},
		{APIGroups: []string{"hypernetes.io"}, Resources: []string{"tenants/status", "addresspools/status"}, Verbs: []string{"*"}},
	}
	all := &rbacv1.ClusterRole{ObjectMeta: metav1.ObjectMeta{Name: "far-too-much"}, Rules: everything}
	subjects := []rbacv1.Subject{}
	for _, g := range []string{"h8s:tenant:blue:manager", "h8s:kubestacks", "h8s:csi-nodes", "h8s:csi-controllers", "system:nodes", "system:serviceaccounts:tools", "system:serviceaccounts:kube-system"} {
		subjects = append(subjects, rbacv1.Subject{Kind: "Group", APIGroup: rbacv1.GroupName, Name: g})
	}
	objects := []client.Object{
		all,
		&rbacv1.ClusterRoleBinding{ObjectMeta: metav1.ObjectMeta{Name: "far-too-much"}, Subjects: subjects,
			RoleRef: rbacv1.RoleRef{APIGroup: rbacv1.GroupName, Kind: "ClusterRole", Name: "far-too-much"}},
		&nodev1.RuntimeClass{ObjectMeta: metav1.ObjectMeta{Name: "hyper"}, Handler: "hyper"},
		&nodev1.RuntimeClass{ObjectMeta: metav1.ObjectMeta{Name: "hyper-large"}, Handler: "hyper"},
		&nodev1.RuntimeClass{ObjectMeta: metav1.ObjectMeta{Name: "runc"}, Handler: "runc"},
		&nodev1.RuntimeClass{ObjectMeta: metav1.ObjectMeta{Name: "other"}, Handler: "other"},
		&corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: "n1"}, Status: corev1.NodeStatus{Addresses: []corev1.NodeAddress{{Type: corev1.NodeInternalIP, Address: "100.64.0.1"}}}},
	}
	for _, tenant := range []string{"blue", "red"} {
		objects = append(objects,
			&v1alpha1.Tenant{ObjectMeta: metav1.ObjectMeta{Name: tenant}, Spec: v1alpha1.TenantSpec{
				RuntimeClasses: []string{"hyper-large", "hyper", "runc"}, Quota: v1alpha1.TenantQuota{Networks: new(int32(3))}}},
			&corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: "tenant-" + tenant, Labels: map[string]string{v1alpha1.LabelTenant: tenant, v1alpha1.LabelHome: "true"}}},
			&corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: tenant + "-web", Labels: map[string]string{v1alpha1.LabelTenant: tenant, v1alpha1.LabelNetwork: "default", "pod-security.kubernetes.io/enforce": "privileged"}}},
			&v1alpha1.Network{ObjectMeta: metav1.ObjectMeta{Name: "default", Namespace: "tenant-" + tenant, Finalizers: []string{v1alpha1.Finalizer}},
				Spec: v1alpha1.NetworkSpec{Subnets: map[string]v1alpha1.Subnet{"a": {CIDR: "10.0.0.0/16"}}}},
			&v1alpha1.TenantNamespace{ObjectMeta: metav1.ObjectMeta{Name: tenant + "-web", Namespace: "tenant-" + tenant}, Spec: v1alpha1.TenantNamespaceSpec{Network: "default"}},
		)
	}
	objects = append(objects,
		&corev1.Service{ObjectMeta: metav1.ObjectMeta{Name: "web", Namespace: "blue-web", Labels: map[string]string{v1alpha1.LabelServiceProxy: v1alpha1.ServiceProxy}}, Spec: corev1.ServiceSpec{Ports: []corev1.ServicePort{{Port: 80}}}},
		&corev1.Service{ObjectMeta: metav1.ObjectMeta{Name: "lb", Namespace: "blue-web", Labels: map[string]string{v1alpha1.LabelServiceProxy: v1alpha1.ServiceProxy}},
			Spec: corev1.ServiceSpec{Type: corev1.ServiceTypeLoadBalancer, AllocateLoadBalancerNodePorts: new(false), Ports: []corev1.ServicePort{{Port: 80}}}},
		pod("web", func(p *corev1.Pod) {
			p.Annotations = map[string]string{v1alpha1.AnnotationAddress: "10.0.0.9"}
			p.Spec.RuntimeClassName = new("hyper")
		}),
		pod("plain", func(p *corev1.Pod) { p.Spec.RuntimeClassName = new("runc") }),
		port("10.0.0.20", func(p *v1alpha1.Port) {
			p.Spec.Node, p.Spec.Retain = "n1", false
			p.Spec.Pod = &v1alpha1.PodRef{Namespace: "blue-web", Name: "web", UID: "u"}
		}),
		port("10.0.0.21", func(p *v1alpha1.Port) {
			p.Spec.Node, p.Spec.Retain = "n2", false
			p.Spec.Pod = &v1alpha1.PodRef{Namespace: "blue-web", Name: "web2", UID: "v"}
		}),
		port("10.0.0.22", func(*v1alpha1.Port) {}),
		&corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: "plain"}},
		localVolume("v1", "n1"), localVolume("v2", "n2"),
		&v1alpha1.LocalStore{ObjectMeta: metav1.ObjectMeta{Name: "n2"}},
	)
	for _, o := range append(rights(t), objects...) {
		if err := w.admin.Create(ctx, o); err != nil {
			t.Fatalf("%T %s: %v", o, o.GetName(), err)
		}
	}
	return w
}

// rights are what a cluster gives its controllers, and no more: admission has to be able to
// apply and repair with them.
func rights(t testing.TB) []client.Object {
	t.Helper()
	var objects []client.Object
	for _, file := range []string{"tenancy", "storage-rights"} {
		text, err := os.ReadFile("../../../cluster/manifest/objects/" + file + ".yaml")
		if err != nil {
			t.Fatal(err)
		}
		for _, document := range strings.Split(string(text), "\n---\n") {
			u := &unstructured.Unstructured{}
			if err := yaml.Unmarshal([]byte(document), &u.Object); err != nil {
				t.Fatal(err)
			}
			objects = append(objects, u)
		}
	}
	return objects
}

func pod(name string, change func(*corev1.Pod)) *corev1.Pod {
	p := &corev1.Pod{ObjectMeta: metav1.ObjectMeta{Name: name, Namespace: "blue-web"},
		Spec: corev1.PodSpec{Containers: []corev1.Container{{Name: "c", Image: "h8s.local/busybox:1", Ports: []corev1.ContainerPort{{Name: "http", ContainerPort: 80}}}}}}
	change(p)
	return p
}

func port(address string, change func(*v1alpha1.Port)) *v1alpha1.Port {
	p := &v1alpha1.Port{ObjectMeta: metav1.ObjectMeta{Name: v1alpha1.PortName("default", address), Namespace: "tenant-blue"},
		Spec: v1alpha1.PortSpec{Network: "default", Addresses: []string{address}, Retain: true}}
	change(p)
	return p
}

func localVolume(name, node string) *v1alpha1.LocalVolume {
	return &v1alpha1.LocalVolume{ObjectMeta: metav1.ObjectMeta{Name: name, Finalizers: []string{v1alpha1.FinalizerLocal}},
		TypeMeta: metav1.TypeMeta{APIVersion: v1alpha1.GroupVersion.String(), Kind: "LocalVolume"},
		Spec:     v1alpha1.LocalVolumeSpec{Name: name, Node: node, SizeBytes: 1 << 20}}
}

// start runs the manager with admission in it, as h8s-controller does.
func (w *world) start(t *testing.T) {
	t.Helper()
	dir := t.TempDir()
	certificates(t, dir)
	address := controlplane.Address(t)
	mgr, err := ctrl.NewManager(controlplane.As(w.cfg, admission.ControllerUser, admission.ControllerGroup), ctrl.Options{Scheme: controlplane.Scheme(), Metrics: metricsserver.Options{BindAddress: "0"},
		HealthProbeBindAddress: "0", Controller: config.Controller{SkipNameValidation: new(true)}})
	if err != nil {
		t.Fatal(err)
	}
	prefixes := func(list ...string) (out []netip.Prefix) {
		for _, s := range list {
			out = append(out, netip.MustParsePrefix(s))
		}
		return out
	}
	ctx, cancel := context.WithCancel(t.Context())
	if err := admission.Setup(ctx, mgr, admission.Options{
		WebhookAddress: address, CertFile: filepath.Join(dir, "tls.crt"), KeyFile: filepath.Join(dir, "tls.key"), CAFile: filepath.Join(dir, "ca.crt"),
		ServiceCIDRs: prefixes("10.96.0.0/12", "fd00:10:96::/108"), ReservedCIDRs: prefixes("100.64.0.0/24", "10.244.0.0/16"),
		ClusterDomain: "cluster.local", FabricMTU: 1500,
	}); err != nil {
		cancel()
		t.Fatal(err)
	}
	done := make(chan error, 1)
	go func() { done <- mgr.Start(ctx) }()
	stopped := false
	w.stop = func() {
		if stopped {
			return
		}
		stopped = true
		cancel()
		if err := <-done; err != nil {
			t.Errorf("manager: %v", err)
		}
	}
	t.Cleanup(w.stop)
}

// eventually waits until f is content.
func eventually(t testing.TB, what string, f func() error) {
	t.Helper()
	deadline := time.Now().Add(wait)
	tick := time.NewTicker(100 * time.Millisecond)
	defer tick.Stop()
	for {
		err := f()
		if err == nil {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("%s: %v", what, err)
		}
		<-tick.C
	}
}

// off takes a defence away, "Kind/name" of group admissionregistration.k8s.io, and returns
// what puts it back.
func (w *world) off(t testing.TB, defence string) (restore func()) {
	t.Helper()
	kind, name, _ := strings.Cut(defence, "/")
	u := &unstructured.Unstructured{}
	u.SetAPIVersion("admissionregistration.k8s.io/v1")
	u.SetKind(kind)
	u.SetName(name)
	if err := w.admin.Get(context.Background(), client.ObjectKeyFromObject(u), u); err != nil {
		t.Fatal(err)
	}
	kept := u.DeepCopy()
	if err := w.admin.Delete(context.Background(), u); err != nil {
		t.Fatal(err)
	}
	return func() {
		kept.SetResourceVersion("")
		kept.SetUID("")
		kept.SetManagedFields(nil)
		unstructured.RemoveNestedField(kept.Object, "status")
		if err := w.admin.Create(context.Background(), kept); err != nil && !apierrors.IsAlreadyExists(err) {
			t.Fatal(err)
		}
	}
}

// certificates writes a CA and a certificate for 127.0.0.1.
func certificates(t testing.TB, dir string) {
	t.Helper()
	write := func(name, kind string, der []byte) {
		if err := os.WriteFile(filepath.Join(dir, name), pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: der}), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	template := func(serial int64, name string) *x509.Certificate {
		return &x509.Certificate{SerialNumber: big.NewInt(serial), Subject: pkix.Name{CommonName: name},
			NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour), BasicConstraintsValid: true}
	}
	caKey, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	ca := template(1, "ca")
	ca.IsCA, ca.KeyUsage = true, x509.KeyUsageCertSign
	caDER, err := x509.CreateCertificate(rand.Reader, ca, ca, &caKey.PublicKey, caKey)
	if err != nil {
		t.Fatal(err)
	}
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	leaf := template(2, "webhook")
	leaf.IPAddresses, leaf.ExtKeyUsage = []net.IP{net.IPv4(127, 0, 0, 1)}, []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth}
	der, err := x509.CreateCertificate(rand.Reader, leaf, ca, &key.PublicKey, caKey)
	if err != nil {
		t.Fatal(err)
	}
	keyDER, err := x509.MarshalECPrivateKey(key)
	if err != nil {
		t.Fatal(err)
	}
	write("ca.crt", "CERTIFICATE", caDER)
	write("tls.crt", "CERTIFICATE", der)
	write("tls.key", "EC PRIVATE KEY", keyDER)
}

// request is a PEM PKCS#10 request.
func request(t testing.TB, name string, organisations ...string) []byte {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	der, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{Subject: pkix.Name{CommonName: name, Organization: organisations}}, key)
	if err != nil {
		t.Fatal(err)
	}
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE REQUEST", Bytes: der})
}

// refused says whether err is a refusal by admission that says something.
func refused(err error, says string) error {
	switch {
	case err == nil:
		return fmt.Errorf("it went through")
	case !strings.Contains(err.Error(), "denied"):
		return fmt.Errorf("it failed, but admission did not refuse it: %w", err)
	case !strings.Contains(err.Error(), says):
		return fmt.Errorf("refused without saying %q: %w", says, err)
	}
	return nil
}
