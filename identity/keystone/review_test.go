package keystone

import (
	"context"
	"encoding/base64"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/containerd/errdefs"

	"github.com/hypernetes/hypernetes/identity/keystone/token"
)

// source is a Keystone of which only the answers matter.
type source struct {
	mu     sync.Mutex
	tokens map[string]token.Token
	err    error
	takes  time.Duration
	asked  atomic.Int64
}

func (s *source) Validate(ctx context.Context, id string) (token.Token, error) {
	s.asked.Add(1)
	s.mu.Lock()
	t, ok, err, takes := s.tokens[id], false, s.err, s.takes
	_, ok = s.tokens[id]
	s.mu.Unlock()
	if takes > 0 {
		select {
		case <-time.After(takes):
		case <-ctx.Done():
			return token.Token{}, fmt.Errorf("slow: %w", errdefs.ErrUnavailable)
		}
	}
	switch {
	case err != nil:
		return token.Token{}, err
	case !ok:
		return token.Token{}, errdefs.ErrNotFound
	}
	return t, nil
}

func (s *source) set(f func()) { s.mu.Lock(); f(); s.mu.Unlock() }

// claims maps projects to tenants.
type claims map[string]string

func (c claims) TenantOf(_ context.Context, id string) (string, error) {
	if t, ok := c[id]; ok {
		return t, nil
	}
	return "", errdefs.ErrNotFound
}

const (
	blueID = "464f6a8920d94963a6da6457f3c96d6e"
	annID  = "5c07a3bf12524da78ca06c12f76d37e7"
	annTok = "gAAAAABrAbzbPmSBFaCbGCrvlIBOVw2OCJSaitR5joZLFhbu76KWXSTmxOM2fJ4I"
)

func ann() token.Token {
	return token.Token{
		Methods: []string{"password"}, Expires: time.Now().Add(time.Hour), AuditIDs: []string{"IvNMpFtHQTKZhJ4musO5bw"},
		User:    token.Owned{Ref: token.Ref{ID: annID, Name: "ann"}, Domain: token.Ref{ID: "default", Name: "Default"}},
		Project: &token.Owned{Ref: token.Ref{ID: blueID, Name: "azure"}, Domain: token.Ref{ID: "default", Name: "Default"}},
		Roles:   []token.Role{{Ref: token.Ref{ID: "r1", Name: "reader"}}, {Ref: token.Ref{ID: "r2", Name: "member"}}},
	}
}

func newReviewer(t testing.TB, s *source) *Reviewer {
	t.Helper()
	r, err := NewReviewer(s, claims{blueID: "blue"}, StandardRoles(), nil)
	if err != nil {
		t.Fatal(err)
	}
	return r
}

func TestReview(t *testing.T) {
	s := &source{tokens: map[string]token.Token{annTok: ann()}}
	r := newReviewer(t, s)
	for range 3 {
		u, err := r.Review(t.Context(), annTok)
		if err != nil {
			t.Fatal(err)
		}
		if u.Username != "keystone:"+annID || u.UID != annID || !slices.Equal(u.Groups, []string{"h8s:tenant:blue:reader", "h8s:tenant:blue:member"}) {
			t.Errorf("%+v", u)
		}
		for k, want := range map[string]string{ExtraProject: blueID, ExtraProjectName: "azure", ExtraDomain: "default", ExtraProjectDomain: "default",
			ExtraUserName: "ann", ExtraAuditIDs: "IvNMpFtHQTKZhJ4musO5bw", ExtraTenant: "blue"} {
			if got := u.Extra[k]; len(got) != 1 || got[0] != want {
				t.Errorf("extra %s: %v, want %s", k, got, want)
			}
		}
		for k := range u.Extra {
			if k != strings.ToLower(k) {
				t.Errorf("extra %s: the API server wants lower case", k)
			}
		}
	}
	if n := s.asked.Load(); n != 1 {
		t.Errorf("Keystone was asked %d times", n)
	}
}

// TestRevocationIsBounded: a token that Keystone takes back, or that ends, is good for no
// longer than is promised.
func TestRevocationIsBounded(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := &source{tokens: map[string]token.Token{annTok: ann()}, takes: time.Second}
		r := newReviewer(t, s)
		if _, err := r.Review(t.Context(), annTok); err != nil {
			t.Fatal(err)
		}
		s.set(func() { delete(s.tokens, annTok) })
		began, good := time.Now(), time.Duration(0)
		for time.Since(began) < 5*time.Minute {
			if _, err := r.Review(t.Context(), annTok); err != nil {
				break
			}
			good = time.Since(began)
			time.Sleep(time.Second)
		}
		if good > PositiveTTL || good < PositiveTTL-5*time.Second {
			t.Errorf("good for %s after it was revoked, want at most %s", good, PositiveTTL)
		}
		// And what is new, is known soon.
		s.set(func() { s.tokens[annTok] = ann() })
		time.Sleep(NegativeTTL + time.Second)
		if _, err := r.Review(t.Context(), annTok); err != nil {
			t.Error(err)
		}
		// One that ends before the cache's time.
		short := ann()
		short.Expires = time.Now().Add(20 * time.Second)
		s.set(func() { s.tokens[annTok+"2"] = short })
		if _, err := r.Review(t.Context(), annTok+"2"); err != nil {
			t.Fatal(err)
		}
		time.Sleep(20 * time.Second)
		if _, err := r.Review(t.Context(), annTok+"2"); !errdefs.IsPermissionDenied(err) {
			t.Errorf("after its end: %v", err)
		}
	})
}

// TestTenantIsAskedEachTime: a Tenant that gives up its project has no users of it from
// then on, whatever is cached.
func TestTenantIsAskedEachTime(t *testing.T) {
	s := &source{tokens: map[string]token.Token{annTok: ann()}}
	c := claims{blueID: "blue"}
	r, err := NewReviewer(s, c, StandardRoles(), nil)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := r.Review(t.Context(), annTok); err != nil {
		t.Fatal(err)
	}
	delete(c, blueID)
	if _, err := r.Review(t.Context(), annTok); !errdefs.IsPermissionDenied(err) {
		t.Errorf("%v", err)
	}
	c[blueID] = "red"
	if u, err := r.Review(t.Context(), annTok); err != nil || u.Groups[0] != "h8s:tenant:red:reader" {
		t.Errorf("%+v %v", u, err)
	}
}

func TestKeystoneDown(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := &source{tokens: map[string]token.Token{annTok: ann()}}
		r := newReviewer(t, s)
		if _, err := r.Review(t.Context(), annTok); err != nil {
			t.Fatal(err)
		}
		s.set(func() { s.takes = time.Hour })
		// Who is known stays so for as long as promised, at no cost.
		if _, err := r.Review(t.Context(), annTok); err != nil {
			t.Error(err)
		}
		began := time.Now()
		for i := range trips {
			if _, err := r.Review(t.Context(), fmt.Sprint(annTok, i)); !errdefs.IsUnavailable(err) {
				t.Errorf("%v", err)
			}
		}
		if d := time.Since(began); d > trips*askTimeout {
			t.Errorf("took %s", d)
		}
		asked, began := s.asked.Load(), time.Now()
		for i := range 100 {
			if _, err := r.Review(t.Context(), fmt.Sprint(annTok, "x", i)); !errdefs.IsUnavailable(err) || errors.Is(err, ErrUnknown) {
				t.Fatalf("%v", err)
			}
		}
		if time.Since(began) > 0 || s.asked.Load() != asked {
			t.Errorf("an open breaker took %s and asked %d times", time.Since(began), s.asked.Load()-asked)
		}
		s.set(func() { s.takes = 0 })
		time.Sleep(pause + time.Second)
		s.set(func() { s.tokens[annTok+"y"] = ann() })
		if _, err := r.Review(t.Context(), annTok+"y"); err != nil {
			t.Errorf("after it came back: %v", err)
		}
		// Garbage is no reason to stop asking.
		for i := range 20 {
			if _, err := r.Review(t.Context(), fmt.Sprint(annTok, "z", i)); !errors.Is(err, ErrUnknown) {
				t.Errorf("%v", err)
			}
		}
	})
}

// TestAskedOnce: however many ask at once.
func TestAskedOnce(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := &source{tokens: map[string]token.Token{annTok: ann()}, takes: time.Second}
		r := newReviewer(t, s)
		// The first to ask goes away, and does not take the answer with it.
		ctx, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
		defer cancel()
		var wg sync.WaitGroup
		wg.Go(func() {
			if _, err := r.Review(ctx, annTok); !errdefs.IsUnavailable(err) {
				t.Errorf("who went away: %v", err)
			}
		})
		for range 50 {
			wg.Go(func() {
				time.Sleep(time.Millisecond)
				if _, err := r.Review(t.Context(), annTok); err != nil {
					t.Error(err)
				}
			})
		}
		wg.Wait()
		if n := s.asked.Load(); n != 1 {
			t.Errorf("asked %d times", n)
		}
	})
}

// TestCacheIsBounded: garbage does not push out who is known.
func TestCacheIsBounded(t *testing.T) {
	s := &source{tokens: map[string]token.Token{annTok: ann()}}
	r := newReviewer(t, s)
	if _, err := r.Review(t.Context(), annTok); err != nil {
		t.Fatal(err)
	}
	for i := range cached + 100 {
		if _, err := r.Review(t.Context(), fmt.Sprint(annTok, i)); !errors.Is(err, ErrUnknown) {
			t.Fatal(err)
		}
	}
	if p, n := len(r.positive.Keys()), len(r.negative.Keys()); p != 1 || n > cached {
		t.Errorf("%d and %d cached", p, n)
	}
}

func TestIdentify(t *testing.T) {
	for name, c := range map[string]struct {
		change func(*token.Token)
		roles  string // of a tenant, or empty if refused
		says   string
	}{
		"member":            {func(*token.Token) {}, "[reader member]", ""},
		"ended":             {func(t *token.Token) { t.Expires = time.Now().Add(-time.Second) }, "", "ended"},
		"unscoped":          {func(t *token.Token) { t.Project = nil }, "", "not scoped"},
		"system":            {func(t *token.Token) { t.System = true; t.Project = nil }, "", "system"},
		"system as well":    {func(t *token.Token) { t.System = true }, "", "system"},
		"domain":            {func(t *token.Token) { t.Domain = &token.Ref{ID: "d"}; t.Project = nil }, "", "domain"},
		"domain as project": {func(t *token.Token) { t.IsDomain = true }, "", "domain"},
		"trust":             {func(t *token.Token) { t.Trust = true }, "", "trust"},
		"oauth":             {func(t *token.Token) { t.OAuth1 = true }, "", "OAuth"},
		"bound":             {func(t *token.Token) { t.Bound = true }, "", "client certificate"},
		"credential":        {func(t *token.Token) { t.ApplicationCredential = &token.ApplicationCredential{} }, "[reader member]", ""},
		"access rules": {func(t *token.Token) {
			t.ApplicationCredential = &token.ApplicationCredential{Ref: token.Ref{ID: "c1"}, AccessRules: true}
		}, "", "access rules"},
		"no roles":   {func(t *token.Token) { t.Roles = nil }, "", "none of the token's roles"},
		"admin only": {func(t *token.Token) { t.Roles = []token.Role{{Ref: token.Ref{ID: "a", Name: "admin"}}} }, "", "admin"},
		"names of Kubernetes' own": {func(t *token.Token) {
			t.Roles = []token.Role{{Ref: token.Ref{ID: "system:masters", Name: "system:masters"}}, {Ref: token.Ref{ID: "x", Name: "h8s:tenant:red:manager"}}}
		}, "", "none of"},
		"a domain's own manager": {func(t *token.Token) {
			t.Roles = append(t.Roles, token.Role{Ref: token.Ref{ID: "x", Name: "manager"}, DomainID: "d"})
		}, "[reader member]", ""},
		"upper case":       {func(t *token.Token) { t.Roles = []token.Role{{Ref: token.Ref{ID: "x", Name: "Manager"}}} }, "", "none of"},
		"user with colons": {func(t *token.Token) { t.User.ID = "system:admin" }, "", "user"},
		"user with slash":  {func(t *token.Token) { t.User.ID = "../x" }, "", "user"},
		"user is empty":    {func(t *token.Token) { t.User.ID = "" }, "", "user"},
		"user is long":     {func(t *token.Token) { t.User.ID = strings.Repeat("a", 129) }, "", "user"},
		"odd project":      {func(t *token.Token) { t.Project.ID = "a:b" }, "", "project"},
		"system's name":    {func(t *token.Token) { t.User.Name = "system:admin" }, "[reader member]", ""},
	} {
		tok := ann()
		c.change(&tok)
		got, err := StandardRoles().Identify(tok, time.Now())
		switch {
		case c.roles == "":
			var refused *Refusal
			if !errors.As(err, &refused) || !strings.Contains(err.Error(), c.says) {
				t.Errorf("%s: %+v %v", name, got, err)
			}
		case err != nil || fmt.Sprint(got.Roles) != c.roles:
			t.Errorf("%s: %+v %v", name, got, err)
		}
		for k, v := range got.Extra {
			if slices.ContainsFunc(v, func(s string) bool { return strings.HasPrefix(s, "system:") }) {
				t.Errorf("%s: extra %s is %v", name, k, v)
			}
		}
	}
}

func TestParseRoles(t *testing.T) {
	got, err := ParseRoles("member=manager, 9fe2ff9e=reader")
	if err != nil || !maps.Equal(got, Roles{"member": "manager", "9fe2ff9e": "reader"}) {
		t.Errorf("%v %v", got, err)
	}
	tok := ann()
	if i, err := got.Identify(tok, time.Now()); err != nil || fmt.Sprint(i.Roles) != "[manager]" {
		t.Errorf("%+v %v", i, err)
	}
	if got, err := ParseRoles(""); err != nil || !maps.Equal(got, StandardRoles()) {
		t.Errorf("%v %v", got, err)
	}
	for _, text := range []string{"member", "member=admin", "=reader", "a=reader,a=member", "member=system:masters"} {
		if got, err := ParseRoles(text); !errdefs.IsInvalidArgument(err) {
			t.Errorf("%q: %v %v", text, got, err)
		}
	}
}

func TestPlausible(t *testing.T) {
	jwt := func(claims string) string {
		return "eyJhbGciOiJFUzI1NiJ9." + base64.RawURLEncoding.EncodeToString([]byte(claims)) + ".c2lnbmF0dXJl"
	}
	for text, want := range map[string]bool{
		annTok:                          true,
		annTok + "==":                   true,
		strings.Repeat("a", 32):         true,
		strings.Repeat("a", maxToken):   true,
		strings.Repeat("a", maxToken+1): false,
		"short":                         false,
		"":                              false,
		"abcdef.0123456789abcdef":       false, // a bootstrap token
		annTok + "\r\nX-Auth-Token: x":  false,
		annTok + " ":                    false,
		annTok + "/":                    false,
		jwt(`{"iss":"https://kubernetes.default.svc.cluster.local","sub":"system:serviceaccount:a:b"}`): false,
		jwt(`{"sub":"u","openstack_methods":["password"],"openstack_project_id":"p"}`):                  true,
		jwt(`{"sub":"u"}`): false,
		jwt(`{"iss":"x","openstack_methods":["password"]}`): false,
		jwt(`not JSON`):            false,
		"aaaaaaaa.!!!!.bbbbbbbbbb": false,
	} {
		if plausible(text) != want {
			t.Errorf("%.60q: %t", text, !want)
		}
	}
}

// FuzzReview: whatever is asked and whatever Keystone says, nothing panics, and nobody has a
// name or a group but those that are given out.
func FuzzReview(f *testing.F) {
	f.Add(annTok, []byte(`{"token":{"user":{"id":"u","domain":{"id":"d"}},"expires_at":"2126-11-21T02:32:30Z","project":{"id":"`+blueID+`"},"roles":[{"name":"manager","id":"x"}]}}`))
	f.Add("a.b.c", []byte(`{}`))
	f.Fuzz(func(t *testing.T, bearer string, body []byte) {
		tok, err := token.Decode(body)
		r := newReviewer(t, &source{tokens: map[string]token.Token{bearer: tok}, err: err})
		u, err := r.Review(t.Context(), bearer)
		if err != nil {
			if u.Username != "" || (len(bearer) > 20 && strings.Contains(err.Error(), bearer)) {
				t.Errorf("%+v %v", u, err)
			}
			return
		}
		if strings.Count(u.Username, ":") != 1 || !strings.HasPrefix(u.Username, "keystone:") || len(u.Groups) == 0 {
			t.Errorf("%+v", u)
		}
		for _, g := range u.Groups {
			if !slices.Contains([]string{"h8s:tenant:blue:reader", "h8s:tenant:blue:member", "h8s:tenant:blue:manager"}, g) {
				t.Errorf("group %s", g)
			}
		}
	})
}
