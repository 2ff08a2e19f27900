package login_test

import (
	"encoding/json"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/containerd/errdefs"

	"github.com/hypernetes/hypernetes/identity/keystone/keystonetest"
	"github.com/hypernetes/hypernetes/identity/keystone/login"
)

func TestCache(t *testing.T) {
	f := keystonetest.NewFake(t)
	k := keystonetest.Of(f)
	a := keystonetest.NewAdmin(t, k)
	p := a.Project("default", "blue")
	u := a.User("default", "ann")
	a.Grant(p, u, "member")
	cred := a.Password(u, p)
	now := time.Now()
	c := login.Cache{Dir: filepath.Join(t.TempDir(), "a", "b"), Now: func() time.Time { return now }}
	get := func() string {
		t.Helper()
		b, err := c.Token(t.Context(), cred, k.Client, false)
		if err != nil {
			t.Fatal(err)
		}
		return b.ID
	}
	// Many at once: one logs in.
	before := f.Count("POST auth/tokens")
	var wg sync.WaitGroup
	ids := make([]string, 20)
	for i := range ids {
		wg.Go(func() {
			b, err := c.Token(t.Context(), cred, k.Client, false)
			if err != nil {
				t.Error(err)
			}
			ids[i] = b.ID
		})
	}
	wg.Wait()
	first := ids[0]
	for _, id := range ids {
		if id != first {
			t.Error("two tokens")
		}
	}
	if n := f.Count("POST auth/tokens") - before; n != 1 {
		t.Errorf("%d logins", n)
	}
	// Readable by nobody else, and no secret in a name.
	files, _ := filepath.Glob(filepath.Join(c.Dir, "*"))
	if len(files) != 2 {
		t.Errorf("%v", files)
	}
	for _, f := range files {
		st, err := os.Stat(f)
		if err != nil || st.Mode().Perm() != 0o600 {
			t.Errorf("%s: %v %v", f, st.Mode(), err)
		}
		text, _ := os.ReadFile(f)
		if strings.Contains(string(text), cred.Secret) || strings.Contains(f, cred.Secret) {
			t.Errorf("%s holds the password", f)
		}
	}
	if st, _ := os.Stat(c.Dir); st.Mode().Perm() != 0o700 {
		t.Errorf("%v", st.Mode())
	}
	// A revoked one is noticed when it is looked at again.
	a.RevokeToken(first)
	if get() != first {
		t.Error("asked though it was checked a moment ago")
	}
	now = now.Add(6 * time.Minute)
	second := get()
	if second == first {
		t.Error("a revoked token is given out")
	}
	// A good one is checked and stays.
	now = now.Add(6 * time.Minute)
	if get() != second {
		t.Error("a good token was replaced")
	}
	// Keystone is away.
	f.Break(func(w http.ResponseWriter, _ *http.Request) { http.Error(w, "", http.StatusServiceUnavailable) })
	now = now.Add(6 * time.Minute)
	if get() != second {
		t.Error("a token is not given out because Keystone is away")
	}
	f.Break(nil)
	// Its end nears.
	now = now.Add(40 * time.Minute)
	third := get()
	if third == second {
		t.Error("a token about to end is given out")
	}
	if b, err := c.Token(t.Context(), cred, k.Client, true); err != nil || b.ID == third {
		t.Errorf("fresh: %v %v", b, err)
	}
	// Another project, another token; another's file is not believed.
	path := ""
	for _, f := range files {
		if strings.HasSuffix(f, ".json") {
			path = f
		}
	}
	forged, _ := json.Marshal(map[string]any{"token": "forged", "expires": now.Add(time.Hour), "issued": now, "checked": now})
	for name, spoil := range map[string]func() error{
		"readable by others": func() error { return os.WriteFile(path, forged, 0o644) },
		"a link": func() error {
			elsewhere := filepath.Join(t.TempDir(), "x")
			return firstError(os.WriteFile(elsewhere, forged, 0o600), os.Symlink(elsewhere, path))
		},
		"garbage":   func() error { return os.WriteFile(path, []byte("{"), 0o600) },
		"too large": func() error { return os.WriteFile(path, append(forged, make([]byte, 1<<20)...), 0o600) },
	} {
		_ = os.Remove(path)
		if err := spoil(); err != nil {
			t.Fatal(err)
		}
		if get() == "forged" {
			t.Errorf("%s: believed", name)
		}
	}
	// A wrong password is said, and nothing is kept.
	cred.UserID, cred.Secret = a.User("default", "eve").ID, "wrong"
	if b, err := c.Token(t.Context(), cred, k.Client, false); !errdefs.IsUnauthorized(err) || b.ID != "" || strings.Contains(err.Error(), "wrong\"") {
		t.Errorf("%v %v", b, err)
	}
}

func firstError(errs ...error) error {
	for _, err := range errs {
		if err != nil {
			return err
		}
	}
	return nil
}
