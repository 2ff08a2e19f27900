package layout

import (
	"strings"
	"testing"

	"github.com/containerd/errdefs"
)

func TestNewNode(t *testing.T) {
	for _, name := range []string{"h8s", "a", "node-1", strings.Repeat("a", 32)} {
		if _, err := NewNode(name); err != nil {
			t.Errorf("%q: %v", name, err)
		}
	}
	for _, name := range []string{"", "-a", "a-", "A", "a.b", "..", "a/b", strings.Repeat("a", 33), "a\n"} {
		if _, err := NewNode(name); !errdefs.IsInvalidArgument(err) {
			t.Errorf("%q: %v", name, err)
		}
	}
}

func TestFindArtifactsByEnvironment(t *testing.T) {
	t.Setenv("H8S_OUT", "/some/out")
	a, err := FindArtifacts()
	if err != nil || a.Bin("h8s") != "/some/out/bin/h8s" {
		t.Errorf("%v %v", a, err)
	}
}
