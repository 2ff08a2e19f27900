// Package controlplane starts etcd and kube-apiserver, the same binaries the nodes run,
// for tests of controllers: no kubelet, no controller manager. It must not know what is
// tested.
package controlplane

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"fmt"
	"io"
	"io/fs"
	"math/big"
	mathrand "math/rand/v2"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	goruntime "runtime"
	"syscall"
	"testing"
	"time"

	apiextensionsv1 "k8s.io/apiextensions-apiserver/pkg/apis/apiextensions/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/types"
	clientgoscheme "k8s.io/client-go/kubernetes/scheme"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/clientcmd"
	clientcmdapi "k8s.io/client-go/tools/clientcmd/api"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/yaml"

	v1alpha1 "github.com/hypernetes/hypernetes/api/hypernetes/v1alpha1"
	"github.com/hypernetes/hypernetes/test/artifacts"
)

// Service ranges of the API server.
const (
	ServiceCIDR  = "10.96.0.0/12"
	ServiceCIDR6 = "fd00:10:96::/108"
)

// Start runs etcd and kube-apiserver until the test ends, with our CRDs served, RBAC on
// and two Service ranges. The configuration is a cluster administrator's (system:masters),
// who may impersonate; As makes other users'. It skips the test, saying why, where the
// binaries are not built. apiserver are further flags of kube-apiserver's.
//
// The API server listens on 127.0.0.1 and on any other address of the namespace the test
// is in at the time.
func Start(t testing.TB, apiserver ...string) *rest.Config {
	t.Helper()
	binary := filepath.Join(artifacts.Dir(), "bin", "kubernetes")
	if _, err := os.Stat(binary); err != nil {
		t.Skipf("etcd and kube-apiserver are not built (make build): %v", err)
	}
	dir := t.TempDir()
	p, err := newPKI(dir)
	if err != nil {
		t.Fatal(err)
	}
	ports := freePorts(t, 3)
	etcd := fmt.Sprintf("http://127.0.0.1:%d", ports[0])
	peer := fmt.Sprintf("http://127.0.0.1:%d", ports[1])
	start(t, dir, binary, "etcd", "--name=t", "--data-dir="+filepath.Join(dir, "etcd"),
		"--listen-client-urls="+etcd, "--advertise-client-urls="+etcd,
		"--listen-peer-urls="+peer, "--initial-advertise-peer-urls="+peer, "--initial-cluster=t="+peer,
		"--unsafe-no-fsync", "--log-level=warn")
	log := start(t, dir, binary, "kube-apiserver", append([]string{
		"--advertise-address=192.0.2.1", "--bind-address=0.0.0.0", fmt.Sprintf("--secure-port=%d", ports[2]),
		"--etcd-servers=" + etcd, "--tls-cert-file=" + p.path("server.crt"), "--tls-private-key-file=" + p.path("server.key"),
		"--client-ca-file=" + p.path("ca.crt"), "--authorization-mode=Node,RBAC",
		// There is no controller manager that would make default service accounts.
		"--disable-admission-plugins=ServiceAccount",
		"--service-cluster-ip-range=" + ServiceCIDR + "," + ServiceCIDR6,
		"--service-account-issuer=https://kubernetes.default.svc.cluster.local",
		"--service-account-key-file=" + p.path("sa.key"), "--service-account-signing-key-file=" + p.path("sa.key"),
		"--endpoint-reconciler-type=none", "--profiling=false", "--allow-privileged=true", "--v=1",
	}, apiserver...)...)

	cfg := &rest.Config{
		Host: fmt.Sprintf("https://127.0.0.1:%d", ports[2]),
		QPS:  500, Burst: 1000,
		TLSClientConfig: rest.TLSClientConfig{CAFile: p.path("ca.crt"), CertFile: p.path("admin.crt"), KeyFile: p.path("admin.key")},
	}
	if err := rest.LoadTLSFiles(cfg); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 3*time.Minute)
	defer cancel()
	if err := ready(ctx, cfg); err != nil {
		tail, _ := os.ReadFile(log)
		t.Fatalf("kube-apiserver: %v\n%s", err, tail[max(0, len(tail)-4000):])
	}
	if err := installCRDs(ctx, cfg); err != nil {
		t.Fatal(err)
	}
	return cfg
}

// As is the configuration of another user, by impersonation.
func As(cfg *rest.Config, user string, groups ...string) *rest.Config {
	c := rest.CopyConfig(cfg)
	c.Impersonate = rest.ImpersonationConfig{UserName: user, Groups: groups}
	return c
}

// Scheme knows Kubernetes' objects, ours and CRDs.
func Scheme() *runtime.Scheme {
	s := runtime.NewScheme()
	for _, add := range []func(*runtime.Scheme) error{clientgoscheme.AddToScheme, v1alpha1.AddToScheme, apiextensionsv1.AddToScheme} {
		if err := add(s); err != nil {
			panic(err) // a bug: two types of one name
		}
	}
	return s
}

// Kubeconfig writes cfg to a file of the test's and returns its name.
func Kubeconfig(t testing.TB, cfg *rest.Config) string {
	t.Helper()
	c := clientcmdapi.NewConfig()
	c.Clusters["t"] = &clientcmdapi.Cluster{Server: cfg.Host, CertificateAuthorityData: cfg.CAData}
	c.AuthInfos["t"] = &clientcmdapi.AuthInfo{
		ClientCertificateData: cfg.CertData, ClientKeyData: cfg.KeyData,
		Impersonate: cfg.Impersonate.UserName, ImpersonateGroups: cfg.Impersonate.Groups,
	}
	c.Contexts["t"] = &clientcmdapi.Context{Cluster: "t", AuthInfo: "t"}
	c.CurrentContext = "t"
	path := filepath.Join(t.TempDir(), "kubeconfig")
	if err := clientcmd.WriteToFile(*c, path); err != nil {
		t.Fatal(err)
	}
	return path
}

// start runs a command of the multi-call binary until the test ends; its output goes to
// the file it returns.
func start(t testing.TB, dir, binary, name string, args ...string) string {
	t.Helper()
	out, err := os.Create(filepath.Join(dir, name+".log"))
	if err != nil {
		t.Fatal(err)
	}
	defer out.Close()
	cmd := &exec.Cmd{
		Path: binary, Args: append([]string{name}, args...), Dir: dir, Stdout: out, Stderr: out,
		Env: []string{"PATH=" + os.Getenv("PATH"), "HOME=" + dir},
		// A test that is killed takes them with it.
		SysProcAttr: &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL},
	}
	started, stop, done := make(chan error), make(chan struct{}), make(chan struct{})
	// The death signal comes when the thread that started it ends: one owner holds it.
	go func() {
		defer close(done)
		goruntime.LockOSThread()
		started <- cmd.Start()
		<-stop
		if cmd.Process != nil {
			_ = cmd.Process.Kill()
			_ = cmd.Wait()
		}
	}()
	t.Cleanup(func() { close(stop); <-done })
	if err := <-started; err != nil {
		t.Fatalf("start %s: %v", name, err)
	}
	return out.Name()
}

// ready waits until everything the API server makes at its start is there.
func ready(ctx context.Context, cfg *rest.Config) error {
	c, err := rest.HTTPClientFor(cfg)
	if err != nil {
		return err
	}
	for {
		body, err := get(ctx, c, cfg.Host+"/readyz")
		if err == nil && string(body) == "ok" {
			return nil
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("is not ready: %v, %s", err, body)
		case <-time.After(100 * time.Millisecond):
		}
	}
}

func get(ctx context.Context, c *http.Client, url string) ([]byte, error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
	if err != nil {
		return nil, err
	}
	resp, err := c.Do(req)
	if err != nil {
		return nil, err
	}
	defer resp.Body.Close()
	return io.ReadAll(io.LimitReader(resp.Body, 1<<16))
}

// installCRDs creates our CRDs and waits until they are served.
func installCRDs(ctx context.Context, cfg *rest.Config) error {
	c, err := client.New(cfg, client.Options{Scheme: Scheme()})
	if err != nil {
		return err
	}
	files, err := fs.Glob(v1alpha1.CRDs, "crds/*.yaml")
	if err != nil {
		return err
	}
	for _, name := range files {
		text, err := v1alpha1.CRDs.ReadFile(name)
		if err != nil {
			return err
		}
		crd := &apiextensionsv1.CustomResourceDefinition{}
		if err := yaml.UnmarshalStrict(text, crd); err != nil {
			return fmt.Errorf("%s: %w", name, err)
		}
		if err := c.Create(ctx, crd); err != nil && !apierrors.IsAlreadyExists(err) {
			return fmt.Errorf("%s: %w", name, err)
		}
	}
	for _, name := range files {
		text, _ := v1alpha1.CRDs.ReadFile(name)
		crd := &apiextensionsv1.CustomResourceDefinition{}
		_ = yaml.Unmarshal(text, crd)
		for !established(crd) {
			select {
			case <-ctx.Done():
				return fmt.Errorf("%s is not served: %w", crd.Name, ctx.Err())
			case <-time.After(50 * time.Millisecond):
			}
			if err := c.Get(ctx, types.NamespacedName{Name: crd.Name}, crd); err != nil {
				return err
			}
		}
	}
	return nil
}

func established(crd *apiextensionsv1.CustomResourceDefinition) bool {
	for _, c := range crd.Status.Conditions {
		if c.Type == apiextensionsv1.Established {
			return c.Status == apiextensionsv1.ConditionTrue
		}
	}
	return false
}

// Address is one on loopback that nobody listens on, for a server whose address is to be
// known before it is there.
func Address(t testing.TB) string {
	t.Helper()
	return fmt.Sprintf("127.0.0.1:%d", freePorts(t, 1)[0])
}

// freePorts are ports nobody listens on; they are held together so that they differ. They
// are below those the kernel gives to connections (and to listeners that ask for none in
// particular): on a busy machine one of those is soon somebody else's.
func freePorts(t testing.TB, n int) []int {
	t.Helper()
	ports := make([]int, 0, n)
	for range 1000 {
		l, err := net.Listen("tcp", fmt.Sprintf("0.0.0.0:%d", 20000+mathrand.IntN(10000)))
		if err != nil {
			continue
		}
		defer l.Close()
		if ports = append(ports, l.Addr().(*net.TCPAddr).Port); len(ports) == n {
			return ports
		}
	}
	t.Fatal("no free ports between 20000 and 29999")
	return nil
}

// pki is a throw-away authority with the keys the API server needs.
type pki struct {
	dir string
	ca  *x509.Certificate
	key *ecdsa.PrivateKey
}

func (p *pki) path(name string) string { return filepath.Join(p.dir, name) }

func newPKI(dir string) (*pki, error) {
	p := &pki{dir: dir}
	var err error
	if p.key, err = ecdsa.GenerateKey(elliptic.P256(), rand.Reader); err != nil {
		return nil, err
	}
	p.ca = template("test-ca")
	p.ca.IsCA, p.ca.BasicConstraintsValid, p.ca.KeyUsage = true, true, x509.KeyUsageCertSign|x509.KeyUsageDigitalSignature
	der, err := x509.CreateCertificate(rand.Reader, p.ca, p.ca, p.key.Public(), p.key)
	if err != nil {
		return nil, err
	}
	if err := p.write("ca.crt", "CERTIFICATE", der); err != nil {
		return nil, err
	}
	server := template("kube-apiserver")
	server.DNSNames = []string{"localhost", "kubernetes", "kubernetes.default", "kubernetes.default.svc"}
	server.IPAddresses = []net.IP{net.IPv4(127, 0, 0, 1), net.IPv4(10, 96, 0, 1), net.IPv4(192, 0, 2, 1)}
	server.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth}
	admin := template("admin")
	admin.Subject.Organization = []string{"system:masters"}
	admin.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth}
	for name, c := range map[string]*x509.Certificate{"server": server, "admin": admin, "sa": nil} {
		if err := p.issue(name, c); err != nil {
			return nil, err
		}
	}
	return p, nil
}

// issue makes a key and, unless c is nil, a certificate for it.
func (p *pki) issue(name string, c *x509.Certificate) error {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return err
	}
	der, err := x509.MarshalECPrivateKey(key)
	if err != nil {
		return err
	}
	if err := p.write(name+".key", "EC PRIVATE KEY", der); err != nil || c == nil {
		return err
	}
	if der, err = x509.CreateCertificate(rand.Reader, c, p.ca, key.Public(), p.key); err != nil {
		return err
	}
	return p.write(name+".crt", "CERTIFICATE", der)
}

func (p *pki) write(name, kind string, der []byte) error {
	return os.WriteFile(p.path(name), pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: der}), 0o600)
}

func template(name string) *x509.Certificate {
	n, _ := rand.Int(rand.Reader, new(big.Int).Lsh(big.NewInt(1), 120))
	return &x509.Certificate{
		SerialNumber: n, Subject: pkix.Name{CommonName: name}, KeyUsage: x509.KeyUsageDigitalSignature,
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(24 * time.Hour),
	}
}
