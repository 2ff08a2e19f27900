package testcluster

import (
	"slices"
	"testing"
)

func TestBelowCgroup(t *testing.T) {
	file := "12:cpu:/h8s/e2e/kubepods/pod1\n5:pids:/h8s/e2e\n0::/\n"
	if got, ok := belowCgroup(file, "/h8s/e2e"); !ok || got != "/kubepods/pod1" {
		t.Errorf("got %q, %v", got, ok)
	}
	for _, prefix := range []string{"/h8s/e2", "/h8s/other"} {
		if got, ok := belowCgroup(file, prefix); ok {
			t.Errorf("%s: got %q of another node", prefix, got)
		}
	}
}

func TestAdded(t *testing.T) {
	before, after := Inventory{}, Inventory{}
	before.add("process", "kubelet")
	before.add("process", "gone")
	for range 2 {
		after.add("process", "kubelet")
	}
	after.add("mount", "tmpfs on /x")
	want := []string{"mount (1 more): tmpfs on /x", "process (1 more): kubelet"}
	if got := after.Added(before); !slices.Equal(got, want) {
		t.Errorf("got %q, want %q", got, want)
	}
	if got := before.Added(before); len(got) != 0 {
		t.Errorf("an inventory differs from itself: %q", got)
	}
}
