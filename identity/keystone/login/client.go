package login

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"strings"
	"time"
	"unicode"

	"github.com/containerd/errdefs"

	"github.com/hypernetes/hypernetes/identity/keystone/token"
)

// Issued is a token of one's own.
type Issued struct {
	// ID is the token itself, a secret.
	ID string
	token.Token
}

// String leaves the token itself out.
func (i Issued) String() string { return "token of " + i.User.ID }

// GoString leaves the token itself out.
func (i Issued) GoString() string { return i.String() }

// Transport reaches Keystone as the credentials say.
func (c Credentials) Transport() (*http.Transport, error) {
	t := &http.Transport{
		Proxy: http.ProxyFromEnvironment, ForceAttemptHTTP2: true,
		TLSHandshakeTimeout: 10 * time.Second, IdleConnTimeout: 30 * time.Second,
		MaxIdleConnsPerHost: 16, MaxResponseHeaderBytes: 64 << 10,
		TLSClientConfig: &tls.Config{MinVersion: tls.VersionTLS12, InsecureSkipVerify: c.Insecure},
	}
	if c.CACert != "" {
		text, err := os.ReadFile(c.CACert)
		if err != nil {
			return nil, fmt.Errorf("%s: cacert: %w", c.Source, err)
		}
		roots := x509.NewCertPool()
		if !roots.AppendCertsFromPEM(text) {
			return nil, fmt.Errorf("%s: cacert: %s holds no PEM certificate: %w", c.Source, c.CACert, errdefs.ErrInvalidArgument)
		}
		t.TLSClientConfig.RootCAs = roots
	}
	if c.Cert != "" {
		pair, err := tls.LoadX509KeyPair(c.Cert, first(c.Key, c.Cert))
		if err != nil {
			return nil, fmt.Errorf("%s: cert, key: %w", c.Source, err)
		}
		t.TLSClientConfig.Certificates = []tls.Certificate{pair}
	}
	return t, nil
}

// HTTP makes a client that follows no redirect: Go would hand the token's header on to
// wherever that leads.
func HTTP(t http.RoundTripper) *http.Client {
	return &http.Client{Transport: t, CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse }}
}

// Login asks Keystone for a token. The error is errdefs.ErrUnauthenticated if the
// credentials are not good, errdefs.ErrUnavailable if Keystone could not be asked.
func (c Credentials) Login(ctx context.Context, client *http.Client) (Issued, error) {
	if c.Method == Token && c.ProjectID+c.ProjectName == "" {
		return c.own(ctx, client)
	}
	body, err := json.Marshal(map[string]any{"auth": c.request()})
	if err != nil {
		return Issued{}, err
	}
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, c.URL+"/auth/tokens?nocatalog", bytes.NewReader(body))
	if err != nil {
		return Issued{}, err
	}
	req.Header.Set("Content-Type", "application/json")
	// A server that closed an idle connection meanwhile is asked again; the header is not sent.
	req.Header["X-Idempotency-Key"] = nil
	resp, text, err := do(client, req)
	if err != nil {
		return Issued{}, err
	}
	switch {
	case resp.StatusCode == http.StatusCreated:
	case resp.StatusCode == http.StatusUnauthorized || resp.StatusCode == http.StatusForbidden || resp.StatusCode == http.StatusNotFound:
		return Issued{}, fmt.Errorf("keystone at %s refuses %s: %s; check the user, the secret, the domains and the project of %s: %w",
			c.URL, c.who(), c.redact(reason(resp, text)), c.Source, errdefs.ErrUnauthenticated)
	case resp.StatusCode == http.StatusBadRequest:
		return Issued{}, fmt.Errorf("keystone at %s: %s; check %s: %w", c.URL, c.redact(reason(resp, text)), c.Source, errdefs.ErrInvalidArgument)
	default:
		return Issued{}, fmt.Errorf("keystone at %s: %s: %w", c.URL, c.redact(reason(resp, text)), errdefs.ErrUnavailable)
	}
	t, err := token.Decode(text)
	if err != nil {
		return Issued{}, fmt.Errorf("keystone at %s: %w", c.URL, err)
	}
	id := resp.Header.Get("X-Subject-Token")
	if id == "" {
		return Issued{}, fmt.Errorf("keystone at %s: the answer has no X-Subject-Token: is it Keystone? %w", c.URL, errdefs.ErrUnavailable)
	}
	return Issued{id, t}, nil
}

// own is the token one has, as it is: Keystone gives an unscoped one for it unless a scope
// is named.
func (c Credentials) own(ctx context.Context, client *http.Client) (Issued, error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, c.URL+"/auth/tokens?nocatalog", nil)
	if err != nil {
		return Issued{}, err
	}
	req.Header.Set("X-Auth-Token", c.Secret)
	req.Header.Set("X-Subject-Token", c.Secret)
	resp, text, err := do(client, req)
	switch {
	case err != nil:
		return Issued{}, err
	case resp.StatusCode == http.StatusUnauthorized || resp.StatusCode == http.StatusNotFound:
		return Issued{}, fmt.Errorf("keystone at %s: the token of %s is not good (any more): %w", c.URL, c.Source, errdefs.ErrUnauthenticated)
	case resp.StatusCode != http.StatusOK:
		return Issued{}, fmt.Errorf("keystone at %s: %s: %w", c.URL, c.redact(reason(resp, text)), errdefs.ErrUnavailable)
	}
	t, err := token.Decode(text)
	if err != nil {
		return Issued{}, fmt.Errorf("keystone at %s: %w", c.URL, err)
	}
	if t.Project == nil {
		return Issued{}, fmt.Errorf("%s: the token is for no project: name one by project_id (OS_PROJECT_ID), or by project_name and project_domain_name: %w", c.Source, errdefs.ErrInvalidArgument)
	}
	return Issued{c.Secret, t}, nil
}

// Check asks Keystone whether a token of one's own is still good.
func (c Credentials) Check(ctx context.Context, client *http.Client, id string) error {
	req, err := http.NewRequestWithContext(ctx, http.MethodHead, c.URL+"/auth/tokens", nil)
	if err != nil {
		return err
	}
	req.Header.Set("X-Auth-Token", id)
	req.Header.Set("X-Subject-Token", id)
	resp, _, err := do(client, req)
	switch {
	case err != nil:
		return err
	case resp.StatusCode == http.StatusOK || resp.StatusCode == http.StatusNoContent:
		return nil
	case resp.StatusCode == http.StatusUnauthorized || resp.StatusCode == http.StatusNotFound:
		return fmt.Errorf("the token is not good any more: %w", errdefs.ErrUnauthenticated)
	}
	return fmt.Errorf("keystone at %s: %s: %w", c.URL, resp.Status, errdefs.ErrUnavailable)
}

// do sends a request and reads the answer, within bounds.
func do(client *http.Client, req *http.Request) (*http.Response, []byte, error) {
	req.Header.Set("Accept", "application/json")
	req.Header.Set("User-Agent", "hypernetes")
	resp, err := client.Do(req)
	if err != nil {
		if cause := context.Cause(req.Context()); cause != nil && !errors.Is(cause, context.DeadlineExceeded) {
			return nil, nil, cause
		}
		return nil, nil, fmt.Errorf("keystone cannot be reached: %v: %w", err, errdefs.ErrUnavailable)
	}
	defer resp.Body.Close()
	text, err := io.ReadAll(io.LimitReader(resp.Body, token.MaxBody+1))
	if err != nil {
		return nil, nil, fmt.Errorf("keystone's answer broke off: %v: %w", err, errdefs.ErrUnavailable)
	}
	return resp, text, nil
}

// reason is what Keystone says of an error, bounded and on one line.
func reason(resp *http.Response, text []byte) string {
	var d struct {
		Error struct{ Message string }
	}
	if json.Unmarshal(text, &d) != nil || d.Error.Message == "" {
		return "HTTP " + resp.Status
	}
	message := strings.Map(func(r rune) rune {
		if unicode.IsPrint(r) {
			return r
		}
		return ' '
	}, d.Error.Message)
	if len(message) > 300 {
		message = strings.ToValidUTF8(message[:300], "") + "…"
	}
	return fmt.Sprintf("%s (HTTP %d)", message, resp.StatusCode)
}

// redact takes the secret out of what Keystone says: it repeats tokens it does not know.
func (c Credentials) redact(text string) string {
	if c.Secret == "" {
		return text
	}
	return strings.ReplaceAll(text, c.Secret, "…")
}

// request is the document that logs in.
func (c Credentials) request() map[string]any {
	named := func(id, name, domainID, domain string) map[string]any {
		if id != "" {
			return map[string]any{"id": id}
		}
		d := map[string]any{"name": domain}
		if domainID != "" {
			d = map[string]any{"id": domainID}
		}
		return map[string]any{"name": name, "domain": d}
	}
	user := func() map[string]any { return named(c.UserID, c.Username, c.UserDomainID, c.UserDomainName) }
	identity := map[string]any{"methods": []string{string(c.Method)}}
	switch c.Method {
	case Password:
		u := user()
		u["password"] = c.Secret
		identity["password"] = map[string]any{"user": u}
	case Token:
		identity["token"] = map[string]any{"id": c.Secret}
	case ApplicationCredential:
		a := map[string]any{"secret": c.Secret}
		if c.ApplicationCredentialID != "" {
			a["id"] = c.ApplicationCredentialID
		} else {
			a["name"], a["user"] = c.ApplicationCredentialName, user()
		}
		identity["application_credential"] = a
	}
	auth := map[string]any{"identity": identity}
	if c.ProjectID+c.ProjectName != "" {
		auth["scope"] = map[string]any{"project": named(c.ProjectID, c.ProjectName, c.ProjectDomainID, c.ProjectDomain)}
	}
	return auth
}
