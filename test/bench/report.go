package bench

import (
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/hypernetes/hypernetes/runtime/config"
)

// series are the samples of one measured thing, in the order they were taken.
type series []float64

func (s series) sorted() series { return slices.Sorted(slices.Values(s)) }

// median is the middle sample, 0 without any.
func (s series) median() float64 {
	if len(s) == 0 {
		return 0
	}
	sorted := s.sorted()
	mid := len(sorted) / 2
	if len(sorted)%2 == 1 {
		return sorted[mid]
	}
	return (sorted[mid-1] + sorted[mid]) / 2
}

// format is "median (least … most)" with a unit.
func (s series) format(verb string) string {
	if len(s) == 0 {
		return "not measured"
	}
	return fmt.Sprintf(verb+" ("+verb+" … "+verb+")", s.median(), slices.Min(s), slices.Max(s))
}

// samples is everything measured in one run: quantity by name.
type samples map[string]series

func (m samples) seconds(name string, d time.Duration) { m[name] = append(m[name], d.Seconds()) }
func (m samples) megabytes(name string, bytes int64) {
	m[name] = append(m[name], float64(bytes)/1e6)
}

// ratio is the median of the ratios of two quantities taken round by round, which the
// machine's load at the time hardly moves.
func (m samples) ratio(of, to string) series {
	var r series
	for i := range min(len(m[of]), len(m[to])) {
		if m[to][i] > 0 {
			r = append(r, m[of][i]/m[to][i])
		}
	}
	return r
}

// table renders quantities as rows of a Markdown table; the ratio column compares with
// the first row.
func (m samples) table(unit, verb string, rows []row) string {
	var b strings.Builder
	fmt.Fprintf(&b, "| what | %s: median (least … most) | ÷ %s |\n|---|---|---|\n", unit, rows[0].title)
	for _, r := range rows {
		if len(m[r.name]) == 0 {
			continue
		}
		fmt.Fprintf(&b, "| %s | %s | %.2f |\n", r.title, m[r.name].format(verb), m.ratio(r.name, rows[0].name).median())
	}
	return b.String()
}

// row is a quantity and what people call it.
type row struct{ name, title string }

// overhead is what one Pod costs its node beyond what its containers use, as the
// RuntimeClass's overhead.podFixed has it.
type overhead struct {
	Memory string `json:"memory"`
}

// overhead proposes the RuntimeClass's overhead from what was measured.
//
// Memory is for the worst case, a guest that uses all of its RAM: what the VM has beyond
// the containers' limits (memory_overhead_mib), what QEMU holds beside the guest's RAM,
// and the shim. QEMU's part is its Pss without the RAM the guest has touched. A quarter
// more is the margin for queues in use and code translated later, and the sum is
// rounded up, so that it does not change with every build. CPU is not proposed: a Pod
// that has just started is never quite idle, and a request for what it may use once would
// only keep others from being scheduled.
func (m samples) overhead() overhead {
	const mib = 1 << 20
	touched := guestMiB*mib - m["guest free"].median()*1e6
	beside := m["pss vmm"].median()*1e6 - touched + m["pss shim"].median()*1e6
	return overhead{Memory: fmt.Sprintf("%dMi", stepUp(float64(config.Default().MemoryOverheadMiB)+beside/mib*1.25, 16))}
}

// stepUp rounds up to a multiple of step, which is also the least it returns.
func stepUp(v float64, step int64) int64 {
	return (int64(v)/step + 1) * step
}

// report is the whole run as Markdown.
func (m samples) report(machine string, ks []kernel, at time.Time) string {
	bare := row{"bare " + ks[0].Variant, "bare QEMU, first instruction (kernel in use: " + ks[0].Variant + ")"}
	wall := []row{bare}
	cpu := []row{{bare.name + " cpu", bare.title}}
	for _, k := range ks[1:] {
		wall = append(wall, row{"bare " + k.Variant, "bare QEMU, kernel " + k.Variant})
		cpu = append(cpu, row{"bare " + k.Variant + " cpu", "bare QEMU, kernel " + k.Variant})
	}
	for _, handler := range []string{"hyper", "runc"} {
		wall = append(wall, row{handler, "Pod, handler " + handler})
		for _, phase := range []string{"sandbox", "create", "start", "output"} {
			wall = append(wall, row{handler + " " + phase, "… " + phases[phase]})
		}
	}
	cpu = append(cpu, row{"hyper cpu", "Pod, handler hyper: shim and VMM"}, row{"runc cpu", "Pod, handler runc: shim and containers"})
	memory := []row{
		{"pss pod", "Pod, handler hyper: Pss of all"}, {"pss vmm", "… VMM"}, {"pss shim", "… shim"},
		{"pss runc", "Pod, handler runc: Pss of all"},
		{"guest total", "guest: MemTotal"}, {"guest free", "guest: MemFree"}, {"guest available", "guest: MemAvailable"},
	}
	var b strings.Builder
	fmt.Fprintf(&b, "%s; %s; %d rounds.\n\n", at.UTC().Format("2006-01-02 15:04 MST"), machine, len(m["hyper"]))
	fmt.Fprintf(&b, "Wall clock, `RunPodSandbox` to the first line of the first container:\n\n%s\n", m.table("seconds", "%.2f", wall))
	fmt.Fprintf(&b, "CPU time up to the first line:\n\n%s\n", m.table("seconds", "%.2f", cpu))
	fmt.Fprintf(&b, "Memory of an idle Pod of %d MiB:\n\n%s\n", guestMiB, m.table("MB", "%.1f", memory))
	for _, unit := range []string{"conn/s", "MB/s"} {
		q := func(name, title string) row { return row{"nic " + unit + " " + name, title} }
		fmt.Fprintf(&b, "TCP from the node, an echo there and back:\n\n%s\n", m.table(unit, "%.0f", []row{
			q("plain", "plain veth pair"), q("runc", "Pod, handler runc (ptp)"), q("hyper", "Pod, handler hyper (ptp, the VM's NIC)"),
		}))
	}
	o := m.overhead()
	fmt.Fprintf(&b, "Idle, shim and VMM use %s thousandths of a CPU. `overhead.podFixed` that follows: memory %s.\n",
		m["idle"].format("%.0f"), o.Memory)
	return b.String()
}

var phases = map[string]string{
	"sandbox": "`RunPodSandbox` (network, VM, agent)", "create": "`CreateContainer`",
	"start": "`StartContainer`", "output": "first line in the log",
}
