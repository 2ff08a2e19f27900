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
		"1970-01-01 00:00 UTC; a machine; 1 rounds.\n\nMedian (least … most):\n\n| | write 1 MiB, MB/s |",
		"\n| the host's file | 419 (419 … 419) | – | – | – | – | – | 2.50 (2.50 … 2.50) | 5.00 (5.00 … 5.00) |\n" +
			"| bare guest, virtio-blk, file | 210 (210 … 210) | – | – | – | – | – | – | – |\n" +
			"| **Pod, volume of class `local`** | 105 (105 … 105) | – | – | – | – | – | – | – |\n" +
			"| Ceph's own `rbd bench` on the host | 100 (100 … 100) |",
		"\n÷ the bare guest's:\n",
		"\n| the host's file | 2.00 | – | – | – | – | – | – | – |\n| bare guest, virtio-blk, file | 1.00 |",
		"\n÷ the host's file:\n",
		"\n| the host's file | 1.00 | – | – | – | – | – | 1.00 | 1.00 |\n| bare guest, virtio-blk, file | 0.50 |",
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
