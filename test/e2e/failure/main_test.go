package failure

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/hypernetes/hypernetes/cluster/layout"
	"github.com/hypernetes/hypernetes/cluster/status"
	"github.com/hypernetes/hypernetes/cluster/supervisor"
	"github.com/hypernetes/hypernetes/test/e2e/testcluster"
)

func TestMain(m *testing.M) { testcluster.Main(m) }

const (
	// soon is for what the kernel or a supervisor does at once, on a busy machine.
	soon = 30 * time.Second
	// later is for what takes a VM's boot or the kubelet's periodic work.
	later = 150 * time.Second
)

// vm is one incarnation of a Pod: its sandbox and that sandbox's two processes.
type vm struct {
	Sandbox   string
	Shim, VMM int
}

// scene is some Pods to do harm to and a neighbour that must not notice, in a Namespace
// of a test.
type scene struct {
	*testcluster.Namespace
	t      *testing.T
	layout layout.Node
	before testcluster.Inventory
	// was has the Pods as they were when the test began.
	was map[string]vm
}

const neighbour = "neighbour"

// set starts the Pods.
func set(t *testing.T, victims ...string) *scene {
	t.Helper()
	c := testcluster.Up(t)
	l, err := layout.NewNode(c.Node)
	if err != nil {
		t.Fatal(err)
	}
	// Pods of the node's own that are still coming up would look like leaks.
	c.Kubectl(t, "-n", "kube-system", "wait", "deployment", "--all", "--for=condition=Available", "--timeout=4m")
	s := &scene{t: t, layout: l, before: c.Inventory(t), Namespace: c.Namespace(t), was: map[string]vm{}}
	s.Apply("testdata/neighbour.yaml")
	manifest, err := os.ReadFile("testdata/victim.yaml")
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range victims {
		file := filepath.Join(t.TempDir(), name+".yaml")
		if err := os.WriteFile(file, bytes.Replace(manifest, []byte("NAME"), []byte(name), 1), 0o600); err != nil {
			t.Fatal(err)
		}
		s.Apply(file)
	}
	for _, name := range append(victims, neighbour) {
		s.Ready(name)
		s.was[name] = s.vm(name)
	}
	return s
}

// run runs a subtest on the scene.
func (s *scene) run(name string, test func(s *scene)) {
	s.t.Run(name, func(t *testing.T) {
		sub := *s
		sub.t, sub.Namespace = t, s.Namespace.For(t)
		test(&sub)
	})
}

// strike deletes the Pods and looks for what anything that happened has left.
func (s *scene) strike() {
	s.t.Helper()
	if got := s.vm(neighbour); got != s.was[neighbour] {
		s.t.Errorf("the neighbour noticed: it was %+v and is %+v", s.was[neighbour], got)
	}
	if n := s.Pod(neighbour).Container("one").RestartCount; n != 0 {
		s.t.Errorf("the neighbour was restarted %d times", n)
	}
	s.Kubectl("delete", "pod", "--all", "--wait", "--timeout=2m")
	s.NothingLeft(s.t, s.before, later)
}

// noTrace waits until nothing of a dead sandbox is left but what the kubelet collects
// later, with the Pod's or a minute after: containerd's memory of it and the shim, which
// answers for it until then. No VMM, cgroup or state of the shim, and no more
// network links than before.
func (s *scene) noTrace(v vm, links int) {
	s.t.Helper()
	var left []string
	s.t.Cleanup(func() {
		if len(left) > 0 {
			s.t.Logf("left of sandbox %s:\n  %s", v.Sandbox, strings.Join(left, "\n  "))
		}
	})
	s.Until("nothing of the dead VM is left", soon, func() bool {
		left = nil
		for kind, entries := range s.Inventory(s.t) {
			switch kind {
			case "process", "cgroup", "loop device", "mount of the machine", "file of the machine":
			default:
				continue
			}
			for entry := range entries {
				if strings.Contains(entry, v.Sandbox) && !strings.Contains(entry, "/containerd-shim-hyper-v2 ") {
					left = append(left, kind+" "+entry)
				}
			}
		}
		states, _ := filepath.Glob(filepath.Join(s.NodeRoot(s.t), "run/h8s-shim", "*", v.Sandbox+"*"))
		more, _ := filepath.Glob(filepath.Join(s.NodeRoot(s.t), "run/h8s-shim", v.Sandbox+"*"))
		left = append(left, append(states, more...)...)
		if now := s.links(); now != links {
			left = append(left, fmt.Sprintf("the node has %d links, it had %d", now, links))
		}
		return len(left) == 0
	})
}

// links counts the network links of the node.
func (s *scene) links() int {
	s.t.Helper()
	total := 0
	for _, n := range s.Inventory(s.t)["link of the node"] {
		total += n
	}
	return total
}

// vm finds the ready sandbox of a Pod and its processes.
func (s *scene) vm(pod string) vm {
	s.t.Helper()
	var found vm
	s.Until("pod "+pod+" has one ready sandbox, a shim and a VMM", soon, func() bool {
		v, err := s.find(pod)
		if err != nil {
			s.t.Logf("looking for pod %s: %v", pod, err)
		}
		found = v
		return err == nil
	})
	return found
}

func (s *scene) find(pod string) (vm, error) {
	conn, err := grpc.NewClient("unix://"+s.layout.ContainerdSocket(), grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		return vm{}, err
	}
	defer conn.Close()
	ctx, cancel := context.WithTimeout(s.t.Context(), 10*time.Second)
	defer cancel()
	list, err := cri.NewRuntimeServiceClient(conn).ListPodSandbox(ctx, &cri.ListPodSandboxRequest{Filter: &cri.PodSandboxFilter{
		State: &cri.PodSandboxStateValue{State: cri.PodSandboxState_SANDBOX_READY},
		LabelSelector: map[string]string{
			"io.kubernetes.pod.name": pod, "io.kubernetes.pod.namespace": s.Name,
		},
	}})
	if err != nil {
		return vm{}, err
	}
	if len(list.Items) != 1 {
		return vm{}, fmt.Errorf("%d ready sandboxes", len(list.Items))
	}
	v := vm{Sandbox: list.Items[0].Id}
	processes := s.Processes(s.t)
	for _, p := range processes {
		if p.Is("containerd-shim-hyper-v2") && strings.Contains(p.Command, v.Sandbox) {
			v.Shim = p.PID
		}
	}
	for _, p := range processes {
		if p.Is("qemu-system-x86_64") && p.Parent == v.Shim {
			v.VMM = p.PID
		}
	}
	if v.Shim == 0 || v.VMM == 0 {
		return v, fmt.Errorf("sandbox %s has shim %d and VMM %d", v.Sandbox, v.Shim, v.VMM)
	}
	return v, nil
}

// kill sends SIGKILL.
func kill(t *testing.T, pid int) {
	t.Helper()
	if pid <= 1 {
		t.Fatalf("no such process: %d", pid)
	}
	if err := unix.Kill(pid, unix.SIGKILL); err != nil {
		t.Fatalf("kill %d: %v", pid, err)
	}
}

// gone waits for the end of a process.
func (s *scene) gone(what string, pid int) {
	s.t.Helper()
	s.Until(fmt.Sprintf("%s (%d) has ended", what, pid), soon, func() bool {
		b, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
		return err != nil || strings.Contains(string(b), ") Z ")
	})
}

// status asks the node's daemon for the node's state.
func (s *scene) status() (status.Node, error) {
	ctx, cancel := context.WithTimeout(s.t.Context(), 5*time.Second)
	defer cancel()
	return status.NewClient(s.layout.StatusSocket()).Status(ctx)
}

// component returns the state of a component.
func (s *scene) component(name string) (supervisor.Status, error) {
	st, err := s.status()
	if err != nil {
		return supervisor.Status{}, err
	}
	for _, c := range st.Components {
		if c.Name == name {
			return c, nil
		}
	}
	return supervisor.Status{}, fmt.Errorf("no component %q", name)
}

// h8s runs an h8s command against the node and returns what it printed and its exit
// code.
func (s *scene) h8s(args ...string) (string, int) {
	s.t.Helper()
	ctx, cancel := context.WithTimeout(s.t.Context(), 4*time.Minute)
	defer cancel()
	cmd := exec.CommandContext(ctx, filepath.Join(s.Out, "bin", "h8s"), append(args, "--name", s.Node)...)
	cmd.Env = append(os.Environ(), "H8S_OUT="+s.Out)
	cmd.WaitDelay = 5 * time.Second
	out, err := cmd.CombinedOutput()
	if err != nil && cmd.ProcessState == nil {
		s.t.Fatal(err)
	}
	return string(out), cmd.ProcessState.ExitCode()
}
