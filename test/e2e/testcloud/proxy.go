package testcloud

import (
	"bytes"
	"context"
	"fmt"
	"net"
	"net/http"
	"net/url"
	"os/exec"
	"testing"

	"github.com/hypernetes/hypernetes/network/netns"
	"github.com/hypernetes/hypernetes/test/openstack/faultproxy"
)

// table is what leads a node's requests to the proxy; what goes past it, on connections
// from before, is ended.
const table = `table ip h8s_faultproxy {
	chain away {
		type nat hook output priority -100;
		ip daddr %[1]s tcp dport { 5000, 9696, 9876 } dnat to %[2]s
	}
	chain past {
		type filter hook output priority 10;
		ip daddr %[1]s tcp dport { 5000, 9696, 9876 } reject with tcp reset
	}
}
`

// Proxy has all that the first node, where the controller runs, asks of Keystone, Neutron
// and Octavia go through a proxy until the test ends. The controller does not know: nothing
// is configured, and nothing started again.
func (c *Cloud) Proxy(t testing.TB) *faultproxy.Proxy {
	t.Helper()
	auth, err := c.OpenStack.AuthOptions("service")
	if err != nil {
		t.Fatal(err)
	}
	keystone, err := url.Parse(auth.IdentityEndpoint)
	if err != nil {
		t.Fatal(err)
	}
	ns, err := netns.Open(fmt.Sprintf("/proc/%d/ns/net", c.AnchorPID(t)))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = ns.Close() })
	l, err := ns.Listen(context.Background(), "tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	proxy := faultproxy.New(func(ctx context.Context, network, address string) (net.Conn, error) {
		return c.OpenStack.DialContext(ctx, network, address)
	})
	server := &http.Server{Handler: proxy}
	done := make(chan struct{})
	go func() {
		defer close(done)
		_ = server.Serve(l)
	}()
	t.Cleanup(func() { _ = server.Close(); <-done })
	nft := func(text string, args ...string) error {
		cmd := exec.Command("nsenter", append([]string{"--net=" + ns.Path(), "nft"}, args...)...)
		cmd.Stdin = bytes.NewBufferString(text)
		if out, err := cmd.CombinedOutput(); err != nil {
			return fmt.Errorf("nft %v: %w: %s", args, err, out)
		}
		return nil
	}
	if err := nft(fmt.Sprintf(table, keystone.Hostname(), l.Addr()), "-f", "-"); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := nft("", "delete", "table", "ip", "h8s_faultproxy"); err != nil {
			t.Error(err)
		}
	})
	return proxy
}
