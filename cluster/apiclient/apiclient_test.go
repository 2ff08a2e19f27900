package apiclient

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"encoding/pem"
	"io"
	"math/big"
	"net/http"
	"net/http/httptest"
	"testing"
	"time"

	"github.com/containerd/errdefs"
)

func client(t *testing.T, h http.HandlerFunc) *Client {
	t.Helper()
	srv := httptest.NewTLSServer(h)
	t.Cleanup(srv.Close)
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	tmpl := &x509.Certificate{SerialNumber: big.NewInt(1), NotAfter: time.Now().Add(time.Hour)}
	der, err := x509.CreateCertificate(rand.Reader, tmpl, tmpl, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	kb, err := x509.MarshalECPrivateKey(key)
	if err != nil {
		t.Fatal(err)
	}
	c, err := New(Config{
		Server: srv.URL,
		CA:     pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: srv.Certificate().Raw}),
		Cert:   pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}),
		Key:    pem.EncodeToMemory(&pem.Block{Type: "EC PRIVATE KEY", Bytes: kb}),
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(c.Close)
	return c
}

func TestApply(t *testing.T) {
	var got string
	c := client(t, func(_ http.ResponseWriter, r *http.Request) {
		b, err := io.ReadAll(r.Body)
		if err != nil {
			t.Error(err)
		}
		got = r.Method + " " + r.URL.String() + " " + r.Header.Get("Content-Type") + " " + string(b)
	})
	if err := c.Apply(t.Context(), "/api/v1/x", "me", map[string]int{"a": 1}); err != nil {
		t.Fatal(err)
	}
	if want := `PATCH /api/v1/x?fieldManager=me&force=true application/apply-patch+yaml {"a":1}`; got != want {
		t.Errorf("%q, want %q", got, want)
	}
}

func TestAnswers(t *testing.T) {
	code, body := 200, `{"a":1}`
	c := client(t, func(w http.ResponseWriter, _ *http.Request) {
		w.WriteHeader(code)
		_, _ = io.WriteString(w, body)
	})
	var out struct{ A int }
	if err := c.Get(t.Context(), "/", &out); err != nil || out.A != 1 {
		t.Errorf("%v %v", out, err)
	}
	for c2, is := range map[int]func(error) bool{404: errdefs.IsNotFound, 422: errdefs.IsInvalidArgument, 403: errdefs.IsPermissionDenied, 409: errdefs.IsConflict, 500: errdefs.IsUnavailable} {
		code, body = c2, `{"message":"why"}`
		err := c.Get(t.Context(), "/", nil)
		if !is(err) || !Answered(err) {
			t.Errorf("%d: %v", c2, err)
		}
	}
	code, body = 500, `{"message":"failed to create typed patch object (a/b; x/v1, Kind=Y): .spec.z: field not declared in schema"}`
	if err := c.Get(t.Context(), "/", nil); !errdefs.IsInvalidArgument(err) {
		t.Errorf("a field that is not: %v", err)
	}
	code = 404
	if err := c.Delete(t.Context(), "/"); err != nil {
		t.Errorf("delete of what is not there: %v", err)
	}
	code, body = 500, "<html>"
	if err := c.Get(t.Context(), "/", nil); err == nil || err.Error() != "HTTP 500: <html>" {
		t.Error(err)
	}
}

func TestNewRefusesNonsense(t *testing.T) {
	if _, err := New(Config{}); err == nil {
		t.Error("no error")
	}
}

// TestComeAgain: a server that is busy is asked again, with the same body, but not for ever.
func TestComeAgain(t *testing.T) {
	var bodies []string
	busy := 2
	c := client(t, func(w http.ResponseWriter, r *http.Request) {
		b, _ := io.ReadAll(r.Body)
		bodies = append(bodies, string(b))
		if len(bodies) <= busy {
			w.Header().Set("Retry-After", "0")
			w.WriteHeader(http.StatusTooManyRequests)
		}
	})
	if err := c.Create(t.Context(), "/x", 7, nil); err != nil || len(bodies) != 3 || bodies[2] != "7" {
		t.Errorf("%v %v", bodies, err)
	}
	bodies, busy = nil, 1<<20
	if err := c.Get(t.Context(), "/x", nil); !errdefs.IsUnavailable(err) || len(bodies) != attempts {
		t.Errorf("%d %v", len(bodies), err)
	}
}
