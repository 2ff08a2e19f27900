package token

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"math/big"
	"strings"
	"testing"
	"time"

	"github.com/containerd/errdefs"
)

func authority(t testing.TB) []byte {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	tmpl := &x509.Certificate{SerialNumber: big.NewInt(1), NotAfter: time.Now().Add(time.Hour), IsCA: true, BasicConstraintsValid: true}
	der, err := x509.CreateCertificate(rand.Reader, tmpl, tmpl, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})
}

func TestPrintedIsParsed(t *testing.T) {
	ca := authority(t)
	tok, err := New(ca)
	if err != nil {
		t.Fatal(err)
	}
	again, err := Parse(" " + tok.Printed() + "\n")
	if err != nil || again != tok {
		t.Errorf("%+v %v, want %+v", again, err, tok)
	}
	if strings.Contains(fmt.Sprint(tok), tok.Secret) {
		t.Errorf("%v shows the secret", tok)
	}
	if hash, err := Hash(ca); err != nil || hash != tok.CAHash {
		t.Errorf("%s %v", hash, err)
	}
	if other, err := New(ca); err != nil || other.ID == tok.ID || other.Secret == tok.Secret {
		t.Error("two tokens are alike", err)
	}
}

func TestParseSaysWhatIsWrong(t *testing.T) {
	hash := strings.Repeat("0a", 32)
	for text, want := range map[string]string{
		"":                        "is empty",
		"abcdef.0123456789abcdef": "2 parts",
		"h8s2." + hash + ".abcdef.0123456789abcdef":          `version "h8s2"`,
		"h8s1." + hash[1:] + ".abcdef.0123456789abcdef":      "63 characters",
		"h8s1." + hash + ".ABCDEF.0123456789abcdef":          "the id",
		"h8s1." + hash + ".abcdef.0123456789abcde":           "cut off",
		"h8s1." + hash + ".abcdef.0123456789abcdef.trailing": "5 parts",
	} {
		_, err := Parse(text)
		if !errdefs.IsInvalidArgument(err) || !strings.Contains(err.Error(), want) {
			t.Errorf("%q: %v, want %q", text, err, want)
		}
		if err != nil && strings.Contains(err.Error(), "0123456789") {
			t.Errorf("the secret is told: %v", err)
		}
	}
}

// store is an API server with Secrets alone.
type store map[string]secret

func (s store) Get(_ context.Context, path string, out any) error {
	var answer any
	if name, ok := strings.CutPrefix(path, secrets+"/"); ok {
		one, ok := s[name]
		if !ok {
			return errdefs.ErrNotFound
		}
		answer = one
	} else {
		list := struct{ Items []secret }{}
		for _, v := range s {
			list.Items = append(list.Items, v)
		}
		answer = list
	}
	if out == nil {
		return nil
	}
	b, err := json.Marshal(answer)
	if err != nil {
		return err
	}
	return json.Unmarshal(b, out)
}

func (s store) Create(_ context.Context, path string, object, _ any) error {
	v := object.(secret)
	if path != secrets {
		return errdefs.ErrNotFound
	}
	s[v.Metadata.Name] = v
	return nil
}

func (s store) Delete(_ context.Context, path string) error {
	delete(s, strings.TrimPrefix(path, secrets+"/"))
	return nil
}

var _ API = store{}

func TestCreateListRevoke(t *testing.T) {
	s, now := store{}, time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)
	hash := strings.Repeat("0a", 32)
	short, long := Token{hash, "aaaaaa", "0123456789abcdef"}, Token{hash, "bbbbbb", "0123456789abcdef"}
	if err := Create(t.Context(), s, long, 0, "", now); err != nil {
		t.Fatal(err)
	}
	if err := Create(t.Context(), s, short, time.Hour, "rack 1", now); err != nil {
		t.Fatal(err)
	}
	got := s["bootstrap-token-aaaaaa"]
	for key, want := range map[string]string{
		"token-id": "aaaaaa", "token-secret": "0123456789abcdef", "expiration": "2026-01-02T04:04:05Z",
		"usage-bootstrap-authentication": "true", "auth-extra-groups": Group,
	} {
		if string(got.Data[key]) != want {
			t.Errorf("%s is %q, want %q", key, got.Data[key], want)
		}
	}
	list, err := List(t.Context(), s)
	if err != nil || len(list) != 2 || list[0].ID != "bbbbbb" || list[1].Description != "rack 1" {
		t.Fatalf("%+v %v", list, err)
	}
	if list[0].Expired(now.Add(100*time.Hour)) || list[1].Expired(now) || !list[1].Expired(now.Add(2*time.Hour)) {
		t.Errorf("expiry: %+v", list)
	}
	for _, text := range []string{"aaaaaa", long.Printed()} {
		if id, err := Revoke(t.Context(), s, text); err != nil || len(id) != 6 {
			t.Errorf("%s: %s %v", text, id, err)
		}
	}
	if len(s) != 0 {
		t.Errorf("left: %v", s)
	}
	if _, err := Revoke(t.Context(), s, "aaaaaa"); !errdefs.IsNotFound(err) {
		t.Errorf("an unknown one: %v", err)
	}
	if _, err := Revoke(t.Context(), s, "what"); !errdefs.IsInvalidArgument(err) {
		t.Errorf("nonsense: %v", err)
	}
}

func FuzzParse(f *testing.F) {
	f.Add("h8s1." + strings.Repeat("0a", 32) + ".abcdef.0123456789abcdef")
	f.Add("h8s1...")
	f.Fuzz(func(t *testing.T, text string) {
		if tok, err := Parse(text); err == nil && tok.Printed() != strings.TrimSpace(text) {
			t.Errorf("%q became %q", text, tok.Printed())
		}
	})
}

func FuzzHash(f *testing.F) {
	f.Add(authority(f))
	f.Fuzz(func(_ *testing.T, b []byte) { _, _ = Hash(b) })
}
