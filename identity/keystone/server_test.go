package keystone

import (
	"bytes"
	"encoding/json"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	authenticationv1 "k8s.io/api/authentication/v1"

	"github.com/hypernetes/hypernetes/identity/keystone/login"
	"github.com/hypernetes/hypernetes/identity/keystone/token"
)

func post(t testing.TB, h http.Handler, body string) (int, authenticationv1.TokenReview, string) {
	t.Helper()
	w := httptest.NewRecorder()
	h.ServeHTTP(w, httptest.NewRequest(http.MethodPost, Path, strings.NewReader(body)))
	var out authenticationv1.TokenReview
	text := w.Body.String()
	_ = json.Unmarshal(w.Body.Bytes(), &out)
	return w.Code, out, text
}

func review(tok string) string {
	return `{"apiVersion":"authentication.k8s.io/v1","kind":"TokenReview","spec":{"token":"` + tok + `","audiences":["https://kubernetes.default.svc.cluster.local"]}}`
}

func TestHandler(t *testing.T) {
	s := &source{tokens: map[string]token.Token{annTok: ann()}}
	h := newReviewer(t, s).Handler()
	code, out, _ := post(t, h, review(annTok))
	if code != 200 || !out.Status.Authenticated || out.Status.User.Username != "keystone:"+annID || out.Kind != "TokenReview" || out.APIVersion != "authentication.k8s.io/v1" || out.Status.Error != "" {
		t.Errorf("%d %+v", code, out)
	}
	if out.Spec.Token != "" {
		t.Error("the token is in the answer")
	}
	// Nobody is let in by what is in the question.
	code, out, _ = post(t, h, `{"apiVersion":"authentication.k8s.io/v1","kind":"TokenReview","spec":{"token":"`+strings.Repeat("b", 100)+`"},"status":{"authenticated":true,"user":{"username":"x","groups":["system:masters"]}}}`)
	if code != 200 || out.Status.Authenticated || out.Status.User.Username != "" || out.Status.Error != "" {
		t.Errorf("%d %+v", code, out)
	}
	unscoped := ann()
	unscoped.Project = nil
	s.set(func() { s.tokens[annTok+"u"] = unscoped })
	if _, out, text := post(t, h, review(annTok+"u")); out.Status.Authenticated || !strings.Contains(out.Status.Error, "not scoped") || strings.Contains(text, annTok) {
		t.Errorf("%s", text)
	}
	s.set(func() { s.err = errdefs.ErrUnavailable })
	if _, out, text := post(t, h, review(annTok+"v")); out.Status.Authenticated || out.Status.Error == "" || strings.Contains(text, annTok) {
		t.Errorf("%s", text)
	}
	for name, body := range map[string]string{
		"nothing": "", "no JSON": "{" + annTok, "old": strings.Replace(review(annTok), "/v1", "/v1beta1", 1), "kind": strings.Replace(review(annTok), "TokenReview", "SubjectAccessReview", 1),
		"large": review(strings.Repeat("a", maxReview)),
	} {
		if code, out, text := post(t, h, body); code != http.StatusBadRequest || out.Status.Authenticated || strings.Contains(text, annTok) {
			t.Errorf("%s: %d %s", name, code, text)
		}
	}
	w := httptest.NewRecorder()
	h.ServeHTTP(w, httptest.NewRequest(http.MethodGet, Path, nil))
	if w.Code != http.StatusMethodNotAllowed {
		t.Errorf("GET: %d", w.Code)
	}
}

// TestHostileKeystone: whatever comes instead of an answer, nobody is let in, nothing
// panics, no token is repeated, and no redirect is followed with one.
func TestHostileKeystone(t *testing.T) {
	const ours = "gAAAAABrAbzours"
	followed := false
	elsewhere := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { followed = true; w.WriteHeader(200) }))
	defer elsewhere.Close()
	good, _ := json.Marshal(map[string]any{"token": map[string]any{"user": map[string]any{"id": "u"}, "expires_at": "2126-11-21T02:32:30Z", "project": map[string]any{"id": blueID}, "roles": []any{}}})
	for name, answer := range map[string]http.HandlerFunc{
		"an endless body": func(w http.ResponseWriter, _ *http.Request) {
			junk := bytes.Repeat([]byte(" "), 1<<16)
			for range 64 {
				_, _ = w.Write(junk)
			}
		},
		"a redirect": func(w http.ResponseWriter, r *http.Request) {
			http.Redirect(w, r, elsewhere.URL, http.StatusTemporaryRedirect)
		},
		"no JSON":         func(w http.ResponseWriter, _ *http.Request) { _, _ = w.Write([]byte("<html>" + annTok)) },
		"an empty object": func(w http.ResponseWriter, _ *http.Request) { _, _ = w.Write([]byte("{}")) },
		"a broken body": func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("Content-Length", "1000")
			_, _ = w.Write([]byte(`{"tok`))
		},
		"the token echoed": func(w http.ResponseWriter, r *http.Request) {
			http.Error(w, "Could not find token: "+r.Header.Get("X-Subject-Token"), http.StatusInternalServerError)
		},
		"always 401": func(w http.ResponseWriter, r *http.Request) {
			http.Error(w, r.Header.Get("X-Subject-Token"), http.StatusUnauthorized)
		},
		"forbidden": func(w http.ResponseWriter, r *http.Request) {
			http.Error(w, r.Header.Get("X-Subject-Token"), http.StatusForbidden)
		},
		"too many": func(w http.ResponseWriter, r *http.Request) { http.Error(w, "", http.StatusTooManyRequests) },
		"no roles": func(w http.ResponseWriter, r *http.Request) { _, _ = w.Write(good) },
		"deep JSON": func(w http.ResponseWriter, _ *http.Request) {
			_, _ = w.Write([]byte(`{"token":{"system":` + strings.Repeat("[", 1<<18)))
		},
	} {
		t.Run(name, func(t *testing.T) {
			server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
				if r.Method == http.MethodPost {
					w.Header().Set("X-Subject-Token", ours)
					w.WriteHeader(http.StatusCreated)
					_, _ = w.Write(good)
					return
				}
				answer(w, r)
			}))
			defer server.Close()
			s := NewService(func() (login.Credentials, error) {
				return login.Credentials{Source: "t", URL: server.URL + "/v3", Method: login.Password, UserID: "u", Secret: "s3cret", ProjectID: "p"}, nil
			}, nil)
			r, err := NewReviewer(s, claims{blueID: "blue"}, StandardRoles(), nil)
			if err != nil {
				t.Fatal(err)
			}
			code, out, text := post(t, r.Handler(), review(annTok))
			if code != 200 || out.Status.Authenticated || out.Status.Error == "" {
				t.Errorf("%d %s", code, text)
			}
			for _, secret := range []string{annTok, ours, "s3cret"} {
				if strings.Contains(text, secret) {
					t.Errorf("%s is in the answer: %s", secret, text)
				}
			}
		})
	}
	if followed {
		t.Error("a redirect was followed, with the token")
	}
}

// FuzzHandler: no question makes it panic or lets anybody in whom Keystone does not know.
func FuzzHandler(f *testing.F) {
	f.Add([]byte(review(annTok)))
	f.Add([]byte(`{"apiVersion":"authentication.k8s.io/v1","kind":"TokenReview","status":{"authenticated":true}}`))
	f.Fuzz(func(t *testing.T, body []byte) {
		h := newReviewer(t, &source{}).Handler()
		if _, out, text := post(t, h, string(body)); out.Status.Authenticated {
			t.Error(text)
		}
	})
}
