package bench

import (
	"encoding/json"
	"fmt"
	"regexp"
	"strings"
	"time"
)

// workload is what is done to a disk: arguments of testbox's io, and of "rbd bench" for the
// same, if it can do it.
type workload struct {
	name, title string
	args, rbd   []string
	// bytes of an operation, if megabytes a second are what people count.
	bytes float64
}

// loads in the order of the report. rbd bench counts bytes where testbox looks at the clock.
var loads = []workload{
	{
		"seq-write", "write, 1 MiB", timed("-write -block 1048576"),
		strings.Fields("--io-type write --io-size 1M --io-threads 1 --io-total 64M"), 1 << 20,
	},
	{
		"seq-read", "read, 1 MiB", timed("-block 1048576"),
		strings.Fields("--io-type read --io-size 1M --io-threads 1 --io-total 64M"), 1 << 20,
	},
	{
		"rand-write", "write, 4 KiB", timed("-write -random"),
		strings.Fields("--io-type write --io-pattern rand --io-size 4K --io-threads 1 --io-total 4M"), 0,
	},
	{
		"rand-write-16", "write, 4 KiB, 16 at a time", timed("-write -random -depth 16"),
		strings.Fields("--io-type write --io-pattern rand --io-size 4K --io-threads 16 --io-total 16M"), 0,
	},
	{
		"rand-read", "read, 4 KiB", timed("-random"),
		strings.Fields("--io-type read --io-pattern rand --io-size 4K --io-threads 1 --io-total 8M"), 0,
	},
	{
		"rand-read-16", "read, 4 KiB, 16 at a time", timed("-random -depth 16"),
		strings.Fields("--io-type read --io-pattern rand --io-size 4K --io-threads 16 --io-total 32M"), 0,
	},
	{"fsync", "", timed("-write -random -sync"), nil, 0},
}

// timed is for half a second of it.
func timed(args string) []string { return append([]string{"-time", "500ms"}, strings.Fields(args)...) }

// rbdRate is the summary of rbd bench.
var rbdRate = regexp.MustCompile(`ops/sec:\s*([0-9.]+)`)

// rbdBench is what testbox would have said of what rbd bench says.
func rbdBench(text string) ([]byte, error) {
	found := rbdRate.FindStringSubmatch(text)
	if found == nil {
		return nil, fmt.Errorf("rbd bench: no ops/sec in %q", text)
	}
	return []byte(`{"perSecond":` + found[1] + `}`), nil
}

// addLoad takes testbox's line about a load at a place.
func (m samples) addLoad(load, place string, line []byte) error {
	var r struct{ PerSecond, P50, P99 float64 }
	if err := json.Unmarshal(line, &r); err != nil {
		return fmt.Errorf("%s at %s: %w: %s", load, place, err, line)
	}
	for what, v := range map[string]float64{"ops": r.PerSecond, "p50": r.P50, "p99": r.P99} {
		if v > 0 {
			name := fmt.Sprintf("%s %s %s", load, what, place)
			m[name] = append(m[name], v)
		}
	}
	return nil
}

// diskPlaces in the order of the report.
var diskPlaces = []row{
	{"host", "the host's file"},
	{"bare", "bare guest, virtio-blk, file"},
	{"local", "**Pod, volume of class `local`**"},
	{"nbd", "bare guest, NBD from a storage daemon, file"},
	{"tuned", "… as Pods have it: `malloc` and the socket's buffer set"},
	{"vhost", "… vhost-user-blk instead of NBD"},
	{"rbd", "Ceph's own `rbd bench` on the host"},
	{"ceph", "**Pod, volume on Ceph (NBD from the storage daemon)**"},
}

// storageReport is the run of BenchmarkStorage as Markdown.
func (m samples) storageReport(machine string, at time.Time) string {
	var b strings.Builder
	fmt.Fprintf(&b, "%s; %s; %d rounds.\n\n", at.UTC().Format("2006-01-02 15:04 MST"), machine, len(m["seq-write ops host"]))
	for _, l := range loads {
		if l.title == "" {
			continue
		}
		unit, scale := "operations/s", 1.0
		if l.bytes > 0 {
			unit, scale = "MB/s", l.bytes/1e6
		}
		fmt.Fprintf(&b, "%s%s:\n\n%s\n", strings.ToUpper(l.title[:1]), l.title[1:], m.scaled(scale).places(l.name+" ops", unit, "%.0f"))
	}
	for _, p := range []string{"p50", "p99"} {
		fmt.Fprintf(&b, "4 KiB and `fdatasync`, %s:\n\n%s\n", p, m.scaled(1e-3).places("fsync "+p, "ms", "%.2f"))
	}
	return b.String()
}

// places renders a quantity at all places, beside the host's file and the bare guest's.
func (m samples) places(quantity, unit, verb string) string {
	var b strings.Builder
	fmt.Fprintf(&b, "| where | %s: median (least … most) | ÷ host's file | ÷ bare virtio-blk |\n|---|---|---|---|\n", unit)
	for _, p := range diskPlaces {
		s := m[quantity+" "+p.name]
		if len(s) == 0 {
			continue
		}
		fmt.Fprintf(&b, "| %s | %s |", p.title, s.format(verb))
		for _, to := range []string{"host", "bare"} {
			if r := m.ratio(quantity+" "+p.name, quantity+" "+to); len(r) > 0 {
				fmt.Fprintf(&b, " %.2f |", r.median())
			} else {
				b.WriteString(" – |")
			}
		}
		b.WriteByte('\n')
	}
	return b.String()
}
