// Package openstack owns the way to a cloud's APIs: the credential, tokens, how long an
// answer may take and how long it may be, and what an error means. It must not know what
// is asked for.
package openstack

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"github.com/containerd/errdefs"
	"github.com/gophercloud/gophercloud/v2"
	"github.com/gophercloud/gophercloud/v2/openstack"
	"github.com/gophercloud/gophercloud/v2/openstack/config/clouds"
	"github.com/gophercloud/gophercloud/v2/openstack/identity/v3/tokens"
)

// Profiles of the credential.
const (
	// Full is an account with the role admin, whose one token serves every project: what it
	// makes it makes for the tenant's project.
	Full = "full"
	// Least is an account that has a role in each tenant's project and no other: every
	// project is served with a token of its own, so that a mistake of ours about whose a
	// Network is fails at the cloud.
	Least = "least"
)

const (
	defaultTimeout = time.Minute
	maxBody        = 16 << 20
	maxFile        = 1 << 20
	// maxProjects bounds the tokens that are kept.
	maxProjects = 1024
)

// Options of a Cloud.
type Options struct {
	// File is a clouds.yaml, Name which of its clouds.
	File, Name string
	// Profile is Full or Least; Full if empty.
	Profile string
	// Timeout bounds each request; a minute if zero.
	Timeout time.Duration
	// Transport of requests; of the process if nil.
	Transport *http.Transport
}

// Cloud makes clients. It asks nothing of the cloud before it must, so that a cloud that is
// away keeps nobody from starting.
type Cloud struct {
	o Options
	// mu guards projects, whose locks guard their own content.
	mu       sync.Mutex
	projects map[string]*project
}

type project struct {
	lock   chan struct{}
	client *gophercloud.ProviderClient
	where  gophercloud.EndpointOpts
	// services found, which costs a question.
	services map[string]*gophercloud.ServiceClient
}

// New reads the credential, to say at once what is wrong with it.
func New(o Options) (*Cloud, error) {
	switch o.Profile {
	case "":
		o.Profile = Full
	case Full, Least:
	default:
		return nil, fmt.Errorf("profile %q: want %s or %s: %w", o.Profile, Full, Least, errdefs.ErrInvalidArgument)
	}
	if o.Timeout == 0 {
		o.Timeout = defaultTimeout
	}
	c := &Cloud{o: o, projects: map[string]*project{}}
	if _, _, _, err := c.credential(""); err != nil {
		return nil, err
	}
	return c, nil
}

// Profile is Full or Least.
func (c *Cloud) Profile() string { return c.o.Profile }

// credential reads the file anew: it may have been exchanged.
func (c *Cloud) credential(projectID string) (gophercloud.AuthOptions, gophercloud.EndpointOpts, *http.Transport, error) {
	none := func(err error) (gophercloud.AuthOptions, gophercloud.EndpointOpts, *http.Transport, error) {
		return gophercloud.AuthOptions{}, gophercloud.EndpointOpts{}, nil, err
	}
	text, err := secret(c.o.File)
	if err != nil {
		return none(fmt.Errorf("cloud configuration: %w", err))
	}
	options := []clouds.ParseOption{clouds.WithCloudName(c.o.Name), clouds.WithCloudsYAML(bytes.NewReader(text)), clouds.WithLocations(c.o.File)}
	switch more, err := secret(filepath.Join(filepath.Dir(c.o.File), "secure.yaml")); {
	case err == nil:
		options = append(options, clouds.WithSecureYAML(bytes.NewReader(more)))
	case !errors.Is(err, fs.ErrNotExist):
		return none(fmt.Errorf("cloud configuration: %w", err))
	}
	if c.o.Profile == Least && projectID != "" {
		options = append(options, clouds.WithScope(&gophercloud.AuthScope{ProjectID: projectID}))
	}
	auth, where, tls, err := clouds.Parse(options...)
	if err != nil {
		return none(fmt.Errorf("cloud configuration %s: %w: %w", c.o.File, err, errdefs.ErrInvalidArgument))
	}
	if auth.IdentityEndpoint == "" {
		return none(fmt.Errorf("cloud configuration %s: cloud %s: auth.auth_url: want the URL of Keystone: %w", c.o.File, c.o.Name, errdefs.ErrInvalidArgument))
	}
	if c.o.Profile == Least && (auth.ApplicationCredentialID != "" || auth.ApplicationCredentialName != "" || auth.TokenID != "") {
		return none(fmt.Errorf("cloud configuration %s: cloud %s: an application credential or token is of one project: want a user's password for profile %s: %w",
			c.o.File, c.o.Name, Least, errdefs.ErrInvalidArgument))
	}
	auth.AllowReauth = true
	t := c.o.Transport
	if t == nil {
		t = http.DefaultTransport.(*http.Transport)
	}
	t = t.Clone()
	if tls != nil {
		t.TLSClientConfig = tls
	}
	// Some servers close idle connections without a word, and a POST is not sent again.
	t.IdleConnTimeout = 10 * time.Second
	t.ResponseHeaderTimeout = c.o.Timeout
	return auth, where, t, nil
}

// secret reads a file that only its owner may read.
func secret(path string) ([]byte, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return nil, err
	}
	if !info.Mode().IsRegular() || info.Mode().Perm()&0o077 != 0 {
		return nil, fmt.Errorf("%s holds a credential and has mode %v: want a file that nobody else may read, chmod 0600 %s: %w", path, info.Mode(), path, errdefs.ErrInvalidArgument)
	}
	return io.ReadAll(io.LimitReader(f, maxFile))
}

// project is where a project's token is kept.
func (c *Cloud) project(id string) *project {
	if c.o.Profile == Full {
		id = ""
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	p := c.projects[id]
	if p == nil {
		if len(c.projects) >= maxProjects {
			clear(c.projects)
		}
		p = &project{lock: make(chan struct{}, 1)}
		c.projects[id] = p
	}
	return p
}

// login gets a token; p's lock is held.
func (c *Cloud) login(ctx context.Context, p *project, projectID string) error {
	auth, where, transport, err := c.credential(projectID)
	if err != nil {
		return err
	}
	client, err := openstack.NewClient(auth.IdentityEndpoint)
	if err != nil {
		return fmt.Errorf("cloud %s: %w: %w", c.o.Name, err, errdefs.ErrInvalidArgument)
	}
	client.HTTPClient = http.Client{Timeout: c.o.Timeout, Transport: bounded{transport}}
	client.UserAgent.Prepend("hypernetes")
	if err := openstack.Authenticate(ctx, client, auth); err != nil {
		transport.CloseIdleConnections()
		return fmt.Errorf("log in at Keystone: %w", Classify(err))
	}
	p.client, p.where, p.services = client, where, map[string]*gophercloud.ServiceClient{}
	return nil
}

// forget makes the next request read the credential anew.
func forget(p *project, refused *gophercloud.ProviderClient) {
	p.lock <- struct{}{}
	if p.client == refused {
		p.client = nil
	}
	<-p.lock
}

// Services that clients are for.
const (
	Network      = "network"
	LoadBalancer = "load-balancer"
	Volume       = "block-storage"
	Identity     = "identity"
)

// volumeVersion is the microversion of Cinder's API that is asked for: the first whose
// attachments have a mode; releases have it from Stein on.
const volumeVersion = "3.54"

// Client asks one service, for one project.
type Client struct {
	project *project
	service *gophercloud.ServiceClient
}

// Client returns one. errdefs.ErrNotFound says that the cloud has no such service.
func (c *Cloud) Client(ctx context.Context, service, projectID string) (*Client, error) {
	p := c.project(projectID)
	select {
	case p.lock <- struct{}{}:
		defer func() { <-p.lock }()
	case <-ctx.Done():
		return nil, ctx.Err()
	}
	if p.client == nil {
		if err := c.login(ctx, p, projectID); err != nil {
			return nil, err
		}
	}
	s := p.services[service]
	if s == nil {
		var err error
		if s, err = find(p, service); err != nil {
			return nil, err
		}
		p.services[service] = s
	}
	return &Client{p, s}, nil
}

func find(p *project, service string) (*gophercloud.ServiceClient, error) {
	var s *gophercloud.ServiceClient
	var err error
	switch service {
	case Network:
		s, err = openstack.NewNetworkV2(p.client, p.where)
	case LoadBalancer:
		s, err = openstack.NewLoadBalancerV2(p.client, p.where)
	case Volume:
		if s, err = openstack.NewBlockStorageV3(p.client, p.where); err == nil {
			s.Microversion = volumeVersion
		}
	case Identity:
		s, err = openstack.NewIdentityV3(p.client, p.where)
	default:
		return nil, fmt.Errorf("service %q: %w", service, errdefs.ErrNotImplemented)
	}
	var none *gophercloud.ErrEndpointNotFound
	var none2 gophercloud.ErrEndpointNotFound
	if errors.As(err, &none) || errors.As(err, &none2) {
		return nil, fmt.Errorf("the catalogue of the cloud has no %s service: %w", service, errdefs.ErrNotFound)
	}
	return s, Classify(err)
}

// Account is whose token the client has: the user, and the project it is for, "" if it is
// for none.
func (c *Client) Account() (user, project string, err error) {
	result, ok := c.service.GetAuthResult().(tokens.CreateResult)
	if !ok {
		return "", "", fmt.Errorf("a token of another kind, %T: %w", c.service.GetAuthResult(), errdefs.ErrUnavailable)
	}
	u, err := result.ExtractUser()
	if err != nil {
		return "", "", fmt.Errorf("a token that names no user: %w: %w", err, errdefs.ErrUnavailable)
	}
	if p, err := result.ExtractProject(); err == nil && p != nil {
		project = p.ID
	}
	return u.ID, project, nil
}

// Do sends a request; path is below the service's version. Body and answer are JSON;
// answer may be nil.
func (c *Client) Do(ctx context.Context, method, path string, query url.Values, body, answer any) error {
	where := c.service.ServiceURL(strings.Split(path, "/")...)
	if len(query) > 0 {
		where += "?" + query.Encode()
	}
	o := &gophercloud.RequestOpts{OkCodes: []int{200, 201, 202, 204}}
	if body != nil {
		o.JSONBody = body
	}
	if answer != nil {
		o.JSONResponse = answer
	} else {
		o.KeepResponseBody = true
	}
	resp, err := c.service.Request(ctx, method, where, o)
	if err == nil && answer == nil && resp != nil {
		// Read to the end, or the connection cannot be used again.
		_, _ = io.Copy(io.Discard, resp.Body)
		resp.Body.Close()
	}
	if err = Classify(err); errdefs.IsUnauthorized(err) {
		forget(c.project, c.service.ProviderClient)
	}
	if err != nil {
		return fmt.Errorf("%s %s: %w", method, path, err)
	}
	return nil
}

// bounded refuses answers that are too long.
type bounded struct{ inner http.RoundTripper }

// RoundTrip implements http.RoundTripper.
func (b bounded) RoundTrip(r *http.Request) (*http.Response, error) {
	resp, err := b.inner.RoundTrip(r)
	if err == nil {
		resp.Body = &limited{resp.Body, maxBody}
	}
	return resp, err
}

type limited struct {
	io.ReadCloser
	left int
}

// Read implements io.Reader.
func (l *limited) Read(p []byte) (int, error) {
	n, err := l.ReadCloser.Read(p)
	if l.left -= n; l.left < 0 {
		return 0, fmt.Errorf("the answer is longer than %d bytes: %w", maxBody, errdefs.ErrUnavailable)
	}
	return n, err
}
