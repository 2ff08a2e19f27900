package keystonetest

import (
	"net/http"
	"testing"

	"github.com/hypernetes/hypernetes/identity/keystone/login"
	"github.com/hypernetes/hypernetes/test/openstack/openstacktest"
)

// Real is the Keystone of the OpenStack that is up; it skips the test if there is none.
func Real(t testing.TB) Keystone {
	t.Helper()
	cloud := openstacktest.Up(t)
	admin, err := login.FromFile(cloud.ConfigFile(), "admin")
	if err != nil {
		t.Fatal(err)
	}
	transport := &http.Transport{DialContext: cloud.DialContext}
	t.Cleanup(transport.CloseIdleConnections)
	return Keystone{Admin: admin, Client: login.HTTP(transport), Wrap: func(http.RoundTripper) http.RoundTripper { return transport }}
}

// Each runs a test against a Fake, and against the real Keystone if there is one.
func Each(t *testing.T, test func(t *testing.T, k Keystone)) {
	t.Helper()
	t.Run("fake", func(t *testing.T) { test(t, Of(NewFake(t))) })
	t.Run("real", func(t *testing.T) { test(t, Real(t)) })
}
