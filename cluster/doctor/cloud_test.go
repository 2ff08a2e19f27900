package doctor

import (
	"context"
	"fmt"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/hypernetes/hypernetes/cluster/settings"
)

// TestCloud: what is wrong with the credentials fails, what is wrong with the cloud warns.
func TestCloud(t *testing.T) {
	var server *httptest.Server
	status := http.StatusCreated
	neutron := http.StatusOK
	server = httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		switch r.URL.Path {
		case "/v3/auth/tokens":
			w.Header().Set("X-Subject-Token", "gAAAAtoken")
			w.WriteHeader(status)
			fmt.Fprint(w, `{"token": {"methods": ["password"], "expires_at": "2100-01-01T00:00:00.000000Z", "issued_at": "2020-01-01T00:00:00.000000Z",
				"audit_ids": ["x"], "user": {"id": "u", "name": "u", "domain": {"id": "default", "name": "Default"}},
				"project": {"id": "p", "name": "p", "domain": {"id": "default", "name": "Default"}}, "roles": [{"id": "r", "name": "member"}]}}`)
		case "/v3/auth/catalog":
			if r.Header.Get("X-Auth-Token") != "gAAAAtoken" {
				t.Errorf("the catalogue is asked for without the token")
			}
			fmt.Fprintf(w, `{"catalog": [{"type": "network", "endpoints": [{"interface": "public", "url": "%s/neutron"}]}]}`, server.URL)
		case "/neutron/":
			w.WriteHeader(neutron)
		default:
			t.Errorf("asked for %s", r.URL)
		}
	}))
	defer server.Close()
	file := filepath.Join(t.TempDir(), "clouds.yaml")
	text := fmt.Sprintf("clouds: {service: {auth: {auth_url: %q, username: u, password: p, user_domain_name: Default, project_name: p, project_domain_name: Default}}}", server.URL+"/v3")
	if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	node := settings.OpenStack{CloudConfig: file, Cloud: "service"}
	dial := (&net.Dialer{}).DialContext
	away := func(context.Context, string, string) (net.Conn, error) { return nil, fmt.Errorf("no route") }
	for name, c := range map[string]struct {
		change  func(*settings.OpenStack)
		dial    Dial
		status  int
		neutron int
		verdict Verdict
		reason  string
	}{
		"answers":           {nil, dial, 201, 200, Pass, "Neutron at " + server.URL},
		"not up":            {nil, nil, 201, 200, Pass, "complete"},
		"away":              {nil, away, 201, 200, Warn, "no route"},
		"refused":           {nil, dial, 401, 200, Warn, "refuses"},
		"keystone is ill":   {nil, dial, 503, 200, Warn, "503"},
		"neutron is ill":    {nil, dial, 201, 503, Warn, "Neutron does not"},
		"no such cloud":     {func(o *settings.OpenStack) { o.Cloud = "other" }, dial, 201, 200, Fail, "other"},
		"file is not there": {func(o *settings.OpenStack) { o.CloudConfig += "x" }, dial, 201, 200, Fail, "no such file"},
	} {
		status, neutron = c.status, c.neutron
		o := node
		if c.change != nil {
			c.change(&o)
		}
		r := cloud(o, c.dial)(t.Context())
		if r.Verdict != c.verdict || !strings.Contains(r.Reason, c.reason) || strings.Contains(r.Reason+r.Remedy, "gAAAA") {
			t.Errorf("%s: %+v, want %s with %q", name, r, c.verdict, c.reason)
		}
	}
	if err := os.Chmod(file, 0o644); err != nil {
		t.Fatal(err)
	}
	if r := cloud(node, dial)(t.Context()); r.Verdict != Fail || !strings.Contains(r.Reason, "chmod 600") {
		t.Errorf("a file that others may read: %+v", r)
	}
}
