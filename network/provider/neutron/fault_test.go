package neutron

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/containerd/errdefs"

	"github.com/hypernetes/hypernetes/network/openstack"
	"github.com/hypernetes/hypernetes/network/provider"
	"github.com/hypernetes/hypernetes/network/provider/neutron/neutrontest"
	"github.com/hypernetes/hypernetes/network/subnet"
)

// TestFaults is about answers that are none, and that nothing is left or made twice.
func TestFaults(t *testing.T) {
	for name, x := range map[string]struct {
		fault  neutrontest.Fault
		is     func(error) bool
		reason string
		after  time.Duration
		text   string
	}{
		"500":       {neutrontest.Fault{Status: 500, Body: "<html>"}, errdefs.IsUnavailable, unavailable, 0, "HTTP 500"},
		"503":       {neutrontest.Fault{Status: 503, Header: map[string]string{"Retry-After": "7"}}, errdefs.IsUnavailable, unavailable, 7 * time.Second, "HTTP 503"},
		"429":       {neutrontest.Fault{Status: 429, Header: map[string]string{"Retry-After": "3"}}, errdefs.IsUnavailable, unavailable, 3 * time.Second, "HTTP 429"},
		"429 soon":  {neutrontest.Fault{Status: 429, Header: map[string]string{"Retry-After": "99999999999"}}, errdefs.IsUnavailable, unavailable, 0, "HTTP 429"},
		"403":       {neutrontest.Fault{Status: 403, Body: `{"NeutronError": {"type": "PolicyNotAuthorized", "message": "(rule:create_x) is disallowed by policy", "detail": ""}}`}, errdefs.IsPermissionDenied, forbidden, 0, "disallowed by policy"},
		"401":       {neutrontest.Fault{Status: 401}, errdefs.IsUnauthorized, credential, 0, "refuses the controller's credential"},
		"quota":     {neutrontest.Fault{Status: 409, Body: `{"NeutronError": {"type": "OverQuota", "message": "Quota exceeded", "detail": ""}}`}, errdefs.IsResourceExhausted, quota, 0, "quota at Neutron is used up"},
		"nonsense":  {neutrontest.Fault{Status: 200, Body: "{"}, errdefs.IsUnavailable, unavailable, 0, ""},
		"other":     {neutrontest.Fault{Status: 200, Body: `{"x": 1}`}, errdefs.IsUnavailable, unavailable, 0, "another shape"},
		"too long":  {neutrontest.Fault{Status: 200, Body: `{"x": "` + strings.Repeat("x", 17<<20) + `"}`}, errdefs.IsUnavailable, unavailable, 0, ""},
		"no answer": {neutrontest.Fault{Hang: true}, errdefs.IsUnavailable, unavailable, 0, "no answer"},
	} {
		t.Run(name, func(t *testing.T) {
			w := fake(t)
			c, err := openstack.New(openstack.Options{File: w.config, Name: w.full, Timeout: time.Second})
			if err != nil {
				t.Fatal(err)
			}
			p := w.provider(openstack.Full)
			p.o.Cloud = c
			n := w.network("blue", "net", "192.168.0.0/24")
			f := x.fault
			f.Times, f.Path = -1, "/v2.0/"
			w.fake.Fail(f)
			_, err = p.Ensure(t.Context(), n, subnet.Normalise(n.Spec, nil))
			if !x.is(err) || provider.Reason(err, "") != x.reason || !strings.Contains(err.Error(), x.text) {
				t.Errorf("%v (%s)", err, provider.Reason(err, ""))
			}
			if got := provider.RetryAfter(err); got != x.after && x.after > 0 || got > 5*time.Minute {
				t.Errorf("after %s", got)
			}
			if err != nil && (strings.Contains(err.Error(), neutrontest.Password) || len(err.Error()) > 2000) {
				t.Errorf("%v", err)
			}
			w.fake.Mend()
			w.ensure(p, n)
		})
	}
}

// TestLostAnswers loses the answer to each request in turn: what it did is found again.
func TestLostAnswers(t *testing.T) {
	for _, path := range []string{"networks", "subnets", "routers", "add_router_interface", "security-groups", "security-group-rules", "tags", "ports"} {
		t.Run(path, func(t *testing.T) {
			w := fake(t)
			n := w.network("blue", "net", "192.168.0.0/24")
			method := "POST"
			if path == "tags" || path == "add_router_interface" {
				method = "PUT"
			}
			w.fake.Fail(neutrontest.Fault{Times: 1, Method: method, Path: path, Status: 504, After: true})
			x := w.port(n, "192.168.0.5", w.host)
			for round := range 3 {
				st, err := w.provider(openstack.Full).Ensure(t.Context(), n, subnet.Normalise(n.Spec, nil))
				if err == nil {
					n.Status.ProviderNetworkID, n.Status.ProviderGroupID, n.Status.Subnets = st.NetworkID, st.GroupID, st.Subnets
					if _, err = w.provider(openstack.Full).EnsurePort(t.Context(), n, x); err == nil {
						break
					}
				}
				if !errdefs.IsUnavailable(err) || round == 2 {
					t.Fatal(err)
				}
			}
			for kind, want := range map[string]int{networks: 1, routers: 1, subnets: 1, groups: 1, ports: 1} {
				if got := len(w.ours(kind)); got != want {
					t.Errorf("%d %s, want %d", got, kind, want)
				}
			}
			if got := len(w.fake.Get("security-group-rules", nil)); got != 4 {
				t.Errorf("%d rules", got)
			}
		})
	}
}

// TestToken is about tokens that end, and credentials that are exchanged.
func TestToken(t *testing.T) {
	w := fake(t)
	p := w.provider(openstack.Full)
	n := w.network("blue", "net", "192.168.0.0/24")
	w.ensure(p, n)
	w.fake.ExpireTokens()
	w.ensure(p, n)

	good, err := os.ReadFile(w.config)
	if err != nil {
		t.Fatal(err)
	}
	write := func(s string) {
		t.Helper()
		if err := os.WriteFile(w.config, []byte(s), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	ensure := func(p *Provider) error {
		_, err := p.Ensure(t.Context(), n, subnet.Normalise(n.Spec, n.Status.Subnets))
		return err
	}
	write(strings.ReplaceAll(string(good), neutrontest.Password, "wrong"))
	q := w.provider(openstack.Full)
	if err := ensure(q); !errdefs.IsUnauthorized(err) || provider.Reason(err, "") != credential {
		t.Errorf("%v", err)
	}
	write(string(good))
	if err := ensure(q); err != nil {
		t.Errorf("the credential was mended: %v", err)
	}
	// The password may be in a file of its own.
	write(strings.ReplaceAll(string(good), "      password: "+neutrontest.Password+"\n", ""))
	beside := filepath.Join(filepath.Dir(w.config), "secure.yaml")
	if err := os.WriteFile(beside, []byte("clouds:\n  admin:\n    auth:\n      password: "+neutrontest.Password+"\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := ensure(w.provider(openstack.Full)); err != nil {
		t.Errorf("secure.yaml: %v", err)
	}
	write(string(good))
	if err := os.Chmod(w.config, 0o644); err != nil {
		t.Fatal(err)
	}
	if _, err := openstack.New(openstack.Options{File: w.config, Name: "admin"}); !errdefs.IsInvalidArgument(err) || !strings.Contains(err.Error(), "chmod 0600") {
		t.Errorf("%v", err)
	}
	// Without the role that binds, it is said that it is missing.
	if err := os.Chmod(w.config, 0o600); err != nil {
		t.Fatal(err)
	}
	c, err := openstack.New(openstack.Options{File: w.config, Name: "alice"})
	if err != nil {
		t.Fatal(err)
	}
	alice := w.provider(openstack.Full)
	alice.o.Cloud = c
	if _, err := alice.EnsurePort(t.Context(), n, w.port(n, "192.168.0.5", w.host)); !errdefs.IsPermissionDenied(err) || provider.Reason(err, "") != forbidden {
		t.Errorf("%v", err)
	}
	// Who is told to end ends.
	w.fake.Fail(neutrontest.Fault{Times: -1, Hang: true})
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error)
	go func() {
		_, err := p.Ensure(ctx, n, subnet.Normalise(n.Spec, n.Status.Subnets))
		done <- err
	}()
	cancel()
	if err := <-done; !errors.Is(err, context.Canceled) {
		t.Errorf("%v", err)
	}
}

// TestScope is that the least profile asks with a token of the tenant's own project.
func TestScope(t *testing.T) {
	w := fake(t)
	p := w.provider(openstack.Least)
	w.projects["green"] = strings.Repeat("c", 32)
	if _, err := p.Ensure(t.Context(), w.network("green", "net", "192.168.0.0/24"), nil); !errdefs.IsUnauthorized(err) || provider.Reason(err, "") != credential || !strings.Contains(err.Error(), "gives it its role") {
		t.Errorf("%v", err)
	}
	delete(w.projects, "green")
	w.fake.Requests()
	for tenant, project := range w.projects {
		n := w.network(tenant, "net", "192.168.0.0/24")
		w.ensure(p, n)
		w.plug(p, n, w.port(n, "192.168.0.5", w.host))
		for _, r := range w.fake.Requests() {
			if r.Project != project {
				t.Errorf("%+v, want project %s", r, project)
			}
		}
	}
}

// TestCalls bounds what a Pod's start costs Neutron.
func TestCalls(t *testing.T) {
	w := fake(t)
	w.fake.TagsAtOnce(true)
	p := w.provider(openstack.Full)
	n := w.network("blue", "net", "192.168.0.0/24")
	w.ensure(p, n)
	x := w.port(n, "192.168.0.5", w.host)
	w.plug(p, n, w.port(n, "192.168.0.6", w.host))
	w.fake.Requests()
	w.plug(p, n, x)
	if got := w.fake.Requests(); len(got) != 1 {
		t.Errorf("to make a port: %+v", got)
	}
	w.plug(p, n, x)
	if got := w.fake.Requests(); len(got) != 1 {
		t.Errorf("to look at a port: %+v", got)
	}
	w.ensure(p, n)
	if got := w.fake.Requests(); len(got) > 5 {
		t.Errorf("to look at a network: %+v", got)
	}
}
