package bench

import (
	"fmt"
	"slices"
	"strings"
	"time"
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
	// MemoryMiB is what the VMM and the shim hold of the host's memory beside the
	// guest's RAM, CPUMilli what they use while the Pod is idle, rounded up.
	MemoryMiB int64 `json:"memory_mib"`
	CPUMilli  int64 `json:"cpu_milli"`
}

// overhead proposes the RuntimeClass's overhead from what was measured.
//
// The Pss of an idle Pod is all of it: QEMU, the shim and what the guest's kernel and
// agent have touched of the guest's RAM. Half as much again is the margin for device
// queues in use and code translated later. Both numbers are rounded up to steps, so
// that they do not change with every build.
func (m samples) overhead() overhead {
	const marginPercent = 150
	return overhead{
		MemoryMiB: stepUp(m["pss pod"].median()*1e6/(1<<20)*marginPercent/100, 16),
		CPUMilli:  stepUp(m["idle"].median()*marginPercent/100, 10),
	}
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
		{"guest total", "guest: MemTotal"}, {"guest available", "guest: MemAvailable"},
	}
	var b strings.Builder
	fmt.Fprintf(&b, "%s; %s; %d rounds.\n\n", at.UTC().Format("2006-01-02 15:04 MST"), machine, len(m["hyper"]))
	fmt.Fprintf(&b, "Wall clock, `RunPodSandbox` to the first line of the first container:\n\n%s\n", m.table("seconds", "%.2f", wall))
	fmt.Fprintf(&b, "CPU time up to the first line:\n\n%s\n", m.table("seconds", "%.2f", cpu))
	fmt.Fprintf(&b, "Memory of an idle Pod of %d MiB:\n\n%s\n", guestMiB, m.table("MB", "%.1f", memory))
	o := m.overhead()
	fmt.Fprintf(&b, "Idle, shim and VMM use %s thousandths of a CPU. `overhead.podFixed` that follows: memory %dMi, cpu %dm.\n",
		m["idle"].format("%.0f"), o.MemoryMiB, o.CPUMilli)
	return b.String()
}

var phases = map[string]string{
	"sandbox": "`RunPodSandbox` (network, VM, agent)", "create": "`CreateContainer`",
	"start": "`StartContainer`", "output": "first line in the log",
}
