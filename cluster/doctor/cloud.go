package doctor

import (
	"cmp"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"strings"

	"github.com/containerd/errdefs"

	"github.com/hypernetes/hypernetes/cluster/settings"
	"github.com/hypernetes/hypernetes/identity/keystone/login"
)

// Dial reaches a network: the node's, which is not this process's.
type Dial func(ctx context.Context, network, address string) (net.Conn, error)

// CloudCredentials reads the cluster's own credentials at OpenStack and says what
// h8s-controller would not take.
func CloudCredentials(o settings.OpenStack) (login.Credentials, error) {
	st, err := os.Stat(o.CloudConfig)
	if err != nil {
		return login.Credentials{}, fmt.Errorf("openstack-cloud-config: %w: %w", err, errdefs.ErrInvalidArgument)
	}
	if mode := st.Mode(); !mode.IsRegular() || mode.Perm()&0o077 != 0 {
		return login.Credentials{}, fmt.Errorf("openstack-cloud-config: %s has mode %v and holds a secret: want a file that nobody else may read, chmod 600 it: %w", o.CloudConfig, mode, errdefs.ErrInvalidArgument)
	}
	return login.FromFile(o.CloudConfig, cmp.Or(o.KeystoneCloud, o.Cloud))
}

// cloud checks the credentials and, where the node's network can be used, that OpenStack
// answers there. One that does not answer keeps no node from starting: tenants' Networks
// and users wait for it.
func cloud(o settings.OpenStack, dial Dial) func(context.Context) Result {
	return func(ctx context.Context) Result {
		c, err := CloudCredentials(o)
		if err != nil {
			return fail("H8S_OPENSTACK", err.Error(), "mend the file, or leave OpenStack: h8s up --openstack-cloud-config= --openstack-cloud=")
		}
		if dial == nil {
			return pass(fmt.Sprintf("the credentials of cloud %s are complete; h8s doctor of a node that is up tells whether OpenStack answers", o.Cloud))
		}
		said, err := AskCloud(ctx, c, dial)
		if errdefs.IsUnauthorized(err) {
			return warn("H8S_OPENSTACK", err.Error(), "mend "+o.CloudConfig+"; it is read anew, nothing needs a restart")
		} else if err != nil {
			return warn("H8S_OPENSTACK", err.Error(), "check that the node reaches "+c.URL+" and that OpenStack runs; what waits for it goes on then")
		}
		return pass(said)
	}
}

// AskCloud logs in at Keystone and asks for Neutron's versions.
func AskCloud(ctx context.Context, c login.Credentials, dial Dial) (string, error) {
	t, err := c.Transport()
	if err != nil {
		return "", err
	}
	t.Proxy, t.DialContext, t.DisableKeepAlives = nil, dial, true
	client := login.HTTP(t)
	issued, err := c.Login(ctx, client)
	if err != nil {
		return "", err
	}
	where, err := neutronURL(ctx, c, client, issued.ID)
	if err != nil {
		return "", err
	}
	if where == "" {
		return fmt.Sprintf("Keystone at %s answers; its catalogue has no Neutron", c.URL), nil
	}
	if _, err := ask(ctx, client, where, ""); err != nil {
		return "", fmt.Errorf("keystone answers, but Neutron does not: %w", err)
	}
	return fmt.Sprintf("Keystone at %s and Neutron at %s answer", c.URL, where), nil
}

// neutronURL looks into the catalogue. An unscoped token has none.
func neutronURL(ctx context.Context, c login.Credentials, client *http.Client, token string) (string, error) {
	if c.Method != login.ApplicationCredential && c.ProjectID == "" && c.ProjectName == "" {
		return "", nil
	}
	text, err := ask(ctx, client, c.URL+"/auth/catalog", token)
	if err != nil {
		return "", fmt.Errorf("keystone's catalogue: %w", err)
	}
	var answer struct {
		Catalog []struct {
			Type      string
			Endpoints []struct{ Interface, URL string }
		}
	}
	if err := json.Unmarshal(text, &answer); err != nil {
		return "", fmt.Errorf("keystone's catalogue: %w: %w", err, errdefs.ErrUnavailable)
	}
	for _, s := range answer.Catalog {
		for _, e := range s.Endpoints {
			if s.Type == "network" && e.Interface == "public" {
				return strings.TrimSuffix(e.URL, "/") + "/", nil
			}
		}
	}
	return "", nil
}

func ask(ctx context.Context, client *http.Client, url, token string) ([]byte, error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
	if err != nil {
		return nil, err
	}
	if token != "" {
		req.Header.Set("X-Auth-Token", token)
	}
	resp, err := client.Do(req)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", err, errdefs.ErrUnavailable)
	}
	defer resp.Body.Close()
	if resp.StatusCode >= http.StatusBadRequest {
		return nil, fmt.Errorf("%s: %s: %w", url, resp.Status, errdefs.ErrUnavailable)
	}
	return io.ReadAll(io.LimitReader(resp.Body, 1<<20))
}
