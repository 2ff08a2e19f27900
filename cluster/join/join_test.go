package join

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/base64"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"math/big"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/containerd/errdefs"

	"github.com/hypernetes/hypernetes/cluster/token"
)

func TestMain(m *testing.M) {
	tokenPatience = 50 * time.Millisecond
	os.Exit(m.Run())
}

// authority is a certificate authority of a test's own.
type authority struct {
	cert *x509.Certificate
	key  *ecdsa.PrivateKey
	pem  []byte
}

func newAuthority(t testing.TB) authority {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	tmpl := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "test"}, NotBefore: time.Now().Add(-time.Minute), NotAfter: time.Now().Add(time.Hour),
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign,
	}
	der, err := x509.CreateCertificate(rand.Reader, tmpl, tmpl, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	return authority{cert, key, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})}
}

func (a authority) issue(t testing.TB, cn string, from, to time.Time) tls.Certificate {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	tmpl := &x509.Certificate{
		SerialNumber: big.NewInt(2), Subject: pkix.Name{CommonName: cn}, NotBefore: from, NotAfter: to,
		IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)}, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
	}
	der, err := x509.CreateCertificate(rand.Reader, tmpl, a.cert, key.Public(), a.key)
	if err != nil {
		t.Fatal(err)
	}
	return tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key}
}

// server answers as an API server does to one who joins: it says its authority is says,
// and is certified by a.
func server(t *testing.T, a authority, says []byte, bearer string) string {
	t.Helper()
	mux := http.NewServeMux()
	mux.HandleFunc("GET /api/v1/namespaces/kube-public/configmaps/cluster-info", func(w http.ResponseWriter, _ *http.Request) {
		_, _ = w.Write(clusterInfoOf(says))
	})
	mux.HandleFunc("GET /api/v1/nodes", func(w http.ResponseWriter, r *http.Request) {
		if r.Header.Get("Authorization") != "Bearer "+bearer {
			w.WriteHeader(http.StatusUnauthorized)
			return
		}
		w.WriteHeader(http.StatusForbidden)
	})
	mux.HandleFunc("GET /api/v1/nodes/{name}", func(w http.ResponseWriter, r *http.Request) {
		switch r.PathValue("name") {
		case "alive":
			_, _ = w.Write([]byte(`{"status":{"conditions":[{"type":"Ready","status":"True"}]}}`))
		case "lost":
			_, _ = w.Write([]byte(`{"status":{"conditions":[{"type":"Ready","status":"Unknown"}]}}`))
		default:
			w.WriteHeader(http.StatusNotFound)
		}
	})
	s := httptest.NewUnstartedServer(mux)
	s.TLS = &tls.Config{Certificates: []tls.Certificate{a.issue(t, "server", time.Now().Add(-time.Minute), time.Now().Add(time.Hour))}}
	s.StartTLS()
	t.Cleanup(s.Close)
	return s.URL
}

func clusterInfoOf(ca []byte) []byte {
	config := "clusters:\n- cluster:\n    certificate-authority-data: " + base64.StdEncoding.EncodeToString(ca) + "\n"
	b, _ := json.Marshal(map[string]any{"data": map[string]string{"kubeconfig": config}})
	return b
}

func TestAuthority(t *testing.T) {
	real, other := newAuthority(t), newAuthority(t)
	tok, err := token.New(real.pem)
	if err != nil {
		t.Fatal(err)
	}
	wrong := tok
	wrong.Secret = strings.Repeat("x", 16)
	for name, c := range map[string]struct {
		url, node string
		tok       token.Token
		want      error
	}{
		"good":            {server(t, real, real.pem, tok.Bearer()), "new", tok, nil},
		"lost node":       {server(t, real, real.pem, tok.Bearer()), "lost", tok, nil},
		"name taken":      {server(t, real, real.pem, tok.Bearer()), "alive", tok, ErrName},
		"other cluster":   {server(t, other, other.pem, tok.Bearer()), "new", tok, ErrPin},
		"wrong secret":    {server(t, real, real.pem, tok.Bearer()), "new", wrong, ErrToken},
		"more than asked": {server(t, real, append(append([]byte{}, other.pem...), real.pem...), tok.Bearer()), "new", tok, nil},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			ca, err := Authority(t.Context(), c.url, c.tok, c.node, nil)
			if !errors.Is(err, c.want) {
				t.Fatalf("%v, want %v", err, c.want)
			}
			if err == nil && string(ca) != string(real.pem) {
				t.Errorf("trusts more than the token names:\n%s", ca)
			}
			if err != nil && strings.Contains(err.Error(), c.tok.Secret) {
				t.Errorf("the secret is told: %v", err)
			}
		})
	}
}

// TestStolenAuthority is of one who shows the right authority but is not certified by it:
// the token must not be shown to him.
func TestStolenAuthority(t *testing.T) {
	real, other := newAuthority(t), newAuthority(t)
	tok, err := token.New(real.pem)
	if err != nil {
		t.Fatal(err)
	}
	_, err = Authority(t.Context(), server(t, other, real.pem, tok.Bearer()), tok, "new", nil)
	var unknown x509.UnknownAuthorityError
	if !errors.As(err, &unknown) {
		t.Errorf("%v, want an unknown authority", err)
	}
}

// signer is an API server that answers requests as told.
type signer struct {
	status string
	made   csr
}

func (s *signer) Create(_ context.Context, _ string, object, out any) error {
	s.made = object.(csr)
	out.(*csr).Metadata.Name = "one"
	return nil
}

func (s *signer) Get(_ context.Context, path string, out any) error {
	if path != requests+"/one" {
		return errdefs.ErrNotFound
	}
	return json.Unmarshal([]byte(s.status), out)
}

func TestCertificate(t *testing.T) {
	issued := base64.StdEncoding.EncodeToString([]byte("PEM"))
	s := &signer{status: `{"status":{"conditions":[{"type":"Approved"}],"certificate":"` + issued + `"}}`}
	cert, key, err := Certificate(t.Context(), s, Request{Name: "x", CN: "h8s:kubestack:x", Groups: []string{"h8s:kubestacks"}})
	if err != nil || string(cert) != "PEM" {
		t.Fatalf("%q %v", cert, err)
	}
	if _, err := tlsKey(key); err != nil {
		t.Error(err)
	}
	block, _ := pem.Decode(s.made.Spec.Request)
	req, err := x509.ParseCertificateRequest(block.Bytes)
	if err != nil || req.Subject.CommonName != "h8s:kubestack:x" || req.Subject.Organization[0] != "h8s:kubestacks" {
		t.Errorf("%+v %v", req, err)
	}
	s.status = `{"status":{"conditions":[{"type":"Denied","message":"not yours"}]}}`
	if _, _, err := Certificate(t.Context(), s, Request{}); !errdefs.IsPermissionDenied(err) || !strings.Contains(err.Error(), "not yours") {
		t.Errorf("denied: %v", err)
	}
	s.status = `{"status":{}}`
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Millisecond)
	defer cancel()
	if _, _, err := Certificate(ctx, s, Request{}); !errors.Is(err, context.DeadlineExceeded) || !strings.Contains(err.Error(), "h8s-controller") {
		t.Errorf("nobody approves: %v", err)
	}
}

func tlsKey(b []byte) (*ecdsa.PrivateKey, error) {
	block, _ := pem.Decode(b)
	if block == nil {
		return nil, fmt.Errorf("no PEM: %q", b)
	}
	return x509.ParseECPrivateKey(block.Bytes)
}

func TestFresh(t *testing.T) {
	a, other := newAuthority(t), newAuthority(t)
	now := time.Now()
	bundle := func(a authority, cn string, from, to time.Duration) []byte {
		c := a.issue(t, cn, now.Add(from), now.Add(to))
		return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: c.Certificate[0]})
	}
	for name, c := range map[string]struct {
		bundle []byte
		want   bool
	}{
		"new":               {bundle(a, "x", -time.Hour, 9*time.Hour), true},
		"with its key":      {append([]byte("-----BEGIN EC PRIVATE KEY-----\nAAAA\n-----END EC PRIVATE KEY-----\n"), bundle(a, "x", -time.Hour, 9*time.Hour)...), true},
		"old":               {bundle(a, "x", -8*time.Hour, 2*time.Hour), false},
		"expired":           {bundle(a, "x", -8*time.Hour, -time.Hour), false},
		"another's":         {bundle(a, "y", -time.Hour, 9*time.Hour), false},
		"another authority": {bundle(other, "x", -time.Hour, 9*time.Hour), false},
		"none":              {nil, false},
	} {
		if got := Fresh(c.bundle, a.pem, Request{CN: "x"}, now); got != c.want {
			t.Errorf("%s: %t", name, got)
		}
	}
}

// FuzzPinned reads what a server says of which nothing is known yet.
func FuzzPinned(f *testing.F) {
	a := newAuthority(f)
	hash, err := token.Hash(a.pem)
	if err != nil {
		f.Fatal(err)
	}
	f.Add(clusterInfoOf(a.pem))
	f.Add([]byte(`{"data":{"kubeconfig":"clusters: [{cluster: {}}]"}}`))
	f.Fuzz(func(t *testing.T, b []byte) {
		if ca, err := pinned(b, hash); err == nil && string(ca) != string(a.pem) {
			t.Errorf("another authority: %q", ca)
		}
	})
}
