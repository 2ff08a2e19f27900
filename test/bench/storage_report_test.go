package bench

import (
	"strings"
	"testing"
	"time"
)

func TestStorageReport(t *testing.T) {
	m := samples{}
	for _, l := range []struct{ load, place, line string }{
		{"seq-write", "host", `{"perSecond": 400, "p50": 2500, "p99": 5000}`},
		{"seq-write", "bare", `{"perSecond": 200, "p50": 5000, "p99": 5000}`},
		{"seq-write", "local", `{"perSecond": 100, "p50": 5000, "p99": 5000}`},
		{"fsync", "host", `{"perSecond": 400, "p50": 2500, "p99": 5000}`},
	} {
		if err := m.addLoad(l.load, l.place, []byte(l.line)); err != nil {
			t.Fatal(err)
		}
	}
	said, err := rbdBench("bench  type write io_size 4096\nelapsed: 1   ops: 100   ops/sec: 95.25   bytes/sec: 381 KiB/s\n")
	if err != nil {
		t.Fatal(err)
	}
	if err := m.addLoad("seq-write", "rbd", said); err != nil {
		t.Fatal(err)
	}
	report := m.storageReport("a machine", time.Unix(0, 0))
	for _, want := range []string{
		"1970-01-01 00:00 UTC; a machine; 1 rounds.\n",
		"Write, 1 MiB:\n\n| where | MB/s: median (least … most) | ÷ host's file | ÷ bare virtio-blk |\n|---|---|---|---|\n" +
			"| the host's file | 419 (419 … 419) | 1.00 | 2.00 |\n" +
			"| bare guest, virtio-blk, file | 210 (210 … 210) | 0.50 | 1.00 |\n" +
			"| **Pod, volume of class `local`** | 105 (105 … 105) | 0.25 | 0.50 |\n" +
			"| Ceph's own `rbd bench` on the host | 100 (100 … 100) | 0.24 | 0.48 |\n",
		"4 KiB and `fdatasync`, p99:\n\n| where | ms: median (least … most) | ÷ host's file | ÷ bare virtio-blk |\n|---|---|---|---|\n| the host's file | 5.00 (5.00 … 5.00) | 1.00 | – |\n",
	} {
		if !strings.Contains(report, want) {
			t.Errorf("no\n%s\nin\n%s", want, report)
		}
	}
	if _, err := rbdBench("rbd: error opening image"); err == nil {
		t.Error("a rate out of nothing")
	}
	if err := m.addLoad("seq-write", "host", []byte("started")); err == nil {
		t.Error("a load without an answer")
	}
}
