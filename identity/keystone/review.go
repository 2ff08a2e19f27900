// Package keystone owns who the bearer of a Keystone token is: it answers the API
// server's TokenReviews. Users are keystone:<user ID>, their groups h8s:tenant:<t>:<role>
// of the Tenant whose project the token is for. It must not know what a role may do.
//
// Who it does not know, it does not let in; when Keystone does not answer, it says so
// quickly. Users who log in otherwise never get here.
package keystone

import (
	"context"
	"crypto/hmac"
	"crypto/rand"
	"crypto/sha256"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/containerd/errdefs"
	"github.com/sony/gobreaker/v2"
	"golang.org/x/sync/semaphore"
	"golang.org/x/sync/singleflight"
	authenticationv1 "k8s.io/api/authentication/v1"
	"k8s.io/apimachinery/pkg/util/cache"

	v1alpha1 "github.com/hypernetes/hypernetes/api/hypernetes/v1alpha1"
	"github.com/hypernetes/hypernetes/identity/keystone/token"
)

// What bounds how long an answer is remembered. The API server remembers for
// APIServerCache and 10 s more, so that a token that is revoked stops within two minutes.
const (
	PositiveTTL    = 100 * time.Second
	NegativeTTL    = 10 * time.Second
	APIServerCache = 10 * time.Second
)

const (
	// cached bounds each of the two caches; an entry has about a kilobyte.
	cached = 8192
	// atOnce bounds what Keystone is asked at a time.
	atOnce = 16
	// askTimeout bounds one question; the API server waits longer.
	askTimeout = 5 * time.Second
	// trips opens the breaker after so many failures on end, and pause is for how long.
	trips = 3
	pause = 5 * time.Second
	// A Fernet token has some 200 bytes, a JWS token some 600.
	minToken, maxToken = 16, 2048
)

// Validator tells what a token is: errdefs.ErrNotFound if it is none.
type Validator interface {
	Validate(ctx context.Context, token string) (token.Token, error)
}

var _ Validator = (*Service)(nil)

// Tenants tells whose a project is: errdefs.ErrNotFound if no Tenant's.
type Tenants interface {
	TenantOf(ctx context.Context, projectID string) (string, error)
}

// Reviewer answers who a token is. It is safe for concurrent use.
type Reviewer struct {
	// Remember is how long an answer is good at most: PositiveTTL, unless it is set to less
	// before the first review.
	Remember time.Duration

	keystone Validator
	tenants  Tenants
	roles    Roles
	metrics  *Metrics

	key      []byte
	positive *cache.LRUExpireCache
	negative *cache.LRUExpireCache
	flight   singleflight.Group
	slots    *semaphore.Weighted
	breaker  *gobreaker.CircuitBreaker[token.Token]
}

// NewReviewer makes a Reviewer. metrics may be nil.
func NewReviewer(keystone Validator, tenants Tenants, roles Roles, metrics *Metrics) (*Reviewer, error) {
	if metrics == nil {
		metrics = NewMetrics(nil)
	}
	// With a key of its own: what is in memory is no list of hashes to try tokens against.
	key := make([]byte, sha256.Size)
	if _, err := rand.Read(key); err != nil {
		return nil, err
	}
	return &Reviewer{
		Remember: PositiveTTL,
		keystone: keystone, tenants: tenants, roles: roles, metrics: metrics, key: key,
		positive: cache.NewLRUExpireCache(cached), negative: cache.NewLRUExpireCache(cached),
		slots: semaphore.NewWeighted(atOnce),
		breaker: gobreaker.NewCircuitBreaker[token.Token](gobreaker.Settings{
			Name: "keystone", MaxRequests: 1, Timeout: pause,
			ReadyToTrip:  func(c gobreaker.Counts) bool { return c.ConsecutiveFailures >= trips },
			IsSuccessful: func(err error) bool { return err == nil || errdefs.IsNotFound(err) },
			OnStateChange: func(_ string, _, to gobreaker.State) {
				metrics.breaker.Set(map[bool]float64{true: 1}[to == gobreaker.StateOpen])
			},
		}),
	}, nil
}

// ErrUnknown says that a token is none of Keystone's.
var ErrUnknown = fmt.Errorf("no token of Keystone's that is good: %w", errdefs.ErrUnauthenticated)

// Review says who the bearer of a token is. The error is ErrUnknown, a Refusal, or, when it
// cannot be said, errdefs.ErrUnavailable.
func (r *Reviewer) Review(ctx context.Context, bearer string) (authenticationv1.UserInfo, error) {
	identity, err := r.identify(ctx, bearer)
	if err != nil {
		return authenticationv1.UserInfo{}, err
	}
	// Whose the project is, is asked each time: it is in memory, and changes by itself.
	tenant, err := r.tenants.TenantOf(ctx, identity.Project)
	if errdefs.IsNotFound(err) {
		return authenticationv1.UserInfo{}, refusef("user %s: project %s is no Tenant's: h8s tenant create NAME --project-id %s makes one", identity.User, identity.Project, identity.Project)
	} else if err != nil {
		return authenticationv1.UserInfo{}, fmt.Errorf("whose project %s is: %w: %w", identity.Project, err, errdefs.ErrUnavailable)
	}
	u := authenticationv1.UserInfo{Username: UserPrefix + identity.User, UID: identity.User, Extra: map[string]authenticationv1.ExtraValue{ExtraTenant: {tenant}}}
	for _, role := range identity.Roles {
		u.Groups = append(u.Groups, v1alpha1.Group(tenant, role))
	}
	for k, v := range identity.Extra {
		u.Extra[k] = v
	}
	return u, nil
}

// answer is what is remembered of a token.
type answer struct {
	identity Identity
	err      error
}

func (r *Reviewer) identify(ctx context.Context, bearer string) (Identity, error) {
	if !plausible(bearer) {
		r.metrics.reviews.WithLabelValues("implausible").Inc()
		return Identity{}, ErrUnknown
	}
	mac := hmac.New(sha256.New, r.key)
	mac.Write([]byte(bearer))
	key := [sha256.Size]byte(mac.Sum(nil))
	if v, ok := r.positive.Get(key); ok {
		a := v.(answer)
		if a.identity.Expires.After(time.Now()) {
			r.metrics.reviews.WithLabelValues("hit").Inc()
			return a.identity, nil
		}
	}
	if v, ok := r.negative.Get(key); ok {
		r.metrics.reviews.WithLabelValues("negative hit").Inc()
		return Identity{}, v.(answer).err
	}
	r.metrics.reviews.WithLabelValues("miss").Inc()
	// Asked once, however many ask, and not given up because the first of them went away. It
	// ends with its own time-out.
	done := r.flight.DoChan(string(key[:]), func() (any, error) {
		return r.ask(key, bearer), nil
	})
	select {
	case result := <-done:
		a := result.Val.(answer)
		return a.identity, a.err
	case <-ctx.Done():
		return Identity{}, fmt.Errorf("keystone is slow: %w: %w", context.Cause(ctx), errdefs.ErrUnavailable)
	}
}

func (r *Reviewer) ask(key [sha256.Size]byte, bearer string) answer {
	ctx, cancel := context.WithTimeout(context.Background(), askTimeout)
	defer cancel()
	// An open breaker does not wait for a turn.
	if r.breaker.State() == gobreaker.StateOpen {
		return r.unavailable(gobreaker.ErrOpenState)
	}
	if err := r.slots.Acquire(ctx, 1); err != nil {
		return r.unavailable(errors.New("too many questions at once"))
	}
	defer r.slots.Release(1)
	began := time.Now()
	t, err := r.breaker.Execute(func() (token.Token, error) { return r.keystone.Validate(ctx, bearer) })
	if !errors.Is(err, gobreaker.ErrOpenState) && !errors.Is(err, gobreaker.ErrTooManyRequests) {
		r.metrics.latency.Observe(time.Since(began).Seconds())
	}
	switch {
	case errdefs.IsNotFound(err):
		return r.refused(key, ErrUnknown)
	case err != nil:
		return r.unavailable(err)
	}
	identity, err := r.roles.Identify(t, time.Now())
	if err != nil {
		return r.refused(key, err)
	}
	// Counted from before the question: what was revoked since is forgotten in time.
	if ttl := min(r.Remember, time.Until(identity.Expires)) - time.Since(began); ttl > 0 {
		r.positive.Add(key, answer{identity: identity}, ttl)
	}
	return answer{identity: identity}
}

func (r *Reviewer) refused(key [sha256.Size]byte, err error) answer {
	r.positive.Remove(key)
	r.negative.Add(key, answer{err: err}, NegativeTTL)
	return answer{err: err}
}

// unavailable is not remembered: the breaker does that, for all tokens.
func (r *Reviewer) unavailable(err error) answer {
	r.metrics.failures.Inc()
	if errors.Is(err, gobreaker.ErrOpenState) || errors.Is(err, gobreaker.ErrTooManyRequests) {
		err = errors.New("keystone did not answer a moment ago and is not asked again yet")
	}
	if errdefs.IsUnavailable(err) {
		return answer{err: fmt.Errorf("the token cannot be checked: %w", err)}
	}
	return answer{err: fmt.Errorf("the token cannot be checked: %w: %w", err, errdefs.ErrUnavailable)}
}

// plausible says whether a text may be a token of Keystone's: Fernet, JWS or UUID. Tokens of
// service accounts and of OIDC issuers, which name their issuer, never reach Keystone.
func plausible(bearer string) bool {
	if len(bearer) < minToken || len(bearer) > maxToken {
		return false
	}
	dots := 0
	for i := range len(bearer) {
		switch c := bearer[i]; {
		case 'a' <= c && c <= 'z', 'A' <= c && c <= 'Z', '0' <= c && c <= '9', c == '-', c == '_', c == '=':
		case c == '.':
			dots++
		default:
			return false
		}
	}
	if dots == 0 {
		return true
	}
	if dots != 2 {
		return false // a bootstrap token, for example
	}
	_, rest, _ := strings.Cut(bearer, ".")
	payload, _, _ := strings.Cut(rest, ".")
	text, err := base64.RawURLEncoding.DecodeString(strings.TrimRight(payload, "="))
	if err != nil {
		return false
	}
	var claims struct {
		Issuer  json.RawMessage `json:"iss"`
		Methods json.RawMessage `json:"openstack_methods"`
	}
	return json.Unmarshal(text, &claims) == nil && claims.Issuer == nil && claims.Methods != nil
}
