package hyperctl

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/hypernetes/hypernetes/test/artifacts"
)

// testRuntime is a containerd of the test's own, with runc, in network and
// mount namespaces of its own.
type testRuntime struct {
	t   *testing.T
	dir string
	pid int
}

const runtimeConfig = `version = 4
root = "%[1]s/root"
state = "%[1]s/state"
[plugins.'io.containerd.cri.v1.images'.pinned_images]
  sandbox = "h8s.local/pause:1"
[plugins.'io.containerd.cri.v1.images']
  snapshotter = "native"
[[plugins.'io.containerd.transfer.v1.local'.unpack_config]]
  platform = "linux/amd64"
  snapshotter = "native"
  differ = "walking"
[plugins.'io.containerd.cri.v1.runtime']
  restrict_oom_score_adj = true
  [plugins.'io.containerd.cri.v1.runtime'.cni]
    bin_dirs = ["%[2]s/cni"]
    conf_dir = "%[1]s/net.d"
[plugins.'io.containerd.server.v1.grpc']
  address = "%[1]s/c.sock"
[plugins.'io.containerd.server.v1.ttrpc']
  address = "%[1]s/t.sock"
`

const runtimeNetwork = `{"cniVersion":"1.0.0","name":"test","plugins":[
 {"type":"ptp","ipam":{"type":"host-local","subnet":"10.98.0.0/24","dataDir":"%s/ipam"}}]}`

// built returns the directory of built programs, or skips the test.
func built(t *testing.T) string {
	t.Helper()
	out := artifacts.Dir()
	if os.Getuid() != 0 {
		t.Skip("needs root, to run a containerd")
	}
	for _, f := range []string{"bin/containerd", "bin/containerd-shim-runc-v2", "cni/ptp", "images/pause.tar", "images/busybox.tar", "images/testbox.tar"} {
		if _, err := os.Stat(filepath.Join(out, f)); err != nil {
			t.Skipf("needs built programs and images (`make build`): %v", err)
		}
	}
	if _, err := exec.LookPath("runc"); err != nil {
		t.Skipf("needs Debian's runc: %v", err)
	}
	return out
}

func startRuntime(t *testing.T) *testRuntime {
	t.Helper()
	out := built(t)
	t.Setenv("H8S_OUT", out)
	dir, err := os.MkdirTemp("/tmp", "hyperctl-test-") // short: socket paths have a limit
	must(t, err)
	r := &testRuntime{t: t, dir: dir}
	must(t, os.Mkdir(filepath.Join(dir, "net.d"), 0o755))
	must(t, os.WriteFile(filepath.Join(dir, "config.toml"), fmt.Appendf(nil, runtimeConfig, dir, out), 0o600))
	must(t, os.WriteFile(filepath.Join(dir, "net.d", "10-test.conflist"), fmt.Appendf(nil, runtimeNetwork, dir), 0o600))
	// /run is private: netns files and runtime state die with the namespace; and
	// all processes die with containerd, which is their PID 1. containerd copies
	// /etc/hosts into Pods and fails without one, as on a bare Debian.
	cmd := exec.Command("sh", "-ec", `mount --make-rprivate /; mount -t proc proc /proc; mount -t tmpfs tmpfs /run; mkdir /run/netns /run/etc /run/work
		mount -t overlay -o lowerdir=/etc,upperdir=/run/etc,workdir=/run/work overlay /etc; echo 127.0.0.1 localhost >/etc/hosts
		ip link set lo up; exec "$0" -c "$1"`, filepath.Join(out, "bin", "containerd"), filepath.Join(dir, "config.toml"))
	cmd.Env = append(os.Environ(), "PATH="+filepath.Join(out, "bin")+":"+os.Getenv("PATH"))
	// The kernel means the parent's thread with Pdeathsig: keep this one.
	runtime.LockOSThread()
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWNET | syscall.CLONE_NEWNS | syscall.CLONE_NEWPID, Pdeathsig: syscall.SIGKILL}
	before := cgroups()
	var log bytes.Buffer
	cmd.Stdout, cmd.Stderr = &log, &log
	must(t, cmd.Start())
	r.pid = cmd.Process.Pid
	t.Cleanup(func() {
		r.call(nil, "rm", "-fa")
		_ = cmd.Process.Signal(syscall.SIGTERM)
		_ = cmd.Wait()
		if t.Failed() {
			t.Logf("containerd: ...%s", log.String()[max(0, log.Len()-8000):])
		}
		for _, g := range cgroups() {
			if !slices.Contains(before, g) {
				_ = os.Remove(g) // of a containerd that was killed; only if empty
			}
		}
		if err := os.RemoveAll(dir); err != nil {
			t.Error(err)
		}
	})
	r.await()
	for _, image := range []string{"pause", "busybox", "testbox"} {
		r.want(0, "", "load", filepath.Join(out, "images", image+".tar"))
	}
	return r
}

// cgroups are those of CRI containers outside Kubernetes, innermost first.
func cgroups() []string {
	inner, _ := filepath.Glob("/sys/fs/cgroup/*/k8s.io/*")
	outer, _ := filepath.Glob("/sys/fs/cgroup/*/k8s.io")
	return append(inner, outer...)
}

func (r *testRuntime) await() {
	r.t.Helper()
	deadline := time.NewTimer(2 * time.Minute)
	defer deadline.Stop()
	tick := time.NewTicker(50 * time.Millisecond)
	defer tick.Stop()
	for {
		if c, err := net.Dial("unix", filepath.Join(r.dir, "c.sock")); err == nil {
			_ = c.Close()
			return
		}
		select {
		case <-tick.C:
		case <-deadline.C:
			r.t.Fatal("containerd does not come up")
		}
	}
}

// call runs hyperctl in this process.
func (r *testRuntime) call(stdin io.Reader, args ...string) (code int, out, errs string) {
	ctx, cancel := context.WithTimeout(context.Background(), 2*time.Minute)
	defer cancel()
	var stdout, stderr bytes.Buffer
	cmd := New()
	cmd.SetIn(stdin)
	cmd.SetOut(&stdout)
	cmd.SetErr(&stderr)
	cmd.SetArgs(append([]string{"--runtime-endpoint", filepath.Join(r.dir, "c.sock"),
		"--runtime-netns", fmt.Sprintf("/proc/%d/ns/net", r.pid)}, args...))
	err := cmd.ExecuteContext(ctx)
	var exit *ExitError
	switch {
	case errors.As(err, &exit):
		code = exit.Code
		if exit.Err != nil {
			stderr.WriteString(err.Error())
		}
	case err != nil:
		code = -1
		stderr.WriteString(err.Error())
	}
	return code, stdout.String(), stderr.String()
}

// want runs hyperctl and checks its exit code (-1: an error of its own) and
// that part is in its output. It returns standard output.
func (r *testRuntime) want(code int, part string, args ...string) string {
	r.t.Helper()
	got, out, errs := r.call(nil, args...)
	if got != code || !strings.Contains(out+errs, part) {
		r.t.Errorf("hyperctl %s: code %d, %q %q; want %d, %q", strings.Join(args, " "), got, out, errs, code, part)
	}
	return strings.TrimSpace(out)
}

// awaitLog waits until a Pod has printed something.
func (r *testRuntime) awaitLog(pod, text string) {
	r.t.Helper()
	tick := time.NewTicker(50 * time.Millisecond)
	defer tick.Stop()
	for range 400 {
		if _, out, _ := r.call(nil, "logs", pod); strings.Contains(out, text) {
			return
		}
		<-tick.C
	}
	r.t.Fatalf("Pod %s never printed %q", pod, text)
}

func TestPodsUnderRunc(t *testing.T) {
	r := startRuntime(t)
	t.Setenv("HYPERCTL_RUNTIME", "runc")

	t.Run("foreground", func(t *testing.T) {
		code, out, errs := r.call(nil, "run", "--rm", "busybox", "sh", "-c", "echo out; echo err >&2; exit 7")
		if code != 7 || out != "out\n" || errs != "err\n" {
			t.Errorf("code %d, %q, %q", code, out, errs)
		}
		code, out, _ = r.call(strings.NewReader(strings.Repeat("0123456789", 50000)), "run", "-i", "--rm", "busybox", "wc", "-c")
		if code != 0 || strings.TrimSpace(out) != "500000" {
			t.Errorf("stdin: code %d, %q", code, out)
		}
		r.want(137, "", "run", "--rm", "h8s.local/testbox", "suicide", "9")
		r.want(0, "quick", "run", "-t", "--rm", "busybox", "echo", "quick")
	})
	t.Run("detached", func(t *testing.T) {
		pod := r.want(0, "", "run", "-d", "--name", "box", "-e", "GREETING=hello", "busybox", "sh", "-c", "echo started; exec sleep 1000")
		r.awaitLog("box", "started")
		if len(pod) != 64 {
			t.Fatalf("run -d printed %q", pod)
		}
		r.want(0, "hello", "exec", "box", "sh", "-c", "echo $GREETING")
		r.want(0, "/dev/pts/", "exec", "-t", pod[:12], "tty")
		r.want(9, "", "exec", pod, "sh", "-c", "exit 9")
		r.want(127, "no-such-program", "exec", pod, "no-such-program")
		r.want(-1, "no Pod or container", "exec", "nobody", "true")
		r.want(-1, "is taken by", "run", "-d", "--name", "box", "busybox", "true")
		r.want(0, "started", "logs", "box")
		r.want(0, "running", "ps")
		r.want(-1, "is running; stop it first", "rm", "box")
		r.want(0, "box", "stop", "-t", "1", "box")
		r.want(0, "1 ended; -a shows them", "ps")
		r.want(0, "exited (137)", "ps", "-a")
		r.want(0, "box", "rm", "box")
		r.want(-1, `no Pod "box"`, "rm", "box")
	})
	t.Run("signals and memory", func(t *testing.T) {
		pod := r.want(0, "", "run", "-d", "h8s.local/testbox", "signals", "-code", "5")
		r.awaitLog(pod, "ready")
		r.want(0, "", "stop", pod)
		r.want(0, "exited (5)", "ps", "-a")
		r.want(137, "", "run", "-m", "24M", "--name", "hog", "h8s.local/testbox", "mem", "200")
		r.want(0, "OOMKilled", "ps", "-a")
		r.want(0, "", "rm", "-fa")
	})
	t.Run("errors", func(t *testing.T) {
		r.want(-1, "hyperctl load FILE.tar", "run", "-d", "--pull", "never", "ubuntu:trusty", "sleep", "1000")
		r.want(127, "no-such-program", "run", "--rm", "busybox", "no-such-program")
		r.want(-1, "not on this node", "rmi", "nothing:1")
		r.want(0, "POD ID   NAME   IMAGE   STATUS   AGE   IP", "ps", "-a")
	})
	t.Run("logs follow", func(t *testing.T) {
		r.want(0, "", "run", "-d", "--name", "talk", "h8s.local/testbox", "log", "5", "100ms")
		r.want(0, "line 4", "logs", "-f", "talk")
		if out := r.want(0, "", "logs", "--tail", "2", "talk"); out != "line 3\nline 4" {
			t.Errorf("tail: %q", out)
		}
	})
	r.want(0, "busybox", "images")
	r.want(0, "containerd", "info")
}
