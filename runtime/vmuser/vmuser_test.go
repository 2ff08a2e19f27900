package vmuser

import (
	"os"
	"path/filepath"
	"strconv"
	"testing"

	"github.com/containerd/errdefs"
)

func TestTake(t *testing.T) {
	dir := t.TempDir()
	seen := map[int]*User{}
	for range 3 {
		u, err := Take(dir, 1000, 3, "pod") // the same name: it collides every time
		if err != nil {
			t.Fatal(err)
		}
		if seen[u.ID] != nil || u.ID < 1000 || u.ID > 1002 {
			t.Fatalf("id %d given twice or out of range", u.ID)
		}
		seen[u.ID] = u
	}
	if _, err := Take(dir, 1000, 3, "pod"); !errdefs.IsResourceExhausted(err) {
		t.Fatalf("got %v", err)
	}
	seen[1001].Release()
	seen[1001].Release()
	u, err := Take(dir, 1000, 3, "pod")
	if err != nil || u.ID != 1001 {
		t.Fatalf("got %v, %v", u, err)
	}
}

func TestSweep(t *testing.T) {
	dir := t.TempDir()
	alive, err := Take(dir, 1000, 3, "alive")
	if err != nil {
		t.Fatal(err)
	}
	defer alive.Release()
	dead, err := Take(dir, 1000, 3, "dead")
	if err != nil {
		t.Fatal(err)
	}
	_ = dead.file.Close() // as the kernel does for a killed process
	if err := Sweep(dir); err != nil {
		t.Fatal(err)
	}
	left, err := os.ReadDir(dir)
	if err != nil || len(left) != 1 || left[0].Name() != strconv.Itoa(alive.ID) {
		t.Errorf("left: %v, %v; want %d only", left, err, alive.ID)
	}
	if err := Sweep(filepath.Join(dir, "none")); err != nil {
		t.Error(err)
	}
}
