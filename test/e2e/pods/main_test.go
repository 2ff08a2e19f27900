package pods

import (
	"encoding/json"
	"os"
	"path/filepath"
	"testing"

	"github.com/hypernetes/hypernetes/test/e2e/testcluster"
)

func TestMain(m *testing.M) { testcluster.Main(m) }

// want fails the test if what is not as it should be.
func want[T comparable](t testing.TB, what string, got, wanted T) {
	t.Helper()
	if got != wanted {
		t.Errorf("%s: got %v, want %v", what, got, wanted)
	}
}

// writeManifest writes an object as a manifest file and returns its path.
func writeManifest(t *testing.T, object any) string {
	t.Helper()
	b, err := json.Marshal(object)
	if err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(t.TempDir(), "manifest.json")
	if err := os.WriteFile(path, b, 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}
