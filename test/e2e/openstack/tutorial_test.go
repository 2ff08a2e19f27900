package openstack

import (
	"path/filepath"
	"testing"

	"github.com/hypernetes/hypernetes/test/e2e/testcloud"
)

// TestTutorial runs the tutorial of docs/openstack.md as it is written, in the checkout.
func TestTutorial(t *testing.T) {
	c := testcloud.Up(t, 2)
	t.Cleanup(func() { // what a failure half-way left in the project
		if t.Failed() {
			out, err := c.TryH8S("tenant", "delete", "alpha", "--yes")
			t.Logf("tenant alpha deleted: %v\n%s", err, out)
		}
	})
	root := filepath.Join("..", "..", "..")
	c.Tutorial(t, filepath.Join(root, "docs", "openstack.md"), root, "HOME="+t.TempDir())
}
