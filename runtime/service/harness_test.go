package service

import (
	"context"
	"encoding/json"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"sync"
	"testing"
	"time"

	sandboxapi "github.com/containerd/containerd/api/runtime/sandbox/v1"
	taskapi "github.com/containerd/containerd/api/runtime/task/v3"
	"github.com/containerd/containerd/api/types"
	"github.com/containerd/errdefs"
	"github.com/containerd/errdefs/pkg/errgrpc"
	"github.com/containerd/log"
	"github.com/containerd/ttrpc"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"
	runtimev1 "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/hypernetes/hypernetes/runtime/config"
	"github.com/hypernetes/hypernetes/runtime/nic"
	"github.com/hypernetes/hypernetes/runtime/prober"
	"github.com/hypernetes/hypernetes/runtime/sandbox"
	"github.com/hypernetes/hypernetes/runtime/storage"
	"github.com/hypernetes/hypernetes/runtime/vmm"
	"github.com/hypernetes/hypernetes/runtime/vmm/vmmtest"
)

const id = "pod1"

// shim is a shim in this process whose VMs are make-believe.
type shim struct {
	t       *testing.T
	vmm     *vmmtest.VMM
	cfg     config.Config
	socket  string
	prober  string // where the node daemon would be
	sandbox sandboxapi.TTRPCSandboxService
	task    taskapi.TTRPCTaskService
	served  chan error

	mu       sync.Mutex
	events   []proto.Message
	topics   []string
	attached []string
	detached int
	users    int
}

func (s *shim) VMM(context.Context) (vmm.VMM, string, error) { return s.vmm, "tcg", nil }

func (s *shim) Attach(_ context.Context, netns string) (*nic.Attachment, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.attached = append(s.attached, netns)
	return &nic.Attachment{}, nil
}

func (s *shim) Detach(context.Context, nic.State) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.detached++
	return nil
}

func (s *shim) Forward(context.Context, string, nic.Dialer) (io.Closer, error) { return nil, nil }
func (s *shim) Scratch(context.Context) (*os.File, error)                      { return nil, nil }

func (s *shim) User(string) (int, func(), error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.users++
	return 1000, func() {
		s.mu.Lock()
		defer s.mu.Unlock()
		s.users--
	}, nil
}

func (s *shim) Storage(context.Context, storage.Config) (sandbox.Storage, error) {
	return nil, errdefs.ErrNotImplemented
}

func (s *shim) Turn(context.Context, string) (func(), error) { return func() {}, nil }

func (s *shim) Publish(topic string, event proto.Message) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.topics = append(s.topics, topic)
	s.events = append(s.events, event)
}

func start(t *testing.T, v *vmmtest.VMM, change ...func(*config.Config)) *shim {
	t.Helper()
	log.L.Logger.SetOutput(io.Discard)
	cfg := config.Default()
	dir := t.TempDir()
	cfg.Kernel, cfg.Initrd, cfg.StateDir, cfg.KubeletRoot = "/k", "/i", filepath.Join(dir, "state"), filepath.Join(dir, "kubelet")
	cfg.VolumeRoot = filepath.Join(dir, "volumes")
	cfg.BootTimeoutSeconds = 5
	for _, c := range change {
		c(&cfg)
	}
	s := &shim{t: t, vmm: v, cfg: cfg, socket: filepath.Join(dir, "s"), prober: filepath.Join(dir, "p"), served: make(chan error, 1)}
	l, err := net.Listen("unix", s.socket)
	check(t, err)
	sb := sandbox.New(sandbox.Options{
		ID: id, Namespace: "k8s.io", Bundle: dir, Socket: s.socket, Version: "test",
		Config: cfg, Host: s, Publisher: s, NoCgroups: true,
		Prober: prober.Prober{Socket: s.prober},
	})
	go func() { s.served <- New(sb, "test").Serve(context.Background(), l) }()
	s.sandbox, s.task = s.dial()
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
		defer cancel()
		if err := sb.Close(ctx); err != nil {
			t.Errorf("close: %v", err)
		}
	})
	return s
}

func (s *shim) dial() (sandboxapi.TTRPCSandboxService, taskapi.TTRPCTaskService) {
	s.t.Helper()
	conn, err := net.Dial("unix", s.socket)
	check(s.t, err)
	c := ttrpc.NewClient(conn)
	s.t.Cleanup(func() { c.Close() })
	return sandboxapi.NewTTRPCSandboxClient(c), taskapi.NewTTRPCTaskClient(c)
}

// ctx bounds a test's calls.
func (s *shim) ctx() context.Context {
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	s.t.Cleanup(cancel)
	return ctx
}

func podConfig(t *testing.T) *anypb.Any {
	b, err := proto.Marshal(&runtimev1.PodSandboxConfig{
		Metadata: &runtimev1.PodSandboxMetadata{Name: "web", Namespace: "blue", Uid: "uid-1"}, Hostname: "web",
		Linux: &runtimev1.LinuxPodSandboxConfig{SecurityContext: &runtimev1.LinuxSandboxSecurityContext{
			NamespaceOptions: &runtimev1.NamespaceOption{Pid: runtimev1.NamespaceMode_CONTAINER},
		}},
	})
	check(t, err)
	return &anypb.Any{TypeUrl: "runtime.v1.PodSandboxConfig", Value: b}
}

// create and run bring the sandbox up.
func (s *shim) create() error {
	_, err := s.sandbox.CreateSandbox(s.ctx(), &sandboxapi.CreateSandboxRequest{SandboxID: id, Options: podConfig(s.t), NetnsPath: "/run/netns/x"})
	return errgrpc.ToNative(err)
}

func (s *shim) startSandbox() (*sandboxapi.StartSandboxResponse, error) {
	r, err := s.sandbox.StartSandbox(s.ctx(), &sandboxapi.StartSandboxRequest{SandboxID: id})
	return r, errgrpc.ToNative(err)
}

func (s *shim) up() *vmmtest.VM {
	s.t.Helper()
	check(s.t, s.create())
	_, err := s.startSandbox()
	check(s.t, err)
	return s.vmm.VMs()[0]
}

func (s *shim) status() *sandboxapi.SandboxStatusResponse {
	s.t.Helper()
	r, err := s.sandbox.SandboxStatus(s.ctx(), &sandboxapi.SandboxStatusRequest{SandboxID: id, Verbose: true})
	check(s.t, err)
	return r
}

// layer is an EROFS image, made once.
var layer = sync.OnceValues(func() (string, error) {
	dir, err := os.MkdirTemp("", "h8s-layer-")
	if err != nil {
		return "", err
	}
	path := filepath.Join(dir, "layer.erofs")
	if err := os.Mkdir(filepath.Join(dir, "tree"), 0o755); err != nil {
		return "", err
	}
	return path, exec.Command("mkfs.erofs", "--quiet", path, filepath.Join(dir, "tree")).Run()
})

func TestMain(m *testing.M) {
	code := m.Run()
	if p, err := layer(); err == nil {
		_ = os.RemoveAll(filepath.Dir(p))
	}
	os.Exit(code)
}

type option func(*specs.Spec, *taskapi.CreateTaskRequest)

// container creates a container that runs args.
func (s *shim) container(name string, args []string, options ...option) (*taskapi.CreateTaskResponse, error) {
	s.t.Helper()
	path, err := layer()
	if err != nil {
		s.t.Skipf("skipped: mkfs.erofs of the Debian package erofs-utils is needed: %v", err)
	}
	spec := &specs.Spec{
		Process: &specs.Process{Args: args, Cwd: "/"}, Root: &specs.Root{Path: "rootfs"}, Hostname: "web",
		Linux: &specs.Linux{CgroupsPath: "/kubepods/x", Namespaces: []specs.LinuxNamespace{{Type: specs.PIDNamespace}, {Type: specs.NetworkNamespace, Path: "/proc/1/ns/net"}}},
	}
	bundle := s.t.TempDir()
	r := &taskapi.CreateTaskRequest{ID: name, Bundle: bundle, Rootfs: []*types.Mount{
		{Type: "erofs", Source: path, Options: []string{"ro", "loop"}},
		{Type: "format/mkdir/overlay", Source: "overlay", Options: []string{"upperdir=/s/fs", "workdir=/s/work", "lowerdir={{ mount 0 }}"}},
	}}
	for _, o := range options {
		o(spec, r)
	}
	b, err := json.Marshal(spec)
	check(s.t, err)
	check(s.t, os.WriteFile(filepath.Join(bundle, "config.json"), b, 0o600))
	out, err := s.task.Create(s.ctx(), r)
	return out, errgrpc.ToNative(err)
}

// run creates and starts a container.
func (s *shim) run(name string, args []string, options ...option) uint32 {
	s.t.Helper()
	c, err := s.container(name, args, options...)
	check(s.t, err)
	r, err := s.task.Start(s.ctx(), &taskapi.StartRequest{ID: name})
	check(s.t, err)
	if r.Pid != c.Pid {
		s.t.Errorf("pid %d at start, %d at create", r.Pid, c.Pid)
	}
	return r.Pid
}

func (s *shim) wait(name, exec string) uint32 {
	s.t.Helper()
	r, err := s.task.Wait(s.ctx(), &taskapi.WaitRequest{ID: name, ExecID: exec})
	check(s.t, err)
	return r.ExitStatus
}

func (s *shim) kill(name, exec string, signal uint32) error {
	_, err := s.task.Kill(s.ctx(), &taskapi.KillRequest{ID: name, ExecID: exec, Signal: signal})
	return errgrpc.ToNative(err)
}

func (s *shim) remove(name, exec string) error {
	_, err := s.task.Delete(s.ctx(), &taskapi.DeleteRequest{ID: name, ExecID: exec})
	return errgrpc.ToNative(err)
}

func (s *shim) allTopics() []string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return append([]string(nil), s.topics...)
}

func fifo(t *testing.T) string {
	t.Helper()
	p := filepath.Join(t.TempDir(), "fifo")
	check(t, unix.Mkfifo(p, 0o600))
	return p
}

func check(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}
