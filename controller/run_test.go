package controller

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
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	nodev1 "k8s.io/api/node/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"sigs.k8s.io/controller-runtime/pkg/client"

	v1alpha1 "github.com/hypernetes/hypernetes/api/hypernetes/v1alpha1"
	"github.com/hypernetes/hypernetes/test/controlplane"
)

// certificate makes one for 127.0.0.1 that signs itself.
func certificate(t *testing.T) (cert, key string) {
	t.Helper()
	k, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	c := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "webhook"}, NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign | x509.KeyUsageDigitalSignature,
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth}, IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)},
	}
	der, err := x509.CreateCertificate(rand.Reader, c, c, k.Public(), k)
	if err != nil {
		t.Fatal(err)
	}
	private, err := x509.MarshalECPrivateKey(k)
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	cert, key = filepath.Join(dir, "crt"), filepath.Join(dir, "key")
	for name, b := range map[string]*pem.Block{cert: {Type: "CERTIFICATE", Bytes: der}, key: {Type: "EC PRIVATE KEY", Bytes: private}} {
		if err := os.WriteFile(name, pem.EncodeToMemory(b), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	return cert, key
}

// TestRun is the whole process, admission included, with the rights it has in a cluster.
func TestRun(t *testing.T) {
	c := &cluster{t: t, cfg: controlplane.Start(t)}
	var err error
	if c.admin, err = client.New(c.cfg, client.Options{Scheme: controlplane.Scheme()}); err != nil {
		t.Fatal(err)
	}
	c.rights()
	c.create(&nodev1.RuntimeClass{ObjectMeta: metav1.ObjectMeta{Name: "hyper"}, Handler: "hyper"})
	cert, key := certificate(t)
	health := controlplane.Address(t)
	kubeconfig := controlplane.Kubeconfig(t, controlplane.As(c.cfg, "h8s:controller", "h8s:controllers", "system:authenticated"))
	o, err := Flags([]string{"--kubeconfig=" + kubeconfig, "--webhook-address=" + controlplane.Address(t), "--webhook-cert=" + cert, "--webhook-key=" + key,
		"--webhook-ca=" + cert, "--health-address=" + health, "--leader-elect=false"}, t.Output())
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	var wg sync.WaitGroup
	wg.Go(func() {
		if err := Run(ctx, o); err != nil {
			t.Error(err)
		}
	})
	t.Cleanup(func() { cancel(); wg.Wait() })
	c.eventually("ready", func() error {
		resp, err := http.Get("http://" + health + "/readyz")
		if err != nil {
			return err
		}
		defer resp.Body.Close()
		if resp.StatusCode != http.StatusOK {
			return http.ErrServerClosed
		}
		return nil
	})
	c.tenant("blue")
	c.pool(poolOf("all", 60, nil, "192.0.2.10-192.0.2.13"))
	ann, err := client.New(controlplane.As(c.cfg, "blue:ann", "h8s:tenant:blue:manager", "system:authenticated"), client.Options{Scheme: controlplane.Scheme()})
	if err != nil {
		t.Fatal(err)
	}
	n := networkOf("blue", "net1", "192.168.0.0/24")
	c.eventually("a manager's Network", func() error { return client.IgnoreAlreadyExists(ann.Create(t.Context(), n)) })
	c.networkSays(n, v1alpha1.NetworkActive, "Active", "")
	s := spaceOf("blue", "web", "net1")
	if err := ann.Create(t.Context(), s); err != nil {
		t.Fatal(err)
	}
	c.spaceSays(s, v1alpha1.NamespaceBound, "Bound", "")
	// The API server takes a moment to hear of policies.
	c.eventually("a manager's Service", func() error {
		try := serviceOf("web", "www")
		try.Spec.AllocateLoadBalancerNodePorts = nil
		dry := try.DeepCopy()
		if err := ann.Create(t.Context(), dry, client.DryRunAll); err != nil {
			return err
		}
		if dry.Labels[v1alpha1.LabelServiceProxy] == "" || dry.Spec.Ports[0].NodePort != 0 {
			return fmt.Errorf("not guarded yet: %v", dry.Labels)
		}
		return ann.Create(t.Context(), try)
	})
	svc := serviceOf("web", "www")
	c.ingress(svc, "192.0.2.10")
	if svc.Labels[v1alpha1.LabelServiceProxy] != v1alpha1.ServiceProxy || svc.Spec.Ports[0].NodePort != 0 {
		t.Errorf("%v %+v", svc.Labels, svc.Spec.Ports)
	}
	f := &v1alpha1.FloatingIP{ObjectMeta: metav1.ObjectMeta{Namespace: "tenant-blue", Name: "f"}}
	if err := ann.Create(t.Context(), f); err != nil {
		t.Fatal(err)
	}
	c.says(f, func() []metav1.Condition { return f.Status.Conditions }, "Ready", "False", "NoTarget", "")
	pod := podOf("web", "p")
	c.eventually("a manager's Pod", func() error { return client.IgnoreAlreadyExists(ann.Create(t.Context(), pod)) })
	if err := c.get(pod); err != nil || pod.Spec.RuntimeClassName == nil || *pod.Spec.RuntimeClassName != "hyper" {
		t.Errorf("%v %v", err, pod.Spec.RuntimeClassName)
	}
	// An unguarded one would be the end of all this.
	err = ann.Create(t.Context(), &corev1.Pod{ObjectMeta: metav1.ObjectMeta{Namespace: "web", Name: "host"},
		Spec: corev1.PodSpec{HostNetwork: true, Containers: pod.Spec.Containers}})
	if err == nil || !strings.Contains(err.Error(), "hostNetwork") {
		t.Errorf("a Pod on the node's network: %v", err)
	}
}
