package qemu

import (
	"context"
	"os"
	"path/filepath"
	"testing"
	"time"
)

// TestProbeGuest runs the probe's guest where it must work, so that its silence under
// KVM means KVM does not work.
func TestProbeGuest(t *testing.T) {
	h := host(t)
	if err := runBIOS(t.Context(), h.Binary, "tcg", "max"); err != nil {
		t.Error(err)
	}
}

func TestProbeIsCached(t *testing.T) {
	host(t) // or skip
	cache := filepath.Join(t.TempDir(), "sub", "host.json")
	first, err := Probe(t.Context(), "", cache)
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("accelerator %s (%s), tsc %d kHz, %d files", first.Accelerator, first.Reason, first.TSCKHz, len(first.Files))
	started := time.Now()
	second, err := Probe(context.Background(), "", cache)
	if err != nil || second.Key != first.Key || second.TSCKHz != first.TSCKHz {
		t.Errorf("second probe %+v: %v", second, err)
	}
	t.Logf("cached in %v", time.Since(started))
	if err := os.WriteFile(cache, []byte("{torn"), 0o600); err != nil {
		t.Fatal(err)
	}
	if third, err := Probe(context.Background(), "", cache); err != nil || third.Version != first.Version {
		t.Errorf("probe over a torn cache: %+v: %v", third, err)
	}
}

func TestTSCIsStable(t *testing.T) {
	a, err := measureTSC(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	b, err := measureTSC(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if d := a - b; a < 100_000 || d > a/10_000 || -d > a/10_000 {
		t.Errorf("tsc %d kHz, then %d kHz", a, b)
	}
}
