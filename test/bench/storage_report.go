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
	name      string
	args, rbd []string
}

// loads in the order they are done. rbd bench counts bytes where testbox looks at the clock.
var loads = []workload{
	{"seq-write", timed("-write -block 1048576"), strings.Fields("--io-type write --io-size 1M --io-threads 1 --io-total 64M")},
	{"seq-read", timed("-block 1048576"), strings.Fields("--io-type read --io-size 1M --io-threads 1 --io-total 64M")},
	{"rand-write", timed("-write -random"), strings.Fields("--io-type write --io-pattern rand --io-size 4K --io-threads 1 --io-total 4M")},
	{"rand-write-16", timed("-write -random -depth 16"), strings.Fields("--io-type write --io-pattern rand --io-size 4K --io-threads 16 --io-total 16M")},
	{"rand-read", timed("-random"), strings.Fields("--io-type read --io-pattern rand --io-size 4K --io-threads 1 --io-total 8M")},
	{"rand-read-16", timed("-random -depth 16"), strings.Fields("--io-type read --io-pattern rand --io-size 4K --io-threads 16 --io-total 32M")},
	{"fsync", timed("-write -random -sync"), nil},
}

// quantity is a column of the report: samples times scale.
type quantity struct {
	name, title, verb string
	scale             float64
}

var quantities = []quantity{
	{"seq-write ops", "write 1 MiB, MB/s", "%.0f", 1.048576}, {"seq-read ops", "read 1 MiB, MB/s", "%.0f", 1.048576},
	{"rand-write ops", "write 4 KiB, /s", "%.0f", 1}, {"rand-write-16 ops", "… 16 at a time", "%.0f", 1},
	{"rand-read ops", "read 4 KiB, /s", "%.0f", 1}, {"rand-read-16 ops", "… 16 at a time", "%.0f", 1},
	{"fsync p50", "4 KiB and `fdatasync`, p50, ms", "%.2f", 1e-3}, {"fsync p99", "… p99, ms", "%.2f", 1e-3},
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
	fmt.Fprintf(&b, "Median (least … most):\n\n%s\n", places(func(q quantity, place string) string {
		s := m[q.name+" "+place]
		if len(s) == 0 {
			return "–"
		}
		return samples{"": s}.scaled(q.scale)[""].format(q.verb)
	}))
	for _, to := range []row{{"bare", "the bare guest's"}, {"host", "the host's file"}} {
		fmt.Fprintf(&b, "÷ %s:\n\n%s\n", to.title, places(func(q quantity, place string) string {
			r := m.ratio(q.name+" "+place, q.name+" "+to.name)
			if len(r) == 0 {
				return "–"
			}
			return fmt.Sprintf("%.2f", r.median())
		}))
	}
	return b.String()
}

// places renders a table of all quantities at all places.
func places(cell func(q quantity, place string) string) string {
	var b strings.Builder
	b.WriteString("| |")
	for _, q := range quantities {
		b.WriteString(" " + q.title + " |")
	}
	b.WriteString("\n|" + strings.Repeat("---|", len(quantities)+1) + "\n")
	for _, p := range diskPlaces {
		line, some := "| "+p.title+" |", false
		for _, q := range quantities {
			text := cell(q, p.name)
			line, some = line+" "+text+" |", some || text != "–"
		}
		if some {
			b.WriteString(line + "\n")
		}
	}
	return b.String()
}
