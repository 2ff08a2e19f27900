package shim

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	bootapi "github.com/containerd/containerd/api/runtime/bootstrap/v1"
	sandboxapi "github.com/containerd/containerd/api/runtime/sandbox/v1"
	taskapi "github.com/containerd/containerd/api/runtime/task/v3"
	"github.com/containerd/containerd/api/types"
	"github.com/containerd/containerd/api/types/runtimeoptions/v1"
	"github.com/containerd/errdefs/pkg/errgrpc"
	"github.com/containerd/ttrpc"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"
	runtimev1 "k8s.io/cri-api/pkg/apis/runtime/v1"

	volumeapi "github.com/hypernetes/hypernetes/api/volume/v1"
	"github.com/hypernetes/hypernetes/guest/image/closure"
	"github.com/hypernetes/hypernetes/test/artifacts"
)

// patience bounds every call: software emulation on a busy machine is slow.
const patience = 3 * time.Minute

// shim is one real shim process.
type shim struct {
	t      *testing.T
	id     string
	binary string
	dir    string // of this test
	bundle string
	layer  string
	// programs are further ones in the layer's /bin.
	programs []string
	args     []string
	sandbox  sandboxapi.TTRPCSandboxService
	task     taskapi.TTRPCTaskService
	volumes  volumeapi.VolumesService
	// kubelet is its root directory, volumeRoot where the volume plugin's records are.
	kubelet, volumeRoot string
}

func check(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(errgrpc.ToNative(err))
	}
}

// need returns a built file, or skips the test saying why.
func need(t *testing.T, path ...string) string {
	t.Helper()
	p := filepath.Join(append([]string{artifacts.Dir()}, path...)...)
	if _, err := os.Stat(p); err != nil {
		t.Skipf("skipped: %v; run `make own guest`", err)
	}
	return p
}

// start runs the shim's start action and connects; the sandbox is not created yet.
func start(t *testing.T, change ...func(*shim)) *shim {
	t.Helper()
	if os.Getuid() != 0 {
		t.Skip("skipped: needs root for control groups and users of VMMs")
	}
	s := &shim{t: t, id: fmt.Sprintf("shimtest-%d", time.Now().UnixNano()), dir: t.TempDir(), binary: need(t, "bin", "containerd-shim-hyper-v2")}
	s.bundle = filepath.Join(s.dir, "bundle")
	check(t, os.Mkdir(s.bundle, 0o700))
	s.kubelet, s.volumeRoot = filepath.Join(s.dir, "kubelet"), filepath.Join(s.dir, "volumes")
	for _, c := range change {
		c(s)
	}
	s.layer = busybox(t, s.dir, s.programs...)
	config := filepath.Join(s.dir, "hyper.toml")
	check(t, os.WriteFile(config, fmt.Appendf(nil, "kernel = %q\ninitrd = %q\nscratch = %q\nscratch_size_gib = 16\nstate_dir = %q\nscratch_dir = %q\nkubelet_root = %q\nvolume_root = %q\nuid_base = 1890000000\n",
		need(t, "share", "vmlinux"), need(t, "share", "initramfs.img"), need(t, "share", "scratch.ext4"), s.state(), s.dir, s.kubelet, s.volumeRoot), 0o600))
	// Not below the test's own directory: a unix socket's path has 107 characters.
	sockets, err := os.MkdirTemp("", "h8s-s-")
	check(t, err)
	t.Cleanup(func() { _ = os.RemoveAll(sockets) })
	params := &bootapi.BootstrapParams{InstanceID: s.id, Namespace: "k8s.io", SocketDir: &sockets}
	check(t, params.AddExtension(&runtimeoptions.Options{ConfigPath: config}))
	in, err := proto.Marshal(params)
	check(t, err)
	s.args = []string{"-namespace", "k8s.io", "-id", s.id, "-address", "/none"}
	out := s.run(in, "start")
	var r bootapi.BootstrapResult
	check(t, proto.Unmarshal(out, &r))
	conn, err := net.Dial("unix", strings.TrimPrefix(r.Address, "unix://"))
	check(t, err)
	c := ttrpc.NewClient(conn)
	t.Cleanup(func() {
		s.cleanUp()
		c.Close()
		s.leftNothing()
	})
	s.sandbox, s.task, s.volumes = sandboxapi.NewTTRPCSandboxClient(c), taskapi.NewTTRPCTaskClient(c), volumeapi.NewVolumesClient(c)
	return s
}

func (s *shim) state() string { return filepath.Join(s.dir, "state") }

// run runs an action of the binary, which must say nothing but its answer.
func (s *shim) run(in []byte, action string, args ...string) []byte {
	s.t.Helper()
	cmd := exec.Command(s.binary, append(append(append([]string(nil), s.args...), args...), action)...)
	cmd.Dir, cmd.Stdin = s.bundle, bytes.NewReader(in)
	var out, errb bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &errb
	if err := cmd.Run(); err != nil || errb.Len() > 0 {
		s.t.Fatalf("%s: %v: %s", action, err, errb.String())
	}
	return out.Bytes()
}

// cleanUp ends the sandbox however the test went.
func (s *shim) cleanUp() {
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
	defer cancel()
	_, _ = s.sandbox.ShutdownSandbox(ctx, &sandboxapi.ShutdownSandboxRequest{SandboxID: s.id})
}

// leftNothing waits for what ends by itself and reports the rest.
func (s *shim) leftNothing() {
	s.t.Helper()
	var left []string
	for deadline := time.Now().Add(10 * time.Second); time.Now().Before(deadline); <-time.After(50 * time.Millisecond) {
		if left = s.leftovers(); len(left) == 0 {
			return
		}
	}
	s.t.Errorf("left behind: %q", left)
}

func (s *shim) leftovers() []string {
	var left []string
	procs, _ := filepath.Glob("/proc/[0-9]*/cmdline")
	for _, p := range procs {
		if b, err := os.ReadFile(p); err == nil && bytes.Contains(b, []byte(s.id)) {
			left = append(left, p)
		}
	}
	for _, pattern := range []string{"/sys/fs/cgroup/*/h8s-pods/h8s-" + s.id, "/sys/fs/cgroup/h8s-pods/h8s-" + s.id, s.state() + "/sandboxes/k8s.io/*", s.state() + "/users/*"} {
		found, _ := filepath.Glob(pattern)
		left = append(left, found...)
	}
	return left
}

// busybox makes an image layer of Debian's busybox and its libraries, and of programs that
// need none.
func busybox(t *testing.T, dir string, programs ...string) string {
	t.Helper()
	tree := filepath.Join(dir, "tree")
	libs, err := closure.Of("", "/usr/bin/busybox")
	if err != nil {
		t.Skipf("skipped: Debian package busybox: %v", err)
	}
	put := func(from, to string) {
		b, err := os.ReadFile(from)
		check(t, err)
		to = filepath.Join(tree, to)
		check(t, os.MkdirAll(filepath.Dir(to), 0o755))
		check(t, os.WriteFile(to, b, 0o755))
	}
	for _, f := range append(libs, "/usr/bin/busybox") {
		put(f, f)
	}
	for _, p := range programs {
		put(p, filepath.Join("bin", filepath.Base(p)))
	}
	for _, d := range []string{"bin", "proc", "sys", "dev", "tmp", "etc"} {
		check(t, os.MkdirAll(filepath.Join(tree, d), 0o755))
	}
	for _, applet := range []string{"sh", "ls", "sleep", "hostname", "dd", "tr", "cat", "mkdir", "rm"} {
		check(t, os.Symlink("/usr/bin/busybox", filepath.Join(tree, "bin", applet)))
	}
	layer := filepath.Join(dir, "layer.erofs")
	if out, err := exec.Command("mkfs.erofs", "--quiet", "-Enoinline_data", layer, tree).CombinedOutput(); err != nil {
		t.Skipf("skipped: Debian package erofs-utils: %v: %s", err, out)
	}
	return layer
}

// testbox builds the program, for a layer.
func testbox(t *testing.T) string {
	t.Helper()
	box := filepath.Join(t.TempDir(), "testbox")
	build := exec.Command("go", "build", "-o", box, "github.com/hypernetes/hypernetes/test/images/testbox")
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("build testbox: %v\n%s", err, out)
	}
	return box
}

func (s *shim) ctx() context.Context {
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	s.t.Cleanup(cancel)
	return ctx
}

// create creates the sandbox.
func (s *shim) create() error {
	s.t.Helper()
	b, err := proto.Marshal(&runtimev1.PodSandboxConfig{
		Metadata: &runtimev1.PodSandboxMetadata{Name: "pod", Namespace: "test", Uid: "uid-1"}, Hostname: "pod",
		Linux: &runtimev1.LinuxPodSandboxConfig{SecurityContext: &runtimev1.LinuxSandboxSecurityContext{
			NamespaceOptions: &runtimev1.NamespaceOption{Pid: runtimev1.NamespaceMode_CONTAINER},
		}},
	})
	check(s.t, err)
	_, err = s.sandbox.CreateSandbox(s.ctx(), &sandboxapi.CreateSandboxRequest{
		SandboxID: s.id, BundlePath: s.bundle, Options: &anypb.Any{TypeUrl: "runtime.v1.PodSandboxConfig", Value: b},
	})
	return errgrpc.ToNative(err)
}

// up creates and starts the sandbox and returns the VMM's pid.
func (s *shim) up() int {
	s.t.Helper()
	check(s.t, s.create())
	r, err := s.sandbox.StartSandbox(s.ctx(), &sandboxapi.StartSandboxRequest{SandboxID: s.id})
	check(s.t, err)
	return int(r.Pid)
}

// process is a started container's, with what it writes.
type process struct {
	s      *shim
	name   string
	out    *bytes.Buffer
	copied chan struct{}
}

// sh starts a container that runs a shell command.
func (s *shim) sh(name, command string, change ...func(*specs.Spec)) *process {
	s.t.Helper()
	fifo, err := s.container(name, command, change...)
	check(s.t, err)
	p := &process{s: s, name: name, out: &bytes.Buffer{}, copied: make(chan struct{})}
	f, err := os.Open(fifo)
	check(s.t, err)
	go func() {
		defer close(p.copied)
		defer f.Close()
		_, _ = io.Copy(p.out, f)
	}()
	_, err = s.task.Start(s.ctx(), &taskapi.StartRequest{ID: name})
	check(s.t, err)
	return p
}

// lines starts a container that runs a shell command and returns the lines it writes.
func (s *shim) lines(name, command string, change ...func(*specs.Spec)) <-chan string {
	s.t.Helper()
	fifo, err := s.container(name, command, change...)
	check(s.t, err)
	f, err := os.Open(fifo)
	check(s.t, err)
	out := make(chan string)
	go func() {
		defer close(out)
		defer f.Close()
		for lines := bufio.NewScanner(f); lines.Scan(); {
			select {
			case out <- lines.Text():
			case <-s.t.Context().Done():
				return
			}
		}
	}()
	_, err = s.task.Start(s.ctx(), &taskapi.StartRequest{ID: name})
	check(s.t, err)
	return out
}

// container creates a container for sh; its output goes to a fifo.
func (s *shim) container(name, command string, change ...func(*specs.Spec)) (string, error) {
	s.t.Helper()
	bundle := filepath.Join(s.dir, name)
	check(s.t, os.Mkdir(bundle, 0o700))
	fifo := filepath.Join(bundle, "out")
	check(s.t, unix.Mkfifo(fifo, 0o600))
	spec := &specs.Spec{
		Version: "1.2.0", Root: &specs.Root{Path: "rootfs"},
		Process: &specs.Process{Args: []string{"/bin/sh", "-c", command}, Cwd: "/", Env: []string{"PATH=/bin:/usr/bin"}},
		Mounts:  []specs.Mount{{Destination: "/proc", Type: "proc", Source: "proc"}, {Destination: "/dev", Type: "tmpfs", Source: "tmpfs", Options: []string{"mode=755"}}},
		Linux: &specs.Linux{CgroupsPath: "/x/" + name, Namespaces: []specs.LinuxNamespace{
			{Type: specs.PIDNamespace}, {Type: specs.MountNamespace}, {Type: specs.NetworkNamespace, Path: "/proc/1/ns/net"},
		}},
	}
	for _, c := range change {
		c(spec)
	}
	b, err := json.Marshal(spec)
	check(s.t, err)
	check(s.t, os.WriteFile(filepath.Join(bundle, "config.json"), b, 0o600))
	_, err = s.task.Create(s.ctx(), &taskapi.CreateTaskRequest{ID: name, Bundle: bundle, Stdout: fifo, Rootfs: []*types.Mount{
		{Type: "erofs", Source: s.layer, Options: []string{"ro", "loop"}},
		{Type: "format/mkdir/overlay", Source: "overlay", Options: []string{"upperdir=/s/fs", "workdir=/s/work", "lowerdir={{ mount 0 }}"}},
	}})
	return fifo, errgrpc.ToNative(err)
}

// end waits for the process and returns its exit code and output.
func (p *process) end() (uint32, string) {
	p.s.t.Helper()
	r, err := p.s.task.Wait(p.s.ctx(), &taskapi.WaitRequest{ID: p.name})
	check(p.s.t, err)
	select {
	case <-p.copied:
	case <-time.After(30 * time.Second):
		p.s.t.Error("output has no end")
		return r.ExitStatus, ""
	}
	return r.ExitStatus, p.out.String()
}

// forgetUsers removes lock files of users of a killed shim; they are free already.
func (s *shim) forgetUsers() {
	files, _ := filepath.Glob(s.state() + "/users/*")
	for _, f := range files {
		_ = os.Remove(f)
	}
}
