package keystone

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"time"

	"github.com/containerd/errdefs"

	"github.com/hypernetes/hypernetes/identity/keystone/login"
	"github.com/hypernetes/hypernetes/identity/keystone/token"
)

// renewBefore is how long before its end the service's own token is replaced, a fifth of
// its life at most.
const renewBefore = time.Minute

// againAfter keeps a Keystone that refuses us from being asked for a token by every review.
const againAfter = 2 * time.Second

// Service asks Keystone with the controller's own credentials, which are read again for
// every login: who rotates them need not restart anything. It is safe for concurrent use.
type Service struct {
	load func() (login.Credentials, error)
	wrap func(http.RoundTripper) http.RoundTripper

	// turn is held by the one who logs in or looks at what follows.
	turn   chan struct{}
	at     login.Credentials
	client *http.Client
	own    login.Issued
	tried  time.Time
	failed error
}

// NewService makes a Service. wrap, if not nil, replaces the transport, which has time-outs
// and the certificates of the credentials.
func NewService(load func() (login.Credentials, error), wrap func(http.RoundTripper) http.RoundTripper) *Service {
	return &Service{load: load, wrap: wrap, turn: make(chan struct{}, 1)}
}

// access is what one request needs.
type access struct {
	client     *http.Client
	url, token string
}

// access logs in unless there is a token that is not stale, the one that Keystone refused.
func (s *Service) access(ctx context.Context, stale string) (access, error) {
	select {
	case s.turn <- struct{}{}:
		defer func() { <-s.turn }()
	case <-ctx.Done():
		return access{}, fmt.Errorf("keystone is slow: %w: %w", context.Cause(ctx), errdefs.ErrUnavailable)
	}
	margin := min(renewBefore, s.own.Expires.Sub(s.tried)/5)
	if s.own.ID != "" && s.own.ID != stale && time.Until(s.own.Expires) > margin {
		return access{s.client, s.at.URL, s.own.ID}, nil
	}
	if time.Since(s.tried) < againAfter {
		if s.failed != nil {
			return access{}, s.failed
		}
		if s.own.ID == stale {
			return access{}, fmt.Errorf("keystone refuses the token it gave just now to %s: %w", s.at, errdefs.ErrUnavailable)
		}
	}
	s.failed = s.login(ctx)
	if s.tried = time.Now(); s.failed != nil {
		return access{}, s.failed
	}
	return access{s.client, s.at.URL, s.own.ID}, nil
}

func (s *Service) login(ctx context.Context) error {
	c, err := s.load()
	if err != nil {
		return err
	}
	if s.client == nil || c != s.at {
		transport, err := c.Transport()
		if err != nil {
			return err
		}
		if s.client != nil {
			s.client.CloseIdleConnections()
		}
		var rt http.RoundTripper = transport
		if s.wrap != nil {
			rt = s.wrap(transport)
		}
		s.client, s.at = login.HTTP(rt), c
	}
	issued, err := c.Login(ctx, s.client)
	if err != nil {
		s.own = login.Issued{}
		return fmt.Errorf("log in for the cluster: %w", err)
	}
	if issued.Project == nil && !issued.System && issued.Domain == nil {
		return fmt.Errorf("log in for the cluster: %s has no project: name one in the cloud's auth section: %w", c, errdefs.ErrInvalidArgument)
	}
	s.own = issued
	return nil
}

// get asks for a path below the version. A token of ours that is not good any more is
// replaced, once.
func (s *Service) get(ctx context.Context, path string, header http.Header) (int, []byte, error) {
	stale := ""
	for {
		a, err := s.access(ctx, stale)
		if err != nil {
			return 0, nil, err
		}
		req, err := http.NewRequestWithContext(ctx, http.MethodGet, a.url+path, nil)
		if err != nil {
			return 0, nil, err
		}
		for k, v := range header {
			req.Header[k] = v
		}
		req.Header.Set("Accept", "application/json")
		req.Header.Set("User-Agent", "hypernetes")
		req.Header.Set("X-Auth-Token", a.token)
		status, body, err := read(a.client, req)
		if err != nil {
			return 0, nil, err
		}
		if status != http.StatusUnauthorized || stale != "" {
			return status, body, nil
		}
		stale = a.token
	}
}

func read(client *http.Client, req *http.Request) (int, []byte, error) {
	resp, err := client.Do(req)
	if err != nil {
		var u *url.Error
		if errors.As(err, &u) {
			err = u.Err // without the URL, which a project's ID may be in
		}
		return 0, nil, fmt.Errorf("keystone cannot be reached: %v: %w", err, errdefs.ErrUnavailable)
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(io.LimitReader(resp.Body, token.MaxBody+1))
	if err == nil && len(body) > token.MaxBody {
		err = fmt.Errorf("more than %d bytes", token.MaxBody)
	}
	if err != nil {
		return 0, nil, fmt.Errorf("keystone's answer cannot be read: %v: %w", err, errdefs.ErrUnavailable)
	}
	return resp.StatusCode, body, nil
}

// Validate asks what a token is. The error is errdefs.ErrNotFound if it is none that is
// good; any other means that Keystone could not tell. It never holds the token, and
// nothing of what Keystone says, as Keystone repeats tokens it does not know.
func (s *Service) Validate(ctx context.Context, subject string) (token.Token, error) {
	status, body, err := s.get(ctx, "/auth/tokens?nocatalog", http.Header{
		"X-Subject-Token": {subject},
		// Without it Keystone says of a token with access rules that there is none. We refuse
		// those too, but can say why.
		"Openstack-Identity-Access-Rules": {"1.0"},
	})
	switch {
	case err != nil:
		return token.Token{}, err
	case status == http.StatusOK:
		return token.Decode(body)
	case status == http.StatusNotFound:
		return token.Token{}, fmt.Errorf("no such token: %w", errdefs.ErrNotFound)
	case status == http.StatusForbidden:
		return token.Token{}, fmt.Errorf("the cluster's user may not validate tokens: give it the role service or admin in its project: %w", errdefs.ErrUnavailable)
	}
	return token.Token{}, fmt.Errorf("keystone answers HTTP %d: %w", status, errdefs.ErrUnavailable)
}

// Project is a Keystone project.
type Project struct {
	ID       string   `json:"id"`
	Name     string   `json:"name"`
	DomainID string   `json:"domain_id"`
	Enabled  bool     `json:"enabled"`
	IsDomain bool     `json:"is_domain"`
	Tags     []string `json:"tags"`
}

// maxProjects bounds what is read of a list.
const maxProjects = 10000

// Project asks for one. The error is errdefs.ErrNotFound if there is none,
// errdefs.ErrPermissionDenied if the cluster's user may not know.
func (s *Service) Project(ctx context.Context, id string) (Project, error) {
	var d struct{ Project *Project }
	if err := s.ask(ctx, "/projects/"+url.PathEscape(id), &d); err != nil {
		return Project{}, fmt.Errorf("project %s: %w", id, err)
	}
	if d.Project == nil || d.Project.ID != id {
		return Project{}, fmt.Errorf("project %s: keystone answers with something else: %w", id, errdefs.ErrUnavailable)
	}
	return *d.Project, nil
}

// Projects lists those that a query selects, for example tags=hypernetes.
func (s *Service) Projects(ctx context.Context, query url.Values) ([]Project, error) {
	var d struct {
		Projects  []Project
		Truncated bool
	}
	if err := s.ask(ctx, "/projects?"+query.Encode(), &d); err != nil {
		return nil, fmt.Errorf("projects: %w", err)
	}
	if len(d.Projects) > maxProjects {
		return nil, fmt.Errorf("projects: %d, want at most %d: choose fewer by a tag: %w", len(d.Projects), maxProjects, errdefs.ErrUnavailable)
	}
	return d.Projects, nil
}

// DomainEnabled asks whether a domain is enabled; a disabled one disables what is in it.
func (s *Service) DomainEnabled(ctx context.Context, id string) (bool, error) {
	var d struct{ Domain struct{ Enabled bool } }
	if err := s.ask(ctx, "/domains/"+url.PathEscape(id), &d); err != nil {
		return false, fmt.Errorf("domain %s: %w", id, err)
	}
	return d.Domain.Enabled, nil
}

func (s *Service) ask(ctx context.Context, path string, out any) error {
	status, body, err := s.get(ctx, path, nil)
	switch {
	case err != nil:
		return err
	case status == http.StatusNotFound:
		return fmt.Errorf("keystone has none: %w", errdefs.ErrNotFound)
	case status == http.StatusForbidden:
		return fmt.Errorf("the cluster's user may not ask: give it the role admin, or reader on its domain: %w", errdefs.ErrPermissionDenied)
	case status != http.StatusOK:
		return fmt.Errorf("keystone answers HTTP %d: %w", status, errdefs.ErrUnavailable)
	}
	if err := json.Unmarshal(body, out); err != nil {
		return fmt.Errorf("keystone's answer is not of the form wanted: %w", errdefs.ErrUnavailable)
	}
	return nil
}
