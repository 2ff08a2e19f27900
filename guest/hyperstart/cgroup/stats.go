package cgroup

import (
	"bufio"
	"bytes"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"github.com/containerd/cgroups/v3/cgroup2/stats"
)

// Metrics reads the group's usage; what a controller the kernel lacks would say is 0.
func (g Group) Metrics() *stats.Metrics {
	cpu, events := g.keyed("cpu.stat"), g.keyed("memory.events")
	return &stats.Metrics{
		Pids: &stats.PidsStat{Current: g.number("pids.current"), Limit: g.number("pids.max")},
		CPU: &stats.CPUStat{
			UsageUsec: cpu["usage_usec"], UserUsec: cpu["user_usec"], SystemUsec: cpu["system_usec"],
			NrPeriods: cpu["nr_periods"], NrThrottled: cpu["nr_throttled"], ThrottledUsec: cpu["throttled_usec"],
			NrBursts: cpu["nr_bursts"], BurstUsec: cpu["burst_usec"],
			PSI: g.pressure("cpu.pressure"),
		},
		Memory: g.memory(),
		MemoryEvents: &stats.MemoryEvents{
			Low: events["low"], High: events["high"], Max: events["max"],
			Oom: events["oom"], OomKill: events["oom_kill"], OomGroupKill: events["oom_group_kill"],
		},
		Io: &stats.IOStat{Usage: g.io(), PSI: g.pressure("io.pressure")},
	}
}

func (g Group) memory() *stats.MemoryStat {
	m := g.keyed("memory.stat")
	return &stats.MemoryStat{
		Anon: m["anon"], File: m["file"], KernelStack: m["kernel_stack"], Slab: m["slab"], Sock: m["sock"],
		Shmem: m["shmem"], FileMapped: m["file_mapped"], FileDirty: m["file_dirty"],
		FileWriteback: m["file_writeback"], AnonThp: m["anon_thp"],
		InactiveAnon: m["inactive_anon"], ActiveAnon: m["active_anon"],
		InactiveFile: m["inactive_file"], ActiveFile: m["active_file"], Unevictable: m["unevictable"],
		SlabReclaimable: m["slab_reclaimable"], SlabUnreclaimable: m["slab_unreclaimable"],
		Pgfault: m["pgfault"], Pgmajfault: m["pgmajfault"],
		WorkingsetRefault:     m["workingset_refault_anon"] + m["workingset_refault_file"],
		WorkingsetActivate:    m["workingset_activate_anon"] + m["workingset_activate_file"],
		WorkingsetNodereclaim: m["workingset_nodereclaim"],
		Pgrefill:              m["pgrefill"], Pgscan: m["pgscan"], Pgsteal: m["pgsteal"],
		Pgactivate: m["pgactivate"], Pgdeactivate: m["pgdeactivate"],
		Pglazyfree: m["pglazyfree"], Pglazyfreed: m["pglazyfreed"],
		ThpFaultAlloc: m["thp_fault_alloc"], ThpCollapseAlloc: m["thp_collapse_alloc"],
		Usage: g.number("memory.current"), UsageLimit: g.number("memory.max"),
		SwapUsage: g.number("memory.swap.current"), SwapLimit: g.number("memory.swap.max"),
		MaxUsage: g.number("memory.peak"), SwapMaxUsage: g.number("memory.swap.peak"),
		PSI: g.pressure("memory.pressure"),
	}
}

func (g Group) io() []*stats.IOEntry {
	b, err := os.ReadFile(filepath.Join(string(g), "io.stat"))
	if err != nil {
		return nil
	}
	return parseIO(b)
}

// parseIO parses lines like "8:0 rbytes=1 wbytes=2 rios=3 wios=4 dbytes=0 dios=0".
func parseIO(b []byte) []*stats.IOEntry {
	var out []*stats.IOEntry
	for s := bufio.NewScanner(bytes.NewReader(b)); s.Scan(); {
		f := strings.Fields(s.Text())
		if len(f) < 2 {
			continue
		}
		major, minor, _ := strings.Cut(f[0], ":")
		e := &stats.IOEntry{Major: number(major), Minor: number(minor)}
		for _, kv := range f[1:] {
			k, v, _ := strings.Cut(kv, "=")
			switch k {
			case "rbytes":
				e.Rbytes = number(v)
			case "wbytes":
				e.Wbytes = number(v)
			case "rios":
				e.Rios = number(v)
			case "wios":
				e.Wios = number(v)
			}
		}
		out = append(out, e)
	}
	return out
}

func (g Group) pressure(file string) *stats.PSIStats {
	b, err := os.ReadFile(filepath.Join(string(g), file))
	if err != nil {
		return nil
	}
	return parsePressure(b)
}

// parsePressure parses "some avg10=0.00 avg60=0.00 avg300=0.00 total=0" and "full ...".
func parsePressure(b []byte) *stats.PSIStats {
	out := &stats.PSIStats{}
	for s := bufio.NewScanner(bytes.NewReader(b)); s.Scan(); {
		kind, rest, _ := strings.Cut(s.Text(), " ")
		d := &stats.PSIData{}
		for _, kv := range strings.Fields(rest) {
			k, v, _ := strings.Cut(kv, "=")
			avg, _ := strconv.ParseFloat(v, 64)
			switch k {
			case "avg10":
				d.Avg10 = avg
			case "avg60":
				d.Avg60 = avg
			case "avg300":
				d.Avg300 = avg
			case "total":
				d.Total = number(v)
			}
		}
		switch kind {
		case "some":
			out.Some = d
		case "full":
			out.Full = d
		}
	}
	return out
}
