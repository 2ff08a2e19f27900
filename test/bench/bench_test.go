package bench

import (
	"context"
	"encoding/json"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/hypernetes/hypernetes/cluster/layout"
	"github.com/hypernetes/hypernetes/network/edge/edgetest"
	"github.com/hypernetes/hypernetes/network/netns"
	"github.com/hypernetes/hypernetes/runtime/vmm/qemu"
	"github.com/hypernetes/hypernetes/test/artifacts"
)

// BenchmarkPod measures everything the package comment promises, in rounds: each
// round takes every quantity once, so that rounds can be compared within themselves.
func BenchmarkPod(b *testing.B) {
	out := artifacts.Dir()
	host, err := qemu.Probe(b.Context(), "", "")
	if err != nil {
		b.Skipf("no QEMU: %v", err)
	}
	ks, err := kernels(out)
	if err != nil {
		b.Skipf("no guest kernel: %v", err)
	}
	initrd := filepath.Join(b.TempDir(), "initrd")
	if err := writeFloorInitrd(initrd); err != nil {
		b.Fatal(err)
	}
	rt := node(b, out)
	rounds := number("H8S_BENCH_ROUNDS", 5)
	m := samples{}
	for b.Loop() {
		clear(m)
		// The first Pod of a handler pays for the host's cold caches; nobody else does.
		for _, handler := range []string{"hyper", "runc"} {
			measure(b, samples{}, rt, handler, "warm-"+handler)
		}
		for i := range rounds {
			for _, k := range ks {
				wall, cpu, err := floor(b.Context(), host, k, initrd, guestMiB)
				if err != nil {
					b.Fatal(err)
				}
				m.seconds("bare "+k.Variant, wall)
				m.seconds("bare "+k.Variant+" cpu", cpu)
			}
			measure(b, m, rt, "hyper", fmt.Sprintf("hyper-%d", i))
			measure(b, m, rt, "runc", fmt.Sprintf("runc-%d", i))
		}
		measureNICs(b, m, rt, rounds)
	}
	inUse := "bare " + ks[0].Variant
	b.ReportMetric(m["hyper"].median(), "s/hyper")
	b.ReportMetric(m["runc"].median(), "s/runc")
	b.ReportMetric(m[inUse].median(), "s/bare")
	b.ReportMetric(m.ratio("hyper", inUse).median(), "hyper/bare")
	b.ReportMetric(m.ratio("hyper", "runc").median(), "hyper/runc")
	b.ReportMetric(m["pss pod"].median(), "MB/pod")
	write(b, out, m, ks)
}

// measure starts one Pod, takes its samples and removes it.
func measure(b *testing.B, m samples, rt *runtimeService, handler, name string) {
	b.Helper()
	ctx, cancel := context.WithTimeout(b.Context(), 3*time.Minute)
	defer cancel()
	p, err := rt.start(ctx, handler, name)
	defer func() {
		clean, cancel := context.WithTimeout(context.WithoutCancel(ctx), time.Minute)
		defer cancel()
		if err := rt.remove(clean, p); err != nil {
			b.Error(err)
		}
	}()
	if err != nil {
		b.Fatal(err)
	}
	m.seconds(handler, p.Total())
	m.seconds(handler+" sandbox", p.Sandbox)
	m.seconds(handler+" create", p.Create)
	m.seconds(handler+" start", p.Start)
	m.seconds(handler+" output", p.Output)
	procs, err := processesOf(p.ID)
	if err != nil {
		b.Fatal(err)
	}
	var cpu time.Duration
	var memory int64
	for _, proc := range procs {
		share, err := pss(proc.PID)
		if err != nil {
			b.Fatal(err)
		}
		cpu += proc.CPU
		memory += share
		if handler == "hyper" {
			m.megabytes("pss "+kind(proc.Command), share)
		}
	}
	m.seconds(handler+" cpu", cpu)
	if handler == "runc" {
		m.megabytes("pss runc", memory)
		return
	}
	m.megabytes("pss pod", memory)
	idle, err := idleMilli(ctx, p.ID, cpu)
	if err != nil {
		b.Fatal(err)
	}
	m["idle"] = append(m["idle"], idle)
	info, err := rt.output(ctx, p, "cat", "/proc/meminfo")
	if err != nil {
		b.Fatal(err)
	}
	for name, key := range map[string]string{"guest total": "MemTotal:", "guest free": "MemFree:", "guest available": "MemAvailable:"} {
		v, err := field(info, key)
		if err != nil {
			b.Fatal(err)
		}
		m.megabytes(name, v)
	}
}

// measureNICs talks TCP from the node to a Pod of each handler, beside an echo on a plain
// veth pair.
func measureNICs(b *testing.B, m samples, rt *runtimeService, rounds int) {
	b.Helper()
	ctx, cancel := context.WithTimeout(b.Context(), 5*time.Minute)
	defer cancel()
	type target struct {
		name string
		from *netns.NS
		to   netip.AddrPort
	}
	var targets []target
	rig := edgetest.New(b, 0)
	plain, far := rig.Namespace("nic-a"), rig.Namespace("nic-b")
	if err := veth(plain, far, "10.250.0.1/30", "10.250.0.2/30"); err != nil {
		b.Fatal(err)
	}
	stop, err := serveEcho(ctx, far, "10.250.0.2:8081")
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(stop)
	targets = append(targets, target{"plain", plain, netip.MustParseAddrPort("10.250.0.2:8081")})
	for _, handler := range []string{"runc", "hyper"} {
		p, err := rt.run(ctx, handler, "nic-"+handler, testbox, "/testbox", "serve")
		defer func() {
			clean, cancel := context.WithTimeout(context.WithoutCancel(ctx), time.Minute)
			defer cancel()
			if err := rt.remove(clean, p); err != nil {
				b.Error(err)
			}
		}()
		if err != nil {
			b.Fatal(err)
		}
		a, err := rt.address(ctx, p)
		if err != nil {
			b.Fatal(err)
		}
		procs, err := processesOf(p.ID)
		if err != nil {
			b.Fatal(err)
		}
		ns, err := netns.Open(fmt.Sprintf("/proc/%d/ns/net", procs[0].PID)) // the shim's, the node's
		if err != nil {
			b.Fatal(err)
		}
		defer func() { _ = ns.Close() }()
		targets = append(targets, target{handler, ns, netip.AddrPortFrom(a, 8081)})
	}
	for _, t := range targets { // it may be about to listen
		for try := 0; ; try++ {
			_, err := connections(t.from, t.to, 1, 1)
			if err == nil {
				break
			}
			if try == 100 {
				b.Fatalf("%s: %v", t.name, err)
			}
			select {
			case <-ctx.Done():
				b.Fatalf("%s: %v", t.name, err)
			case <-time.After(50 * time.Millisecond):
			}
		}
	}
	for range rounds {
		for _, t := range targets {
			n, err := connections(t.from, t.to, 100, 4)
			if err != nil {
				b.Fatalf("%s: %v", t.name, err)
			}
			m["nic conn/s "+t.name] = append(m["nic conn/s "+t.name], n)
			bytes, err := echoed(ctx, t.from, t.to, streamTime)
			if err != nil {
				b.Fatalf("%s: %v", t.name, err)
			}
			m["nic MB/s "+t.name] = append(m["nic MB/s "+t.name], bytes/1e6)
		}
	}
}

// idleTime is how long an idle Pod is watched.
const idleTime = 3 * time.Second

// idleMilli is how much of a CPU a sandbox uses while nothing happens in it, in
// thousandths.
func idleMilli(ctx context.Context, sandbox string, before time.Duration) (float64, error) {
	select {
	case <-ctx.Done():
		return 0, ctx.Err()
	case <-time.After(idleTime):
	}
	procs, err := processesOf(sandbox)
	if err != nil {
		return 0, err
	}
	for _, p := range procs {
		before -= p.CPU
	}
	return 1000 * -before.Seconds() / idleTime.Seconds(), nil
}

// kind is what a process of a VM's Pod is.
func kind(command string) string {
	if strings.HasPrefix(command, "containerd-shim") {
		return "shim"
	}
	return "vmm"
}

// node returns the runtime of a node of the benchmark's own, which is removed at the
// end, with the image of measured Pods in it.
func node(b *testing.B, out string) *runtimeService {
	b.Helper()
	h8s := filepath.Join(out, "bin", "h8s")
	for _, file := range []string{h8s, filepath.Join(out, "bin", "containerd-shim-hyper-v2")} {
		if _, err := os.Stat(file); err != nil {
			b.Skipf("not built: %v (run `make build`)", err)
		}
	}
	name := os.Getenv("H8S_BENCH_NODE")
	if name == "" {
		name = "bench"
	}
	n, err := layout.NewNode(name)
	if err != nil {
		b.Fatal(err)
	}
	run := func(args ...string) error {
		cmd := exec.Command(h8s, append(args, "--name", name)...)
		cmd.Env = append(os.Environ(), "H8S_OUT="+out)
		if text, err := cmd.CombinedOutput(); err != nil {
			return fmt.Errorf("h8s %s: %w\n%s", strings.Join(args, " "), err, text)
		}
		return nil
	}
	if _, err := os.Stat(n.ContainerdSocket()); err != nil {
		b.Cleanup(func() {
			if err := run("reset", "--yes"); err != nil {
				b.Error(err)
			}
		})
		if err := run("up", "--runtime-only"); err != nil {
			b.Fatal(err)
		}
	}
	rt, err := connect(n)
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() { _ = rt.conn.Close() })
	return rt
}

func number(env string, def int) int {
	if n, err := strconv.Atoi(os.Getenv(env)); err == nil && n > 0 {
		return n
	}
	return def
}

// write leaves the report, the samples and the proposed overhead below out.
func write(b *testing.B, out string, m samples, ks []kernel) {
	b.Helper()
	files := map[string]any{
		filepath.Join(out, "bench", "samples.json"):  m,
		filepath.Join(out, "share", "overhead.json"): m.overhead(),
	}
	for path, v := range files {
		text, err := json.MarshalIndent(v, "", "  ")
		if err == nil {
			err = writeFile(path, append(text, '\n'))
		}
		if err != nil {
			b.Fatal(err)
		}
	}
	report := m.report(machine(b.Context()), ks, time.Now())
	if err := writeFile(filepath.Join(out, "bench", "report.md"), []byte(report)); err != nil {
		b.Fatal(err)
	}
	b.Logf("%s", report)
}

func writeFile(path string, content []byte) error {
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return err
	}
	return os.WriteFile(path, content, 0o644)
}
