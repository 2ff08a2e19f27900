package vmmtest

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"path"
	"strconv"
	"strings"
	"sync"
	"time"

	stats "github.com/containerd/cgroups/v3/cgroup2/stats"
	"github.com/containerd/errdefs"
	"github.com/containerd/errdefs/pkg/errgrpc"
	"github.com/containerd/ttrpc"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/emptypb"
	"google.golang.org/protobuf/types/known/timestamppb"

	hyperstart "github.com/hypernetes/hypernetes/api/hyperstart/v1"
	"github.com/hypernetes/hypernetes/guest/channel"
)

var empty = &emptypb.Empty{}

// Agent is a make-believe hyperstart. Its exported fields are read and set under Lock.
type Agent struct {
	sync.Mutex
	// Configured is the last Configure request, Created the Create requests by id.
	Configured *hyperstart.ConfigureRequest
	Created    map[string]*hyperstart.CreateRequest
	// Files is what volumes hold, by volume and path.
	Files map[string]map[string][]byte
	// FailCreate is answered to Create, Hang stops answering Ping.
	FailCreate error
	Hang       bool
	// Features is what Hello says, Usage what VolumeStats says of disks by serial, and
	// Grown what GrowVolume was told.
	Features []string
	Usage    map[string]*hyperstart.VolumeStatsResponse
	Grown    map[string]uint64
	// ExitTime, if set, is what the guest claims for exits.
	ExitTime time.Time
	// Mutiny, if set, is called before every method ("Signal"): an error is the answer.
	Mutiny func(ctx context.Context, method string) error

	powerOff func()
	procs    map[[2]string]*proc
	streams  map[[3]string]net.Conn
	events   []*hyperstart.Event
	changed  chan struct{}
	stopped  chan struct{}
	once     sync.Once
	nextPID  uint32
}

type proc struct {
	args []string
	kill chan uint32
	done chan struct{}
	code uint32
	ran  bool
}

func newAgent() *Agent {
	return &Agent{
		Features: []string{"block-volumes"}, Usage: map[string]*hyperstart.VolumeStatsResponse{}, Grown: map[string]uint64{},
		Created: map[string]*hyperstart.CreateRequest{}, Files: map[string]map[string][]byte{},
		procs: map[[2]string]*proc{}, streams: map[[3]string]net.Conn{}, changed: make(chan struct{}), stopped: make(chan struct{}),
	}
}

func (a *Agent) stop() { a.once.Do(func() { close(a.stopped) }) }

// oneListener hands streams to the rpc server.
type oneListener struct {
	net.Conn
	conns chan net.Conn
	done  <-chan struct{}
}

func (l *oneListener) Accept() (net.Conn, error) {
	select {
	case c := <-l.conns:
		return c, nil
	case <-l.done:
		return nil, io.EOF
	}
}
func (l *oneListener) Close() error   { return nil }
func (l *oneListener) Addr() net.Addr { return &net.UnixAddr{} }

func (a *Agent) serve(conn net.Conn) {
	g, err := channel.NewGuest(conn)
	if err != nil {
		return
	}
	defer g.Close()
	rpc, err := ttrpc.NewServer(ttrpc.WithUnaryServerInterceptor(func(ctx context.Context, u ttrpc.Unmarshaler, info *ttrpc.UnaryServerInfo, m ttrpc.Method) (any, error) {
		a.Lock()
		mutiny := a.Mutiny
		a.Unlock()
		if mutiny != nil {
			if err := mutiny(ctx, path.Base(info.FullMethod)); err != nil {
				return nil, errgrpc.ToGRPC(err)
			}
		}
		out, err := m(ctx, u)
		return out, errgrpc.ToGRPC(err)
	}))
	if err != nil {
		return
	}
	hyperstart.RegisterSandboxService(rpc, sandboxService{a})
	hyperstart.RegisterContainersService(rpc, containersService{a})
	l := &oneListener{conns: make(chan net.Conn), done: a.stopped}
	go func() { _ = rpc.Serve(context.Background(), l) }()
	defer rpc.Close()
	for {
		s, err := g.Accept()
		if err != nil {
			return
		}
		h, err := channel.ReadHeader(s)
		if err != nil {
			continue
		}
		switch k := h.Kind.(type) {
		case *hyperstart.StreamHeader_Rpc:
			if channel.Reply(s, nil) == nil {
				l.conns <- s
			}
		case *hyperstart.StreamHeader_Stdio:
			a.Lock()
			a.streams[[3]string{k.Stdio.ContainerId, k.Stdio.ExecId, strconv.Itoa(int(k.Stdio.Fd))}] = s
			a.Unlock()
			_ = channel.Reply(s, nil)
		default:
			_ = channel.Reply(s, errdefs.ErrNotImplemented)
		}
	}
}

// Emit adds an event to the guest's log, with its number and time.
func (a *Agent) Emit(e *hyperstart.Event) {
	a.Lock()
	defer a.Unlock()
	e.Seq = uint64(len(a.events) + 1)
	e.At = timestamppb.Now()
	if !a.ExitTime.IsZero() {
		e.At = timestamppb.New(a.ExitTime)
	}
	a.events = append(a.events, e)
	close(a.changed)
	a.changed = make(chan struct{})
}

type sandboxService struct{ *Agent }

func (s sandboxService) Hello(context.Context, *hyperstart.HelloRequest) (*hyperstart.HelloResponse, error) {
	return &hyperstart.HelloResponse{ProtocolMinor: 1, AgentVersion: "make-believe", Features: s.Features}, nil
}

func (s sandboxService) Configure(_ context.Context, r *hyperstart.ConfigureRequest) (*emptypb.Empty, error) {
	s.Lock()
	defer s.Unlock()
	s.Configured = r
	return empty, nil
}

func (s sandboxService) put(volume string, t *hyperstart.FileTree) {
	if s.Files[volume] == nil {
		s.Files[volume] = map[string][]byte{}
	}
	for _, f := range t.GetFiles() {
		s.Files[volume][f.Path] = f.Data
	}
}

func (s sandboxService) PutFiles(_ context.Context, r *hyperstart.PutFilesRequest) (*emptypb.Empty, error) {
	s.Lock()
	defer s.Unlock()
	s.put(r.Volume, r.Tree)
	return empty, nil
}

func (s sandboxService) ReadFile(_ context.Context, r *hyperstart.ReadFileRequest) (*hyperstart.ReadFileResponse, error) {
	s.Lock()
	defer s.Unlock()
	b, ok := s.Files[r.Volume][r.Path]
	if !ok {
		return nil, errdefs.ErrNotFound
	}
	return &hyperstart.ReadFileResponse{Data: b, Size: uint64(len(b))}, nil
}

func (s sandboxService) Ping(ctx context.Context, _ *emptypb.Empty) (*emptypb.Empty, error) {
	s.Lock()
	hang := s.Hang
	s.Unlock()
	if hang {
		<-ctx.Done()
	}
	return empty, nil
}

func (s sandboxService) Stats(context.Context, *hyperstart.SandboxStatsRequest) (*hyperstart.SandboxStatsResponse, error) {
	return &hyperstart.SandboxStatsResponse{}, nil
}

func (s sandboxService) Events(ctx context.Context, r *hyperstart.EventsRequest, out hyperstart.Sandbox_EventsServer) error {
	for after := r.After; ; {
		s.Lock()
		batch, changed := s.events[min(after, uint64(len(s.events))):], s.changed
		s.Unlock()
		for _, e := range batch {
			if err := out.Send(e); err != nil {
				return err
			}
			after = e.Seq
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

func (s sandboxService) VolumeStats(_ context.Context, r *hyperstart.VolumeStatsRequest) (*hyperstart.VolumeStatsResponse, error) {
	s.Lock()
	defer s.Unlock()
	if u := s.Usage[r.Serial]; u != nil {
		return u, nil
	}
	return nil, fmt.Errorf("disk %s: %w", r.Serial, errdefs.ErrNotFound)
}

func (s sandboxService) GrowVolume(_ context.Context, r *hyperstart.GrowVolumeRequest) (*hyperstart.GrowVolumeResponse, error) {
	s.Lock()
	defer s.Unlock()
	s.Grown[r.Serial] = r.SizeBytes
	return &hyperstart.GrowVolumeResponse{DeviceBytes: r.SizeBytes}, nil
}

func (s sandboxService) Shutdown(context.Context, *hyperstart.ShutdownRequest) (*emptypb.Empty, error) {
	s.Lock()
	for _, p := range s.procs {
		p.signal(9)
	}
	s.Unlock()
	go func() {
		<-time.After(5 * time.Millisecond)
		s.powerOff()
	}()
	return empty, nil
}

type containersService struct{ *Agent }

func (s containersService) Create(_ context.Context, r *hyperstart.CreateRequest) (*hyperstart.CreateResponse, error) {
	s.Lock()
	defer s.Unlock()
	if s.FailCreate != nil {
		return nil, s.FailCreate
	}
	var spec specs.Spec
	if err := json.Unmarshal(r.Spec, &spec); err != nil {
		return nil, err
	}
	for _, v := range r.Volumes {
		sandboxService(s).put(v.Name, v.GetFiles())
	}
	s.Created[r.ContainerId] = r
	s.procs[[2]string{r.ContainerId}] = newProc(spec.Process.Args)
	s.nextPID++
	return &hyperstart.CreateResponse{Pid: s.nextPID}, nil
}

func newProc(args []string) *proc {
	return &proc{args: args, kill: make(chan uint32, 16), done: make(chan struct{})}
}

func (p *proc) signal(n uint32) {
	select {
	case p.kill <- n:
	default:
	}
}

func (s containersService) find(container, exec string) (*proc, error) {
	s.Lock()
	defer s.Unlock()
	if p := s.procs[[2]string{container, exec}]; p != nil {
		return p, nil
	}
	return nil, fmt.Errorf("process %q of %s: %w", exec, container, errdefs.ErrNotFound)
}

func (s containersService) Start(_ context.Context, r *hyperstart.ProcessRequest) (*hyperstart.StartResponse, error) {
	p, err := s.find(r.ContainerId, r.ExecId)
	if err != nil {
		return nil, err
	}
	if p.args[0] == "nosuch" {
		return nil, fmt.Errorf("executable file nosuch not found: %w", errdefs.ErrNotFound)
	}
	p.ran = true
	go s.run(r.ContainerId, r.ExecId, p)
	return &hyperstart.StartResponse{Pid: 1}, nil
}

// run is a make-believe process.
func (s containersService) run(container, exec string, p *proc) {
	stream := func(fd int) net.Conn {
		s.Lock()
		defer s.Unlock()
		return s.streams[[3]string{container, exec, strconv.Itoa(fd)}]
	}
	in, out, errw := stream(0), stream(1), stream(2)
	switch p.args[0] {
	case "exit":
		n, _ := strconv.ParseUint(p.args[1], 10, 8)
		p.code = uint32(n)
	case "echo":
		_, _ = out.Write([]byte(strings.Join(p.args[1:], " ") + "\n"))
	case "cat":
		_, _ = io.Copy(out, in)
	case "message":
		s.Lock()
		for v := range s.Files {
			if _, ok := s.Files[v][""]; ok {
				s.Files[v][""] = []byte(p.args[1])
			}
		}
		s.Unlock()
	default:
		for n := range p.kill {
			if n == 9 || p.args[0] == "term" && n == 15 {
				p.code = 128 + n
				break
			}
		}
	}
	for _, c := range []net.Conn{out, errw} {
		if c != nil {
			_ = c.Close()
		}
	}
	close(p.done)
	s.Emit(&hyperstart.Event{What: &hyperstart.Event_Exit{Exit: &hyperstart.Exit{ContainerId: container, ExecId: exec, Pid: 1, Status: p.code}}})
}

func (s containersService) Exec(_ context.Context, r *hyperstart.ExecRequest) (*emptypb.Empty, error) {
	var p specs.Process
	if err := json.Unmarshal(r.Process, &p); err != nil {
		return nil, fmt.Errorf("process: %w: %w", err, errdefs.ErrInvalidArgument)
	}
	s.Lock()
	defer s.Unlock()
	s.procs[[2]string{r.ContainerId, r.ExecId}] = newProc(p.Args)
	return empty, nil
}

func (s containersService) Signal(_ context.Context, r *hyperstart.SignalRequest) (*emptypb.Empty, error) {
	p, err := s.find(r.ContainerId, r.ExecId)
	if err != nil {
		return nil, err
	}
	if !p.ran && r.Signal == 9 {
		p.ran = true
		go s.run(r.ContainerId, r.ExecId, p)
	}
	p.signal(r.Signal)
	return empty, nil
}

func (s containersService) Resize(context.Context, *hyperstart.ResizeRequest) (*emptypb.Empty, error) {
	return empty, nil
}

func (s containersService) CloseStdin(context.Context, *hyperstart.ProcessRequest) (*emptypb.Empty, error) {
	return empty, nil
}

func (s containersService) Delete(_ context.Context, r *hyperstart.ProcessRequest) (*hyperstart.DeleteResponse, error) {
	p, err := s.find(r.ContainerId, r.ExecId)
	if err != nil {
		return nil, err
	}
	s.Lock()
	defer s.Unlock()
	delete(s.procs, [2]string{r.ContainerId, r.ExecId})
	return &hyperstart.DeleteResponse{ExitStatus: p.code}, nil
}

func (s containersService) Pids(context.Context, *hyperstart.ContainerRequest) (*hyperstart.PidsResponse, error) {
	return &hyperstart.PidsResponse{}, nil
}

func (s containersService) Stats(context.Context, *hyperstart.ContainerRequest) (*hyperstart.StatsResponse, error) {
	b, err := proto.Marshal(&stats.Metrics{Pids: &stats.PidsStat{Current: 7}})
	return &hyperstart.StatsResponse{Cgroup2Metrics: b}, err
}

func (s containersService) Update(context.Context, *hyperstart.UpdateRequest) (*emptypb.Empty, error) {
	return empty, nil
}

func (s containersService) Pause(context.Context, *hyperstart.ContainerRequest) (*emptypb.Empty, error) {
	return empty, nil
}

func (s containersService) Resume(context.Context, *hyperstart.ContainerRequest) (*emptypb.Empty, error) {
	return empty, nil
}
