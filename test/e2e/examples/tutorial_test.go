package examples

import (
	"cmp"
	"os"
	"path/filepath"
	"testing"

	"github.com/hypernetes/hypernetes/test/e2e/testcluster"
)

// TestTutorials runs the tutorials as they are written, page after page, on a cluster of
// their own. Only the cluster's name and port are others.
func TestTutorials(t *testing.T) {
	t.Parallel()
	c := testcluster.Own(t, cmp.Or(os.Getenv("H8S_E2E_NODE"), "e2e")+"-t", cmp.Or(os.Getenv("H8S_E2E_TUTORIAL_PORT"), "16448"))
	root := filepath.Join("..", "..", "..") // manifests of examples are named as in the checkout
	for _, x := range []struct{ page, heading string }{
		{"tenancy.md", "Tutorial"}, {"networking.md", "Tutorial"}, {"storage.md", "Tutorial: local volumes"},
	} {
		t.Run(x.page, func(t *testing.T) { c.Tutorial(t, filepath.Join(root, "docs", x.page), x.heading, root) })
	}
}
