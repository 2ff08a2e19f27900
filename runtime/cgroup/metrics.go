package cgroup

import (
	"os"
	"path/filepath"
	"strconv"
	"strings"

	stats "github.com/containerd/cgroups/v3/cgroup2/stats"
)

// Metrics measures the group in version 2's terms, whatever the host has. What cannot be
// read is 0: a reader wants the rest.
func (g *Group) Metrics() *stats.Metrics {
	m := &stats.Metrics{Pids: &stats.PidsStat{}, CPU: &stats.CPUStat{}, Memory: &stats.MemoryStat{}, MemoryEvents: &stats.MemoryEvents{}}
	for _, p := range g.Paths {
		if g.Unified {
			unified(p, m)
		} else {
			legacy(p, m)
		}
	}
	return m
}

func unified(p string, m *stats.Metrics) {
	cpu := flat(p, "cpu.stat")
	m.CPU.UsageUsec, m.CPU.UserUsec, m.CPU.SystemUsec = cpu["usage_usec"], cpu["user_usec"], cpu["system_usec"]
	m.CPU.NrPeriods, m.CPU.NrThrottled, m.CPU.ThrottledUsec = cpu["nr_periods"], cpu["nr_throttled"], cpu["throttled_usec"]
	mem := flat(p, "memory.stat")
	m.Memory.Anon, m.Memory.File, m.Memory.InactiveFile, m.Memory.ActiveFile = mem["anon"], mem["file"], mem["inactive_file"], mem["active_file"]
	m.Memory.Pgfault, m.Memory.Pgmajfault = mem["pgfault"], mem["pgmajfault"]
	m.Memory.Usage, m.Memory.UsageLimit = number(p, "memory.current"), number(p, "memory.max")
	m.MemoryEvents.OomKill = flat(p, "memory.events")["oom_kill"]
	m.Pids.Current, m.Pids.Limit = number(p, "pids.current"), number(p, "pids.max")
}

// legacy adds what this hierarchy knows.
func legacy(p string, m *stats.Metrics) {
	if n := number(p, "cpuacct.usage"); n > 0 {
		m.CPU.UsageUsec = n / 1000
		// In ticks, of which every Linux tells user space there are 100 a second.
		ticks := flat(p, "cpuacct.stat")
		m.CPU.UserUsec, m.CPU.SystemUsec = ticks["user"]*10000, ticks["system"]*10000
	}
	if t := flat(p, "cpu.stat"); len(t) > 0 {
		m.CPU.NrPeriods, m.CPU.NrThrottled, m.CPU.ThrottledUsec = t["nr_periods"], t["nr_throttled"], t["throttled_time"]/1000
	}
	if mem := flat(p, "memory.stat"); len(mem) > 0 {
		m.Memory.Anon, m.Memory.File = mem["rss"], mem["cache"]
		m.Memory.InactiveFile, m.Memory.ActiveFile = mem["inactive_file"], mem["active_file"]
		m.Memory.Pgfault, m.Memory.Pgmajfault = mem["pgfault"], mem["pgmajfault"]
		m.Memory.Usage, m.Memory.UsageLimit = number(p, "memory.usage_in_bytes"), number(p, "memory.limit_in_bytes")
		m.MemoryEvents.OomKill = flat(p, "memory.oom_control")["oom_kill"]
	}
	if n := number(p, "pids.current"); n > 0 {
		m.Pids.Current, m.Pids.Limit = n, number(p, "pids.max")
	}
}

// flat reads a file of "key value" lines.
func flat(dir, file string) map[string]uint64 {
	b, err := os.ReadFile(filepath.Join(dir, file))
	if err != nil {
		return nil
	}
	out := map[string]uint64{}
	for line := range strings.Lines(string(b)) {
		if k, v, ok := strings.Cut(strings.TrimSpace(line), " "); ok {
			if n, err := strconv.ParseUint(v, 10, 64); err == nil {
				out[k] = n
			}
		}
	}
	return out
}

// number reads a file of one number; "max" and what is missing is 0.
func number(dir, file string) uint64 {
	b, err := os.ReadFile(filepath.Join(dir, file))
	if err != nil {
		return 0
	}
	n, err := strconv.ParseUint(strings.TrimSpace(string(b)), 10, 64)
	if err != nil {
		return 0
	}
	return n
}
