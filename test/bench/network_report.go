package bench

import (
	"fmt"
	"os"
	"slices"
	"strings"
	"time"
)

// endpointsEach is how many endpoints each Service of a benchmark has.
const endpointsEach = 5

// loadAverage is the machine's, over a minute.
func loadAverage() string {
	b, err := os.ReadFile("/proc/loadavg")
	if err != nil {
		return "unknown"
	}
	load, _, _ := strings.Cut(string(b), " ")
	return load
}

// pair is a quantity of ours beside upstream's.
type pair struct{ title, ours, theirs string }

// versus renders pairs as rows of a Markdown table.
func (m samples) versus(unit, verb, upstream string, pairs []pair) string {
	var b strings.Builder
	fmt.Fprintf(&b, "| what (%s) | Hypernetes: median (least … most) | %s | ratio |\n|---|---|---|---|\n", unit, upstream)
	for _, p := range pairs {
		theirs, ratio := "–", "–"
		if len(m[p.theirs]) > 0 {
			theirs = m[p.theirs].format(verb)
		}
		if r := m.ratio(p.ours, p.theirs); len(r) > 0 {
			ratio = fmt.Sprintf("%.2f", r.median())
		}
		fmt.Fprintf(&b, "| %s | %s | %s | %s |\n", p.title, m[p.ours].format(verb), theirs, ratio)
	}
	return b.String()
}

// scaled is a copy with the named quantities times by.
func (m samples) scaled(by float64) samples {
	out := samples{}
	for name, s := range m {
		for _, v := range s {
			out[name] = append(out[name], v*by)
		}
	}
	return out
}

// networkReport is the run of BenchmarkNetwork as Markdown.
func (m samples) networkReport(machine string, at time.Time, sizes []int) string {
	var b strings.Builder
	ms := m.scaled(1000)
	fmt.Fprintf(&b, "%s; %s; %d rounds.\n\n", at.UTC().Format("2006-01-02 15:04 MST"), machine, len(m["add ptp"]))
	fmt.Fprintf(&b, "A Pod's network:\n\n%s\n", ms.table("ms", "%.0f", []row{
		{"add ptp", "ADD of the ptp plugin (with host-local)"},
		{"add first", "ADD of ours, first Pod of a Network on the node"},
		{"add further", "ADD of ours, another Pod"},
		{"direct first", "… of it edge, policy, links: first Pod"},
		{"direct further", "… of it edge, policy, links: another Pod"},
	}))
	var services, memory []pair
	for _, n := range sizes {
		name := func(what string) string { return fmt.Sprintf("%s %d", what, n) }
		services = append(services,
			pair{fmt.Sprintf("%d Services, all: objects to rules", n), name("load ours"), name("load proxy")},
			pair{"… start to rules (ours: first Pod's ADD)", name("start ours"), name("start proxy")},
			pair{"… one endpoint: the daemon's sync", name("change ours"), name("change proxy")},
			pair{"… … choice of endpoints and nftables alone", name("change table"), ""},
			pair{"… … API request to rules", name("seen ours"), name("seen proxy")})
		memory = append(memory, pair{fmt.Sprintf("daemon with %d Services, Pss", n), name("pss ours"), name("pss proxy")})
		if n == slices.Max(sizes) { // of fewer it is lost in what the machine does besides
			memory = append(memory, pair{"… their rules in the kernel", name("slab ours"), name("slab proxy")})
		}
	}
	fmt.Fprintf(&b, "Services with %d endpoints each:\n\n%s\n", endpointsEach, ms.versus("ms", "%.1f", "kube-proxy, nftables", services))
	for _, t := range []struct{ title, unit, verb string }{
		{"TCP connections with a byte each way, four at a time", "conn/s", "%.0f"},
		{"TCP, one stream", "MB/s", "%.0f"},
	} {
		q := func(path, title string) row { return row{t.unit + " " + path, title} }
		fmt.Fprintf(&b, "%s:\n\n%s\n", t.title, m.table(t.unit, t.verb, []row{
			q("plain", "plain veth pair"),
			q("ptp", "ptp Pods, one node"), q("edge", "Network's Pods, one node"),
			q("ptp clusterip", "ptp Pods, one node, ClusterIP by kube-proxy"), q("edge clusterip", "Network's Pods, one node, ClusterIP"),
			q("ptp far", "ptp Pods, two nodes, routed"), q("edge far", "Network's Pods, two nodes, VXLAN"),
			q("ptp far clusterip", "ptp Pods, two nodes, ClusterIP by kube-proxy"), q("edge far clusterip", "Network's Pods, two nodes, ClusterIP"),
		}))
	}
	var names []pair
	for _, kind := range []struct{ name, title string }{{"cluster", "a Service's name"}, {"cached", "a cached name"}, {"forwarded", "a name from upstream, one client"}} {
		for _, f := range []struct{ name, title string }{{"q/s", "questions/s"}, {"p50", "… p50, ms"}, {"p99", "… p99, ms"}} {
			title := f.title
			if f.name == "q/s" {
				title = kind.title + ": " + title
			}
			names = append(names, pair{title, f.name + " " + kind.name + " ours", f.name + " " + kind.name + " coredns"})
		}
	}
	fmt.Fprintf(&b, "Names, eight clients unless said otherwise:\n\n%s\n", m.versus("see row", "%.2f", "CoreDNS", names))
	fmt.Fprintf(&b, "Memory:\n\n%s\n", m.versus("MB", "%.2f", "upstream", append([]pair{
		{"kernel, per Network with a Pod (upstream: per ptp Pod)", "slab network", "slab ptp"},
		{"kernel, an empty namespace", "slab empty", ""},
		{"kubestack, per Network with a Pod, Pss", "pss network", ""},
	}, memory...)))
	return b.String()
}
