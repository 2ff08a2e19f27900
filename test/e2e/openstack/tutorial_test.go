package openstack

import (
	"context"
	"path/filepath"
	"testing"

	"github.com/hypernetes/hypernetes/test/e2e/testcloud"
)

// TestTutorial runs the tutorials about an OpenStack as they are written, in the checkout.
func TestTutorial(t *testing.T) {
	for _, x := range []struct{ page, heading string }{
		{"openstack.md", "Tutorial"}, {"storage.md", "Tutorial: volumes of Cinder"},
	} {
		t.Run(x.page, func(t *testing.T) { tutorial(t, x.page, x.heading) })
	}
}

func tutorial(t *testing.T, page, heading string) {
	c := testcloud.Up(t, 2)
	t.Cleanup(func() { // what a failure half-way left in the project
		if t.Failed() {
			out, err := c.TryH8S("tenant", "delete", "alpha", "--yes")
			t.Logf("tenant alpha deleted: %v\n%s", err, out)
			ctx, cancel := context.WithTimeout(context.Background(), testcloud.Patience)
			defer cancel()
			err = c.OpenStack.TryScript(ctx, "exec", "bash", "-c", "openstack --os-cloud alpha volume list -f value -c ID | xargs -r openstack --os-cloud alpha volume delete")
			t.Logf("volumes of alpha deleted: %v", err)
		}
	})
	root := filepath.Join("..", "..", "..")
	c.Tutorial(t, filepath.Join(root, "docs", page), heading, root, "HOME="+t.TempDir())
}
