package cgroup

import (
	"os"
	"path/filepath"
	"testing"
)

func TestMetrics(t *testing.T) {
	dir := t.TempDir()
	for name, data := range map[string]string{
		"pids.current": "3\n", "pids.max": "max\n",
		"cpu.stat":       "usage_usec 300\nuser_usec 200\nsystem_usec 100\nnr_periods 5\nnr_throttled 2\nthrottled_usec 9\n",
		"memory.current": "4096\n", "memory.max": "67108864\n", "memory.peak": "8192\n",
		"memory.stat":   "anon 1\nfile 2\ninactive_file 7\nworkingset_refault_anon 3\nworkingset_refault_file 4\njunk\nx y\n",
		"memory.events": "low 0\nhigh 0\nmax 4\noom 2\noom_kill 1\noom_group_kill 0\n",
		"io.stat":       "8:0 rbytes=1 wbytes=2 rios=3 wios=4 dbytes=0 dios=0\n253:1\n",
		"cpu.pressure":  "some avg10=1.50 avg60=0.00 avg300=0.00 total=12\nfull avg10=0.00 avg60=0.00 avg300=0.00 total=3\n",
	} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(data), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	m := Group(dir).Metrics()
	if m.Pids.Current != 3 || m.Pids.Limit != ^uint64(0) || m.CPU.UsageUsec != 300 || m.CPU.NrThrottled != 2 {
		t.Errorf("pids, cpu: %v %v", m.Pids, m.CPU)
	}
	if m.Memory.Usage != 4096 || m.Memory.UsageLimit != 64<<20 || m.Memory.InactiveFile != 7 || m.Memory.WorkingsetRefault != 7 || m.Memory.MaxUsage != 8192 {
		t.Errorf("memory: %v", m.Memory)
	}
	if m.MemoryEvents.OomKill != 1 || Group(dir).OOMKills() != 1 || len(m.Io.Usage) != 1 || m.Io.Usage[0].Wios != 4 || m.Io.Usage[0].Major != 8 {
		t.Errorf("events, io: %v %v", m.MemoryEvents, m.Io)
	}
	if m.CPU.PSI.Some.Avg10 != 1.5 || m.CPU.PSI.Full.Total != 3 || m.Memory.PSI != nil {
		t.Errorf("pressure: %v", m.CPU.PSI)
	}
	// A group that is gone measures as nothing and can be killed.
	gone := Group(filepath.Join(dir, "none"))
	if gone.Metrics().Memory.Usage != 0 || gone.Signal(9) != nil {
		t.Error("a group that is gone")
	}
}
