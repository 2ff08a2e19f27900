package keystone_test

import (
	"net/http"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/containerd/errdefs"

	"github.com/hypernetes/hypernetes/identity/keystone"
	"github.com/hypernetes/hypernetes/identity/keystone/keystonetest"
	"github.com/hypernetes/hypernetes/identity/keystone/login"
)

// TestServiceLogsInAnew: when its own token is taken back, ends, or its password changes,
// without a review failing; and many at once log in once.
func TestServiceLogsInAnew(t *testing.T) {
	f := keystonetest.NewFake(t)
	k := keystonetest.Of(f)
	a := keystonetest.NewAdmin(t, k)
	own := a.ServiceUser()
	project := a.Project("default", "blue")
	u := a.User("default", "ann")
	a.Grant(project, u, "member")
	id := a.Token(a.Password(u, project)).ID
	var mu sync.Mutex
	// What the service was given last is taken from the wire, to be revoked.
	last := ""
	s := keystone.NewService(func() (login.Credentials, error) {
		mu.Lock()
		defer mu.Unlock()
		return own, nil
	}, func(rt http.RoundTripper) http.RoundTripper {
		return roundTripper(func(r *http.Request) (*http.Response, error) {
			resp, err := rt.RoundTrip(r)
			if err == nil && r.Method == http.MethodPost {
				mu.Lock()
				last = resp.Header.Get("X-Subject-Token")
				mu.Unlock()
			}
			return resp, err
		})
	})
	logins := f.Count("POST auth/tokens")
	var wg sync.WaitGroup
	for range 30 {
		wg.Go(func() {
			if _, err := s.Validate(t.Context(), id); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	if n := f.Count("POST auth/tokens") - logins; n != 1 {
		t.Errorf("%d logins", n)
	}
	// A token of its own refused at once is not replaced at every question; a little later it is.
	again := func(what string) {
		t.Helper()
		deadline := time.Now().Add(20 * time.Second)
		tick := time.NewTicker(50 * time.Millisecond)
		defer tick.Stop()
		for {
			_, err := s.Validate(t.Context(), id)
			if err == nil {
				return
			}
			if !errdefs.IsUnavailable(err) && !errdefs.IsUnauthorized(err) || time.Now().After(deadline) {
				t.Fatalf("%s: %v", what, err)
			}
			<-tick.C
		}
	}
	a.RevokeToken(last)
	again("revoked")
	// The password is changed at Keystone, and then in the file.
	a.Do(http.MethodPatch, "/users/"+own.UserID, map[string]any{"user": map[string]any{"password": "another"}}, nil)
	if _, err := s.Validate(t.Context(), id); err == nil || strings.Contains(err.Error(), own.Secret) {
		t.Errorf("with the old password: %v", err)
	}
	mu.Lock()
	own.Secret = "another"
	mu.Unlock()
	again("password changed")
	// It lives shorter than what it is renewed before: that is no reason to log in each time.
	f.Lifetime = 30 * time.Second
	a.Do(http.MethodPatch, "/users/"+own.UserID, map[string]any{"user": map[string]any{"password": "third"}}, nil)
	mu.Lock()
	own.Secret = "third"
	mu.Unlock()
	again("short tokens")
	logins = f.Count("POST auth/tokens")
	for range 10 {
		again("short tokens")
	}
	if n := f.Count("POST auth/tokens") - logins; n > 0 {
		t.Errorf("%d logins for 10 questions", n)
	}
	// Answers that are none, and then Keystone as before.
	for _, code := range []int{http.StatusInternalServerError, http.StatusTooManyRequests, http.StatusServiceUnavailable, http.StatusConflict} {
		f.Break(func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(code) })
		if _, err := s.Validate(t.Context(), id); err == nil || errdefs.IsNotFound(err) {
			t.Errorf("HTTP %d: %v", code, err)
		}
	}
	f.Break(nil)
	again("mended")
}

type roundTripper func(*http.Request) (*http.Response, error)

func (f roundTripper) RoundTrip(r *http.Request) (*http.Response, error) { return f(r) }
