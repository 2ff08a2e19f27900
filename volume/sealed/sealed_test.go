package sealed

import (
	"encoding/json"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"github.com/containerd/errdefs"
)

type content struct {
	Secret []byte `json:"secret,omitempty"`
}

var forMe = For{"d.example", "volume-1", "node-1"}

func key(t testing.TB) *Key {
	t.Helper()
	k, err := Generate()
	if err != nil {
		t.Fatal(err)
	}
	return k
}

func TestOpen(t *testing.T) {
	k := key(t)
	text, err := Seal(k.Public(), forMe, content{[]byte("AQBc==")})
	if err != nil {
		t.Fatal(err)
	}
	if strings.Contains(text, "volume-1") {
		t.Error("the box can be read")
	}
	var got content
	if err := k.Open(text, forMe, &got); err != nil || string(got.Secret) != "AQBc==" {
		t.Fatalf("open: %v, %+v", err, got)
	}
	flip := []byte(text)
	flip[len(flip)/2] ^= 1
	unknown, err := Seal(k.Public(), forMe, map[string]int{"other": 1})
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		name string
		key  *Key
		text string
		f    For
		is   func(error) bool
	}{
		{"other node's key", key(t), text, forMe, errdefs.IsInvalidArgument},
		{"other volume", k, text, For{forMe.Driver, "volume-2", forMe.Node}, errdefs.IsPermissionDenied},
		{"other node", k, text, For{forMe.Driver, forMe.Volume, "node-2"}, errdefs.IsPermissionDenied},
		{"other driver", k, text, For{"e.example", forMe.Volume, forMe.Node}, errdefs.IsPermissionDenied},
		{"changed", k, string(flip), forMe, errdefs.IsInvalidArgument},
		{"cut", k, text[:len(text)-4], forMe, errdefs.IsInvalidArgument},
		{"empty", k, "", forMe, errdefs.IsInvalidArgument},
		{"no base64", k, "%%%", forMe, errdefs.IsInvalidArgument},
		{"too long", k, strings.Repeat("A", maxText+1), forMe, errdefs.IsInvalidArgument},
		{"unknown field", k, unknown, forMe, errdefs.IsInvalidArgument},
	} {
		var v content
		if err := c.key.Open(c.text, c.f, &v); !c.is(err) || v.Secret != nil {
			t.Errorf("%s: %v, %+v", c.name, err, v)
		} else if strings.Contains(err.Error(), "AQBc") {
			t.Errorf("%s: the error tells the secret: %v", c.name, err)
		}
	}
	if _, err := Seal(k.Public(), forMe, content{make([]byte, maxText)}); !errdefs.IsOutOfRange(err) {
		t.Errorf("too large: %v", err)
	}
}

func TestParsePublic(t *testing.T) {
	k := key(t)
	if p, err := ParsePublic(k.Public().String()); err != nil || p != k.Public() {
		t.Errorf("%v, %v", p, err)
	}
	for _, s := range []string{"", "AAAA", strings.Repeat("A", 43), strings.Repeat("A", 44), strings.Repeat("+", 43), strings.Repeat("_", 43)} {
		if _, err := ParsePublic(s); !errdefs.IsInvalidArgument(err) {
			t.Errorf("%q: %v", s, err)
		}
	}
}

func TestLoad(t *testing.T) {
	path := filepath.Join(t.TempDir(), "key")
	keys := make([]*Key, 8)
	var all sync.WaitGroup
	for i := range keys {
		all.Go(func() {
			var err error
			if keys[i], err = Load(path); err != nil {
				t.Error(err)
			}
		})
	}
	all.Wait()
	for _, k := range keys {
		if k == nil || *k != *keys[0] {
			t.Fatal("several keys were made")
		}
	}
	if info, err := os.Stat(path); err != nil || info.Mode() != 0o600 {
		t.Errorf("%v, %v", info.Mode(), err)
	}
	if left, _ := filepath.Glob(filepath.Join(filepath.Dir(path), ".key-*")); left != nil {
		t.Errorf("left: %v", left)
	}
	text, err := Seal(keys[0].Public(), forMe, content{})
	if err != nil {
		t.Fatal(err)
	}
	again, err := Load(path)
	if err != nil {
		t.Fatal(err)
	}
	if err := again.Open(text, forMe, &content{}); err != nil {
		t.Error(err)
	}

	for _, c := range []struct {
		text string
		mode os.FileMode
		is   func(error) bool
	}{
		{"", 0o600, errdefs.IsDataLoss},
		{strings.Repeat("A", 42) + "\n", 0o600, errdefs.IsDataLoss},
		{strings.Repeat("A", 100), 0o600, errdefs.IsDataLoss},
		{strings.Repeat("A", 43) + "\n", 0o644, errdefs.IsPermissionDenied},
	} {
		bad := filepath.Join(t.TempDir(), "key")
		if err := os.WriteFile(bad, []byte(c.text), c.mode); err != nil {
			t.Fatal(err)
		}
		if _, err := Load(bad); !c.is(err) {
			t.Errorf("%q %s: %v", c.text, c.mode, err)
		}
	}
}

func FuzzOpen(f *testing.F) {
	k := key(f)
	good, err := Seal(k.Public(), forMe, content{[]byte("s")})
	if err != nil {
		f.Fatal(err)
	}
	f.Add(good, []byte(`{"v":1,"driver":"d.example","volume":"volume-1","node":"node-1","content":{"secret":"AA=="}}`))
	f.Add("", []byte(`{"v":1,"content":{}}{}`))
	f.Fuzz(func(t *testing.T, text string, plain []byte) {
		var v content
		if text != good {
			if err := k.Open(text, forMe, &v); err == nil {
				t.Errorf("%q opens", text)
			}
		}
		// What anybody can seal, for the key is public.
		var e envelope
		if strict(plain, &e) == nil {
			_ = strict(e.Content, &v)
			_, _ = json.Marshal(v)
		}
	})
}
