package openstack

import (
	"strings"
	"testing"

	"github.com/hypernetes/hypernetes/test/e2e/testcloud"
)

// TestLeastPrivilege is TestSeeds with a controller whose account is no administrator but
// has one role in the tenant's project, as docs/openstack.md says under Credentials. It is
// changed to that and back as an operator would, while the node's Pods run.
func TestLeastPrivilege(t *testing.T) {
	c := testcloud.Up(t, 2)
	p := c.Project(t)
	// Only Neutron's policy knows the role: in the project it has no other.
	p.Grant("h8s-network")
	t.Cleanup(func() {
		if out, err := c.TryChange("--openstack-cloud=service", "--openstack-profile=full", "--keystone-cloud="); err != nil {
			t.Errorf("back to the full profile: %v\n%s", err, out)
		}
	})
	c.Change(t, "--openstack-cloud=least", "--openstack-profile=least", "--keystone-cloud=webhook")
	testcloud.Until(t, "doctor has nothing to say", func() error {
		out, err := c.TryH8S("doctor")
		if err == nil && !strings.Contains(out, "and Neutron at") {
			t.Logf("h8s doctor:\n%s", out)
		}
		return err
	})
	seeds(t, c, p)
}
