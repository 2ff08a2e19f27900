package guesttest

import (
	"bufio"
	"context"
	"encoding/json"
	"io"
	"net"
	"strings"
	"testing"
	"time"

	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/containerd/cgroups/v3/cgroup2/stats"
	"github.com/containerd/errdefs"
	"github.com/containerd/errdefs/pkg/errgrpc"
	specs "github.com/opencontainers/runtime-spec/specs-go"

	hyperstart "github.com/hypernetes/hypernetes/api/hyperstart/v1"
)

// runtimeSpec is what containerd would send for a shell command.
func runtimeSpec(t *testing.T, change func(*specs.Spec), args ...string) []byte {
	t.Helper()
	limit := int64(64 << 20)
	s := &specs.Spec{
		Version: "1.1.0",
		Process: &specs.Process{
			Args: args, Cwd: "/", Env: []string{"PATH=/bin:/usr/bin"}, NoNewPrivileges: true,
			Capabilities: &specs.LinuxCapabilities{
				Bounding: []string{"CAP_CHOWN", "CAP_KILL"}, Effective: []string{"CAP_CHOWN", "CAP_KILL"}, Permitted: []string{"CAP_CHOWN", "CAP_KILL"},
			},
		},
		Root: &specs.Root{Path: "rootfs"},
		Mounts: []specs.Mount{
			{Destination: "/proc", Type: "proc", Source: "proc", Options: []string{"nosuid", "noexec", "nodev"}},
			{Destination: "/dev", Type: "tmpfs", Source: "tmpfs", Options: []string{"nosuid", "strictatime", "mode=755", "size=65536k"}},
			{Destination: "/dev/pts", Type: "devpts", Source: "devpts", Options: []string{"nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620", "gid=5"}},
			{Destination: "/dev/mqueue", Type: "mqueue", Source: "mqueue", Options: []string{"nosuid", "noexec", "nodev"}},
			{Destination: "/sys", Type: "sysfs", Source: "sysfs", Options: []string{"nosuid", "noexec", "nodev", "ro"}},
			{Destination: "/sys/fs/cgroup", Type: "cgroup", Source: "cgroup", Options: []string{"nosuid", "noexec", "nodev", "relatime", "ro"}},
			{Destination: "/dev/shm", Type: "bind", Source: "/run/containerd/sandbox/shm", Options: []string{"rbind", "ro"}},
		},
		Linux: &specs.Linux{
			CgroupsPath: "/kubepods/x",
			Namespaces: []specs.LinuxNamespace{{Type: "pid"}, {Type: "ipc", Path: "/proc/1/ns/ipc"}, {Type: "uts", Path: "/proc/1/ns/uts"},
				{Type: "mount"}, {Type: "network", Path: "/var/run/netns/x"}, {Type: "cgroup"}},
			Resources:   &specs.LinuxResources{Memory: &specs.LinuxMemory{Limit: &limit}, CPU: &specs.LinuxCPU{Cpus: "5-7"}},
			MaskedPaths: []string{"/proc/kcore"}, ReadonlyPaths: []string{"/proc/sys"},
			Seccomp: &specs.LinuxSeccomp{DefaultAction: "SCMP_ACT_ALLOW", Architectures: []specs.Arch{"SCMP_ARCH_X86_64"},
				Syscalls: []specs.LinuxSyscall{{Names: []string{"mkdir", "mkdirat"}, Action: "SCMP_ACT_ERRNO"}}},
		},
	}
	if change != nil {
		change(s)
	}
	b, err := json.Marshal(s)
	check(t, err)
	return b
}

// guest is a configured VM with a busybox layer.
type guest struct {
	*vm
	events chan *hyperstart.Event
}

func newGuest(t *testing.T, more ...disk) *guest {
	t.Helper()
	l := layer(t)
	start := time.Now()
	v := boot(t, append([]disk{{serial: "scratch", path: scratch(t)}, {serial: "layer0", path: l, readOnly: true}}, more...)...)
	hello, err := v.sbxC.Hello(v.ctx(), &hyperstart.HelloRequest{ProtocolMinor: 1})
	check(t, err)
	t.Logf("hello after %v: %v", time.Since(start).Round(time.Millisecond), hello)
	before := time.Now()
	_, err = v.sbxC.Configure(v.ctx(), &hyperstart.ConfigureRequest{
		SandboxId: "sb", Hostname: "pod-1", ResolvConf: []byte("nameserver 10.0.0.10\n"), Hosts: []byte("127.0.0.1 localhost\n"),
		Sysctls: map[string]string{"net.ipv4.ip_unprivileged_port_start": "0"}, Clock: timestamppb.Now(),
		Entropy: []byte("0123456789abcdef0123456789abcdef"), ScratchSerial: "scratch", ShmBytes: 8 << 20, SharePidNamespace: true,
	})
	check(t, err)
	t.Logf("configured in %v", time.Since(before).Round(time.Millisecond))
	g := &guest{vm: v}
	g.follow(t, 0)
	return g
}

// follow reads events above after until the channel goes.
func (g *guest) follow(t *testing.T, after uint64) {
	t.Helper()
	stream, err := g.sbxC.Events(context.Background(), &hyperstart.EventsRequest{After: after})
	check(t, err)
	events := make(chan *hyperstart.Event, 2000)
	g.events = events
	go func() { // ends with the channel
		defer close(events)
		for {
			e, err := stream.Recv()
			if err != nil {
				return
			}
			events <- e
		}
	}()
}

// next waits for the next event.
func (g *guest) next() *hyperstart.Event {
	g.t.Helper()
	select {
	case e, ok := <-g.events:
		if !ok {
			g.t.Fatal("event stream ended")
		}
		return e
	case <-time.After(time.Minute):
		g.t.Fatal("no event for a minute")
	}
	return nil
}

func (g *guest) exit(id, exec string, status uint32) {
	g.t.Helper()
	e := g.next().GetExit()
	if e == nil || e.ContainerId != id || e.ExecId != exec || e.Status != status {
		g.t.Fatalf("event %v, want exit of %s/%s with %d", e, id, exec, status)
	}
}

func (g *guest) start(id string, in *hyperstart.CreateRequest) {
	g.t.Helper()
	in.ContainerId = id
	in.Rootfs = &hyperstart.RootFS{LayerSerials: []string{"layer0"}}
	begin := time.Now()
	_, err := g.ctrs.Create(g.ctx(), in)
	check(g.t, err)
	mid := time.Now()
	_, err = g.ctrs.Start(g.ctx(), &hyperstart.ProcessRequest{ContainerId: id})
	check(g.t, err)
	g.t.Logf("%s: create %v, start %v", id, mid.Sub(begin).Round(time.Millisecond), time.Since(mid).Round(time.Millisecond))
}

func (g *guest) delete(id, exec string, status uint32) {
	g.t.Helper()
	r, err := g.ctrs.Delete(g.ctx(), &hyperstart.ProcessRequest{ContainerId: id, ExecId: exec})
	check(g.t, err)
	if r.ExitStatus != status {
		g.t.Fatalf("delete %s/%s: status %d, want %d", id, exec, r.ExitStatus, status)
	}
	if age := time.Since(r.ExitedAt.AsTime()); age < -time.Minute || age > 10*time.Minute {
		g.t.Fatalf("exited_at %v is off", r.ExitedAt.AsTime())
	}
}

// sh runs a shell script to its end and returns its output.
func (g *guest) sh(id, script string, status uint32, change func(*specs.Spec), in *hyperstart.CreateRequest) string {
	g.t.Helper()
	out := g.stdio(id, "", 1)
	if in == nil {
		in = &hyperstart.CreateRequest{}
	}
	in.Spec, in.Stdout = runtimeSpec(g.t, change, "sh", "-c", script+" 2>&1"), true
	g.start(id, in)
	text := readAll(g.t, out)
	e := g.next()
	for e.GetOom() != nil {
		e = g.next()
	}
	if x := e.GetExit(); x == nil || x.ContainerId != id || x.Status != status {
		g.t.Fatalf("%s: event %v, want exit %d; output:\n%s", id, e, status, text)
	}
	g.delete(id, "", status)
	return text
}

func contains(t *testing.T, text string, want ...string) {
	t.Helper()
	for _, w := range want {
		if !strings.Contains(text, w) {
			t.Errorf("output lacks %q:\n%s", w, text)
		}
	}
}

func TestGuest(t *testing.T) {
	g := newGuest(t)
	// One VM for all: a boot under software emulation takes seconds.
	for _, c := range []struct {
		name string
		run  func(*guest)
	}{
		{"environment", (*guest).testEnvironment},
		{"failures", (*guest).testFailures},
		{"stdin", (*guest).testStdin},
		{"terminal", (*guest).testTerminal},
		{"exec", (*guest).testExec},
		{"kill", (*guest).testKill},
		{"oom", (*guest).testOOM},
		{"volumes", (*guest).testVolumes},
		{"pause", (*guest).testPause},
		{"pid namespaces", (*guest).testPIDNamespaces},
		{"dial", (*guest).testDial},
		{"hotplug", (*guest).testHotplug},
		{"backpressure", (*guest).testBackpressure},
		{"reconnect", (*guest).testReconnect},
		{"shutdown", (*guest).testShutdown},
	} {
		if !t.Run(c.name, func(t *testing.T) {
			outer := g.t
			g.t, g.vm.t = t, t
			defer func() { g.t, g.vm.t = outer, outer }()
			c.run(g)
		}) {
			break
		}
	}
}

func (g *guest) testEnvironment() {
	text := g.sh("env", `hostname; cat /etc/resolv.conf /etc/hosts /etc/hostname; df -k /dev/shm | tail -n1
test -x /bin/mkdir; /bin/mkdir /x; echo mkdir=$?; cat /sys/fs/cgroup/memory.max /proc/self/cgroup; cat /proc/1/oom_score_adj
mount | grep ' / '; cat /proc/mounts | wc -l; grep -E 'NoNewPrivs|CapBnd' /proc/self/status; ls /proc | grep '^[0-9]' | wc -l; exit 7`, 7, nil, nil)
	contains(g.t, text, "pod-1\n", "nameserver 10.0.0.10", "127.0.0.1 localhost", " 8192 ", "mkdir=1", "67108864\n", "0::/\n",
		"\n0\n", "NoNewPrivs:\t1", "CapBnd:\t0000000000000021")
	g.t.Logf("environment:\n%s", text)
}

func (g *guest) testFailures() {
	_, err := g.ctrs.Create(g.ctx(), &hyperstart.CreateRequest{ContainerId: "bad", Spec: runtimeSpec(g.t, nil, "/nonexistent"),
		Rootfs: &hyperstart.RootFS{LayerSerials: []string{"layer0"}}})
	if err = errgrpc.ToNative(err); !errdefs.IsNotFound(err) || !strings.Contains(err.Error(), "nonexistent") {
		g.t.Errorf("missing program: %v", err)
	}
	for name, in := range map[string]*hyperstart.CreateRequest{
		"id":   {ContainerId: "../x", Spec: runtimeSpec(g.t, nil, "true")},
		"spec": {ContainerId: "s", Spec: []byte("{")},
		"disk": {ContainerId: "d", Spec: runtimeSpec(g.t, nil, "true"), Rootfs: &hyperstart.RootFS{LayerSerials: []string{"a/b"}}},
	} {
		if _, err := g.ctrs.Create(g.ctx(), in); !errdefs.IsInvalidArgument(errgrpc.ToNative(err)) {
			g.t.Errorf("bad %s: %v", name, err)
		}
	}
	if _, err := g.ctrs.Start(g.ctx(), &hyperstart.ProcessRequest{ContainerId: "bad"}); !errdefs.IsNotFound(errgrpc.ToNative(err)) {
		g.t.Errorf("start of what was not created: %v", err)
	}
}

func (g *guest) testStdin() {
	in, out := g.stdio("in", "", 0), g.stdio("in", "", 1)
	g.start("in", &hyperstart.CreateRequest{Spec: runtimeSpec(g.t, nil, "sh", "-c", "wc -c; exit 3"), Stdin: true, Stdout: true})
	const size = 3 << 20
	go func() {
		_, _ = io.Copy(in, io.LimitReader(zeros{}, size))
		in.Close()
	}()
	if got := strings.TrimSpace(readAll(g.t, out)); got != "3145728" {
		g.t.Errorf("stdin: counted %s", got)
	}
	g.exit("in", "", 3)
	g.delete("in", "", 3)
	// CloseStdin without a half close: what was written before still arrives.
	in, out = g.stdio("in2", "", 0), g.stdio("in2", "", 1)
	g.start("in2", &hyperstart.CreateRequest{Spec: runtimeSpec(g.t, nil, "cat"), Stdin: true, Stdout: true})
	_, err := in.Write([]byte("hello"))
	check(g.t, err)
	_, err = g.ctrs.CloseStdin(g.ctx(), &hyperstart.ProcessRequest{ContainerId: "in2"})
	check(g.t, err)
	if got := readAll(g.t, out); got != "hello" {
		g.t.Errorf("closed stdin: %q", got)
	}
	g.exit("in2", "", 0)
	g.delete("in2", "", 0)
}

type zeros struct{}

func (zeros) Read(p []byte) (int, error) { return len(p), nil }

func (g *guest) testTerminal() {
	in, out := g.stdio("tty", "", 0), g.stdio("tty", "", 1)
	g.start("tty", &hyperstart.CreateRequest{Spec: runtimeSpec(g.t, nil, "sh"), Terminal: true, Stdin: true, Stdout: true})
	_, err := g.ctrs.Resize(g.ctx(), &hyperstart.ResizeRequest{ContainerId: "tty", Width: 132, Height: 43})
	check(g.t, err)
	_, err = in.Write([]byte("stty size; exit 5\n"))
	check(g.t, err)
	contains(g.t, readAll(g.t, out), "43 132")
	g.exit("tty", "", 5)
	g.delete("tty", "", 5)
}

func (g *guest) sleeper(id string, change func(*hyperstart.CreateRequest)) {
	out := g.stdio(id, "", 1)
	in := &hyperstart.CreateRequest{Stdout: true, Spec: runtimeSpec(g.t, nil, "sh", "-c", "trap 'exit 0' TERM; echo ready; while :; do sleep 1000 & wait; done")}
	if change != nil {
		change(in)
	}
	g.start(id, in)
	// Its PID 1 ignores SIGTERM until the trap is set.
	if line, err := bufio.NewReader(out).ReadString('\n'); line != "ready\n" {
		g.t.Fatalf("%s said %q: %v", id, line, err)
	}
}

func (g *guest) exec(id, exec string, status uint32, terminal bool, args ...string) string {
	g.t.Helper()
	p, err := json.Marshal(&specs.Process{Args: args, Cwd: "/", Env: []string{"PATH=/bin", "A=b"}})
	check(g.t, err)
	out := g.stdio(id, exec, 1)
	_, err = g.ctrs.Exec(g.ctx(), &hyperstart.ExecRequest{ContainerId: id, ExecId: exec, Process: p, Terminal: terminal, Stdout: true})
	check(g.t, err)
	begin := time.Now()
	_, err = g.ctrs.Start(g.ctx(), &hyperstart.ProcessRequest{ContainerId: id, ExecId: exec})
	check(g.t, err)
	mid := time.Now()
	text := readAll(g.t, out)
	end := time.Now()
	g.exit(id, exec, status)
	g.t.Logf("exec %s: started %v, output ended %v, exit %v", exec, mid.Sub(begin).Round(time.Millisecond),
		end.Sub(begin).Round(time.Millisecond), time.Since(begin).Round(time.Millisecond))
	g.delete(id, exec, status)
	return text
}

func (g *guest) testExec() {
	g.sleeper("ex", nil)
	contains(g.t, g.exec("ex", "e1", 9, false, "sh", "-c", "echo $A; id; exit 9"), "b\n", "uid=0")
	contains(g.t, g.exec("ex", "e2", 0, true, "sh", "-c", "test -t 1 && echo terminal"), "terminal")
	for i := range 5 { // fast ones
		g.exec("ex", "f"+string(rune('0'+i)), 0, false, "true")
	}
	p, _ := json.Marshal(&specs.Process{Args: []string{"/none"}, Cwd: "/"})
	_, err := g.ctrs.Exec(g.ctx(), &hyperstart.ExecRequest{ContainerId: "ex", ExecId: "bad", Process: p})
	check(g.t, err)
	if _, err = g.ctrs.Start(g.ctx(), &hyperstart.ProcessRequest{ContainerId: "ex", ExecId: "bad"}); !errdefs.IsNotFound(errgrpc.ToNative(err)) {
		g.t.Errorf("exec of a missing program: %v", err)
	}
	pids, err := g.ctrs.Pids(g.ctx(), &hyperstart.ContainerRequest{ContainerId: "ex"})
	check(g.t, err)
	if len(pids.Pids) != 2 {
		g.t.Errorf("pids: %v", pids)
	}
	if _, err := g.ctrs.Delete(g.ctx(), &hyperstart.ProcessRequest{ContainerId: "ex"}); !errdefs.IsFailedPrecondition(errgrpc.ToNative(err)) {
		g.t.Errorf("delete of a running container: %v", err)
	}
	g.signal("ex", 15, false)
	g.exit("ex", "", 0)
	g.delete("ex", "", 0)
}

func (g *guest) signal(id string, sig uint32, all bool) {
	g.t.Helper()
	_, err := g.ctrs.Signal(g.ctx(), &hyperstart.SignalRequest{ContainerId: id, Signal: sig, All: all})
	check(g.t, err)
}

func (g *guest) testKill() {
	for id, all := range map[string]bool{"k1": false, "k2": true} {
		g.sleeper(id, nil)
		g.signal(id, 9, all)
		g.exit(id, "", 137)
		if _, err := g.ctrs.Signal(g.ctx(), &hyperstart.SignalRequest{ContainerId: id, Signal: 9}); !errdefs.IsNotFound(errgrpc.ToNative(err)) {
			g.t.Errorf("signal to the dead: %v", err)
		}
		g.delete(id, "", 137)
	}
	// Created, never started.
	_, err := g.ctrs.Create(g.ctx(), &hyperstart.CreateRequest{ContainerId: "k3", Spec: runtimeSpec(g.t, nil, "true"), Rootfs: &hyperstart.RootFS{LayerSerials: []string{"layer0"}}})
	check(g.t, err)
	g.delete("k3", "", 137)
	g.exit("k3", "", 137)
}

func (g *guest) testOOM() {
	limit := int64(16 << 20)
	out := g.stdio("oom", "", 1)
	g.start("oom", &hyperstart.CreateRequest{Stdout: true, Spec: runtimeSpec(g.t, func(s *specs.Spec) {
		s.Linux.Resources.Memory.Limit = &limit
	}, "sh", "-c", "exec tail /dev/zero")})
	readAll(g.t, out)
	if e := g.next(); e.GetOom().GetContainerId() != "oom" {
		g.t.Errorf("first event %v, want OOM", e)
	}
	g.exit("oom", "", 137)
	g.delete("oom", "", 137)
}

func (g *guest) testVolumes() {
	put := func(version string, files ...*hyperstart.File) {
		g.t.Helper()
		_, err := g.sbxC.PutFiles(g.ctx(), &hyperstart.PutFilesRequest{Volume: "cm", Tree: &hyperstart.FileTree{Version: version, Files: files}})
		check(g.t, err)
	}
	put("..v1", &hyperstart.File{Path: "a", Data: []byte("one")}, &hyperstart.File{Path: "gone", Data: []byte("x")})
	bind := func(vol, dst string) func(*specs.Spec) {
		return func(s *specs.Spec) {
			s.Mounts = append(s.Mounts, specs.Mount{Destination: dst, Source: "/run/h8s/volumes/" + vol, Type: "bind", Options: []string{"rbind", "rprivate", "rw"}})
		}
	}
	g.sleeper("vol", func(in *hyperstart.CreateRequest) {
		in.Volumes = []*hyperstart.Volume{
			{Name: "cm", Kind: &hyperstart.Volume_Files{Files: &hyperstart.FileTree{Version: "..v1"}}},
			{Name: "late", Kind: &hyperstart.Volume_Files{Files: &hyperstart.FileTree{Version: "..v1"}}},
			{Name: "disk", Kind: &hyperstart.Volume_EmptyDir{EmptyDir: &hyperstart.EmptyDir{SizeLimit: 4 << 20, Mode: 0o2770, Gid: 2000, Directories: []string{"sub/deep"}}}},
			{Name: "mem", Kind: &hyperstart.Volume_EmptyDir{EmptyDir: &hyperstart.EmptyDir{Memory: true, SizeLimit: 1 << 20}}},
			{Name: "log", Kind: &hyperstart.Volume_Files{Files: &hyperstart.FileTree{Files: []*hyperstart.File{{Path: "", Mode: 0o666}}}}},
		}
		in.Spec = runtimeSpec(g.t, func(s *specs.Spec) {
			bind("disk", "/disk")(s)
			bind("mem", "/mem")(s)
			bind("cm", "/cm")(s)
			bind("late", "/late")(s)
			bind("disk/sub/deep", "/sub")(s)
			bind("cm/a", "/a")(s)
			bind("log", "/dev/termination-log")(s)
		}, "sh", "-c", "echo ready; sleep 1000")
	})
	_, err := g.sbxC.PutFiles(g.ctx(), &hyperstart.PutFilesRequest{Volume: "late", Tree: &hyperstart.FileTree{Version: "..v1",
		Files: []*hyperstart.File{{Path: "l", Data: []byte("late\n")}}}})
	check(g.t, err)
	contains(g.t, g.exec("vol", "s", 0, false, "sh", "-c", "echo deep > /sub/f; cat /disk/sub/deep/f /a; ln -s / /disk/evil"), "deep\n", "one")
	_, err = g.ctrs.Create(g.ctx(), &hyperstart.CreateRequest{ContainerId: "evil", Spec: runtimeSpec(g.t, bind("disk/evil/etc", "/out"), "true"),
		Rootfs: &hyperstart.RootFS{LayerSerials: []string{"layer0"}}})
	if err = errgrpc.ToNative(err); !errdefs.IsInvalidArgument(err) || !strings.Contains(err.Error(), "leads out of the volume") {
		g.t.Errorf("a link out of the volume: %v", err)
	}
	text := g.exec("vol", "q", 0, false, "sh", "-c", `cat /cm/a; echo; cat /late/l; ls -ldn /disk
dd if=/dev/zero of=/disk/f bs=1M count=8 2>&1; dd if=/dev/zero of=/mem/f bs=64k count=100 2>&1; ls -l /disk/f /mem/f; echo done > /dev/termination-log
echo x > /file; true`)
	contains(g.t, text, "one\n", "late\n", "drwxrws--- ", " 2000 ", "1048576", "1048576")
	if !strings.Contains(text, "quota exceeded") && !strings.Contains(text, "No space left") || strings.Contains(text, " 8388608 ") {
		g.t.Errorf("quota did not hold:\n%s", text)
	}
	put("..v2", &hyperstart.File{Path: "a", Data: []byte("two")}, &hyperstart.File{Path: "d/b", Data: []byte("b")})
	contains(g.t, g.exec("vol", "r", 0, false, "sh", "-c", "cat /cm/a /cm/d/b; ls -a /cm"), "two", "..v2\n")
	r, err := g.sbxC.ReadFile(g.ctx(), &hyperstart.ReadFileRequest{Volume: "log", Limit: 3})
	check(g.t, err)
	if string(r.Data) != "ne\n" || r.Size != 5 {
		g.t.Errorf("termination log: %v", r)
	}
	st, err := g.sbxC.Stats(g.ctx(), &hyperstart.SandboxStatsRequest{})
	check(g.t, err)
	g.t.Logf("sandbox stats: %v", st)
	if len(st.Volumes) != 2 || st.Volumes[0].CapacityBytes != 4<<20 || st.Volumes[0].UsedBytes == 0 || st.MemoryTotal == 0 {
		g.t.Errorf("sandbox stats: %v", st)
	}
	cs, err := g.ctrs.Stats(g.ctx(), &hyperstart.ContainerRequest{ContainerId: "vol"})
	check(g.t, err)
	var m stats.Metrics
	check(g.t, proto.Unmarshal(cs.Cgroup2Metrics, &m))
	if m.Memory.GetUsage() == 0 || m.CPU.GetUsageUsec() == 0 || m.Pids.GetCurrent() == 0 || m.Memory.UsageLimit != 64<<20 || cs.WritableBytes == 0 {
		g.t.Errorf("container stats: %v writable %d", &m, cs.WritableBytes)
	}
	g.signal("vol", 9, false)
	g.exit("vol", "", 137)
	g.delete("vol", "", 137)
}

func (g *guest) testPause() {
	g.sleeper("pz", nil)
	req := &hyperstart.ContainerRequest{ContainerId: "pz"}
	_, err := g.ctrs.Pause(g.ctx(), req)
	check(g.t, err)
	_, err = g.ctrs.Resume(g.ctx(), req)
	check(g.t, err)
	limit := int64(32 << 20)
	b, _ := json.Marshal(&specs.LinuxResources{Memory: &specs.LinuxMemory{Limit: &limit}, CPU: &specs.LinuxCPU{Cpus: "3"}})
	_, err = g.ctrs.Update(g.ctx(), &hyperstart.UpdateRequest{ContainerId: "pz", Resources: b})
	check(g.t, err)
	contains(g.t, g.exec("pz", "u", 0, false, "cat", "/sys/fs/cgroup/memory.max"), "33554432")
	_, err = g.ctrs.Pause(g.ctx(), req)
	check(g.t, err)
	g.signal("pz", 9, false)
	g.exit("pz", "", 137)
	g.delete("pz", "", 137)
}

func (g *guest) testPIDNamespaces() {
	g.sleeper("p1", nil)
	text := g.sh("p2", "ps", 0, nil, &hyperstart.CreateRequest{PidNamespaceOf: "p1"})
	contains(g.t, text, "sleep 1000")
	g.sleeper("p3", func(in *hyperstart.CreateRequest) { in.SandboxPidNamespace = true })
	text = g.sh("p4", "ps; sleep 2000 & exit 0", 0, nil, &hyperstart.CreateRequest{SandboxPidNamespace: true})
	contains(g.t, text, "h8s-pause", "sleep 1000")
	for _, id := range []string{"p1", "p3"} {
		g.signal(id, 9, false)
		g.exit(id, "", 137)
		g.delete(id, "", 137)
	}
}

func (g *guest) testDial() {
	dial := func(ctxPort uint32) (net.Conn, error) {
		return g.host.Open(g.ctx(), &hyperstart.StreamHeader{Kind: &hyperstart.StreamHeader_Dial{Dial: &hyperstart.Dial{Port: ctxPort}}})
	}
	if _, err := dial(81); err == nil || !strings.Contains(err.Error(), "refused") {
		g.t.Errorf("dial to a closed port: %v", err)
	}
	out := g.stdio("srv", "", 1)
	g.start("srv", &hyperstart.CreateRequest{Stdout: true, Spec: runtimeSpec(g.t, nil, "sh", "-c", "nc -l -p 8080 -e sh -c 'echo up >&2; tr a-z A-Z'")})
	var conn net.Conn
	var err error
	for end := time.Now().Add(time.Minute); ; time.Sleep(100 * time.Millisecond) { // the server has no way to say it listens
		if conn, err = dial(8080); err == nil || time.Now().After(end) {
			break
		}
	}
	check(g.t, err)
	_, err = conn.Write([]byte("hello\n"))
	check(g.t, err)
	check(g.t, conn.Close())
	if got := readAll(g.t, conn); got != "HELLO\n" {
		g.t.Errorf("dial: %q", got)
	}
	readAll(g.t, out)
	g.exit("srv", "", 0)
	g.delete("srv", "", 0)
}

func (g *guest) testHotplug() {
	img := layer(g.t)
	done := make(chan error, 1)
	go func() {
		_, err := g.ctrs.Create(g.ctx(), &hyperstart.CreateRequest{ContainerId: "hp", Spec: runtimeSpec(g.t, nil, "true"),
			Rootfs: &hyperstart.RootFS{LayerSerials: []string{"layer0", "layer1"}}})
		done <- err
	}()
	time.Sleep(300 * time.Millisecond) // let it wait for the disk
	g.plug(disk{serial: "layer1", path: img, readOnly: true})
	check(g.t, <-done)
	_, err := g.ctrs.Start(g.ctx(), &hyperstart.ProcessRequest{ContainerId: "hp"})
	check(g.t, err)
	g.exit("hp", "", 0)
	g.delete("hp", "", 0)
	check(g.t, g.qmp.run("device_del", map[string]any{"id": "layer1"}))
}

func (g *guest) testBackpressure() {
	// A reader that does not read stops its writer and nobody else.
	out := g.stdio("bp", "", 1)
	g.start("bp", &hyperstart.CreateRequest{Stdout: true, Spec: runtimeSpec(g.t, nil, "sh", "-c", "dd if=/dev/zero bs=64k count=64 2>/dev/null; echo end")})
	if text := g.sh("bp2", "echo other", 0, nil, nil); text != "other\n" {
		g.t.Errorf("other container: %q", text)
	}
	n, err := io.Copy(io.Discard, bufio.NewReader(out))
	check(g.t, err)
	if n != 64*64<<10+4 {
		g.t.Errorf("read %d bytes", n)
	}
	g.exit("bp", "", 0)
	g.delete("bp", "", 0)
}

// testReconnect loses the channel, as when the shim is replaced, and finds everything
// as it was.
func (g *guest) testReconnect() {
	g.sleeper("stay", nil)
	check(g.t, g.host.Close())
	// The channel has no mark between two connections: the guest must have seen the end
	// of one before the other begins, and nothing tells the host that it has.
	time.Sleep(3 * time.Second)
	g.connect()
	out := g.stdio("stay", "", 1) // the process's output goes here now
	g.follow(g.t, 0)
	first := g.next()
	if first.Seq != 1 {
		g.t.Errorf("replay begins with %v", first)
	}
	last := first
	g.signal("stay", 15, false)
	for last.GetExit().GetContainerId() != "stay" {
		e := g.next()
		if e.Seq != last.Seq+1 {
			g.t.Fatalf("event %d after %d", e.Seq, last.Seq)
		}
		last = e
	}
	readAll(g.t, out)
	g.delete("stay", "", 0)
}

func (g *guest) testShutdown() {
	g.sleeper("last", nil)
	g.shutdown()
}

// shutdown ends the guest as the shim does.
func (g *guest) shutdown() {
	g.t.Helper()
	begin := time.Now()
	_, err := g.sbxC.Shutdown(g.ctx(), &hyperstart.ShutdownRequest{GraceSeconds: 10})
	check(g.t, err)
	select {
	case <-g.exited:
	case <-time.After(30 * time.Second):
		g.t.Fatal("VM did not power off")
	}
	g.t.Logf("shutdown and power off: %v", time.Since(begin).Round(time.Millisecond))
	if st := g.cmd.ProcessState; !st.Success() {
		g.t.Errorf("QEMU: %v", st)
	}
	if c := g.console.String(); strings.Contains(c, "panic") {
		g.t.Errorf("console:\n%s", c)
	}
}
