package pki

import (
	"crypto/tls"
	"crypto/x509"
	"os"
	"slices"
	"testing"
	"time"
)

var leaves = []Leaf{
	{File: "server", CA: "ca", CN: "s", Use: Server, Hosts: []string{"localhost", "127.0.0.1"}},
	{File: "client", CA: "ca", CN: "c", Groups: []string{"g"}, Use: Client},
}

func ensure(t *testing.T, s Store, l []Leaf) []string {
	t.Helper()
	wrote, err := s.Ensure([]string{"ca"}, l, []string{"signer"})
	if err != nil {
		t.Fatal(err)
	}
	return wrote
}

func TestEnsure(t *testing.T) {
	s := Store{Dir: t.TempDir() + "/pki"}
	if wrote := ensure(t, s, leaves); !slices.Equal(wrote, []string{"ca", "server", "client", "signer"}) {
		t.Errorf("first: %v", wrote)
	}
	if wrote := ensure(t, s, leaves); len(wrote) != 0 {
		t.Errorf("second wrote %v", wrote)
	}
	for _, name := range []string{"ca.key", "server.key", "client.key", "signer.key"} {
		st, err := os.Stat(s.Path(name))
		if err != nil || st.Mode().Perm() != 0o600 {
			t.Errorf("%s: %v %v", name, st.Mode(), err)
		}
	}
	changed := slices.Clone(leaves)
	changed[0].Hosts = []string{"localhost", "10.0.0.1"}
	if wrote := ensure(t, s, changed); !slices.Equal(wrote, []string{"server"}) {
		t.Errorf("after a change of hosts: %v", wrote)
	}
	later := Store{Dir: s.Dir, Now: func() time.Time { return time.Now().Add(leafLife - renewBefore + time.Hour) }}
	if wrote := ensure(t, later, changed); !slices.Equal(wrote, []string{"server", "client"}) {
		t.Errorf("near the end of their life: %v", wrote)
	}
}

func TestChainsVerify(t *testing.T) {
	s := Store{Dir: t.TempDir()}
	ensure(t, s, leaves)
	ca, err := os.ReadFile(s.Path("ca.crt"))
	if err != nil {
		t.Fatal(err)
	}
	roots := x509.NewCertPool()
	roots.AppendCertsFromPEM(ca)
	for name, opts := range map[string]x509.VerifyOptions{
		"server": {Roots: roots, DNSName: "localhost", KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth}},
		"client": {Roots: roots, KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth}},
	} {
		pair, err := tls.LoadX509KeyPair(s.Path(name+".crt"), s.Path(name+".key"))
		if err != nil {
			t.Fatal(err)
		}
		if _, err := pair.Leaf.Verify(opts); err != nil {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func TestBrokenAuthorityIsNotReplaced(t *testing.T) {
	s := Store{Dir: t.TempDir()}
	ensure(t, s, leaves)
	if err := os.WriteFile(s.Path("ca.key"), []byte("nonsense"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := s.Ensure([]string{"ca"}, nil, nil); err == nil {
		t.Error("a damaged authority was silently replaced or accepted")
	}
}

func TestUnknownAuthority(t *testing.T) {
	if _, err := (Store{Dir: t.TempDir()}).Ensure(nil, leaves[:1], nil); err == nil {
		t.Error("no error")
	}
}

// TestRenewalInterrupted is a crash between the two files of a pair that is replaced.
func TestRenewalInterrupted(t *testing.T) {
	s := Store{Dir: t.TempDir()}
	ensure(t, s, leaves)
	other, err := os.ReadFile(s.Path("client.key"))
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(s.Path("server.key"), other, 0o600); err != nil {
		t.Fatal(err)
	}
	if wrote := ensure(t, s, leaves); !slices.Equal(wrote, []string{"server"}) {
		t.Errorf("wrote %v", wrote)
	}
	if _, err := tls.LoadX509KeyPair(s.Path("server.crt"), s.Path("server.key")); err != nil {
		t.Error(err)
	}
}
