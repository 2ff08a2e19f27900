// Package drivertest serves a CSI driver over any backend as a test needs it: the services
// as they are, real placeholders and records, and in place of the kubelet and the shim as
// much as CSI's own suite cannot do without. It runs that suite, csi-sanity, unmodified.
package drivertest

import (
	"context"
	"net"
	"os"
	"path/filepath"
	"testing"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"github.com/containerd/errdefs/pkg/errgrpc"
	"github.com/containerd/log"
	"github.com/containerd/ttrpc"
	"github.com/go-logr/logr"
	"github.com/kubernetes-csi/csi-test/v5/pkg/sanity"
	"github.com/onsi/ginkgo/v2"
	"github.com/onsi/gomega"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc"
	"k8s.io/klog/v2"

	volumev1 "github.com/hypernetes/hypernetes/api/volume/v1"
	"github.com/hypernetes/hypernetes/volume/backend"
	"github.com/hypernetes/hypernetes/volume/driver"
	"github.com/hypernetes/hypernetes/volume/machine"
	"github.com/hypernetes/hypernetes/volume/placeholder"
	"github.com/hypernetes/hypernetes/volume/record"
	"github.com/hypernetes/hypernetes/volume/sealed"
)

// Subject is a driver under test.
type Subject struct {
	// Name of the test.
	Name string
	// Driver is the CSI driver's name, Node the node's; "test.hypernetes.io" and "node-1"
	// if empty.
	Driver, Node string
	Volumes      backend.Volumes
	// Topology of the node.
	Topology map[string]string
	// Roots of attached files.
	Roots []string
	// Parameters of volumes, Mutable ones, and what the size of one is; 1 GiB if 0.
	Parameters, Mutable map[string]string
	Bytes               int64
	// Owners, if Pods may not have every volume.
	Owners driver.Owners
}

// PodUID is that of the Pod that publishes, if a request does not name one.
const PodUID = "5a1b0c1e-0000-4000-8000-000000000001"

// Fixture is a driver that is served.
type Fixture struct {
	// Address of the driver's socket.
	Address string
	// Dir is for targets.
	Dir    string
	Node   *driver.Node
	Store  record.Store
	Places placeholder.Places
	// Shim is the fake VM's.
	Shim *Shim
}

// NeedRoot skips a test that cannot mount.
func NeedRoot(t testing.TB) {
	t.Helper()
	if os.Getuid() != 0 {
		t.Skip("placeholders are mounted by root only")
	}
}

// Serve serves a driver until the test ends; then nothing of it is left.
func Serve(t testing.TB, s Subject) *Fixture {
	t.Helper()
	if s.Driver == "" {
		s.Driver = "test.hypernetes.io"
	}
	if s.Node == "" {
		s.Node = "node-1"
	}
	// Sockets' paths are short.
	dir, err := os.MkdirTemp("", "csi")
	if err != nil {
		t.Fatal(err)
	}
	f := &Fixture{Dir: dir, Address: filepath.Join(dir, "csi.sock"), Store: record.Store{Root: filepath.Join(dir, "run")}, Places: placeholder.Places{Dir: filepath.Join(dir, "loops")}, Shim: &Shim{}}
	key, err := sealed.Generate()
	if err != nil {
		t.Fatal(err)
	}
	f.Node = &driver.Node{
		Driver: s.Driver, Name: s.Node, Key: key, Store: f.Store, Places: f.Places, Machines: machine.Machines{Addresses: f.Store},
		Roots: s.Roots, Owners: s.Owners, Topology: s.Topology, MaxVolumes: 16, Locks: &driver.Locks{},
	}
	f.Node.Files, _ = s.Volumes.(backend.Files)
	if l, ok := s.Volumes.(backend.Limited); ok {
		l.Tell(f.Node.Limit)
	}
	controller := &driver.Controller{Driver: s.Driver, Volumes: s.Volumes, MultiNode: f.Node.Files == nil, Nodes: nodes{f.Node}}
	for k := range s.Topology {
		controller.TopologyKeys = append(controller.TopologyKeys, k)
	}
	shim := filepath.Join(dir, "shim.sock")
	f.Shim.serve(t, shim)
	server := grpc.NewServer(grpc.ChainUnaryInterceptor(driver.Interceptor(s.Driver, nil), f.kubelet("unix://"+shim)))
	csi.RegisterIdentityServer(server, &driver.Identity{Name: s.Driver, Version: "test", Controller: true, Topology: s.Topology != nil})
	csi.RegisterControllerServer(server, controller)
	csi.RegisterNodeServer(server, f.Node)
	l, err := net.Listen("unix", f.Address)
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		_ = server.Serve(l)
	}()
	t.Cleanup(func() {
		server.Stop()
		<-done
		f.clean(t)
	})
	return f
}

// clean removes the placeholders that a failed test left.
func (f *Fixture) clean(t testing.TB) {
	list, err := f.Places.List()
	if err != nil {
		t.Error(err)
	}
	for _, h := range list {
		if rel, err := filepath.Rel(f.Dir, h.Target); err == nil && filepath.IsLocal(rel) {
			t.Errorf("placeholder left at %s", h.Target)
			_ = unix.Unmount(h.Target, unix.MNT_DETACH)
			_ = f.Places.Remove(h.Key, h.Target)
		} else if h.Target == "" {
			t.Errorf("loop device left of volume %s", h.Key)
			_ = f.Places.Collect(h.Key)
		}
	}
	if err := os.RemoveAll(f.Dir); err != nil {
		t.Error(err)
	}
}

// kubelet says for which Pod a volume is published, and the Pod's VM is there at once:
// the suite knows neither.
func (f *Fixture) kubelet(shim string) grpc.UnaryServerInterceptor {
	return func(ctx context.Context, req any, _ *grpc.UnaryServerInfo, handler grpc.UnaryHandler) (any, error) {
		r, ok := req.(*csi.NodePublishVolumeRequest)
		if !ok {
			return handler(ctx, req)
		}
		if r.VolumeContext == nil {
			r.VolumeContext = map[string]string{}
		}
		for k, v := range map[string]string{"csi.storage.k8s.io/pod.uid": PodUID, "csi.storage.k8s.io/pod.namespace": "default", "csi.storage.k8s.io/pod.name": "pod"} {
			if _, ok := r.VolumeContext[k]; !ok {
				r.VolumeContext[k] = v
			}
		}
		resp, err := handler(ctx, req)
		if err == nil {
			err = f.Store.SetShim(r.VolumeContext["csi.storage.k8s.io/pod.uid"], shim)
		}
		return resp, err
	}
}

// nodes knows the one node there is.
type nodes struct{ node *driver.Node }

// NodeID implements driver.Nodes.
func (n nodes) NodeID(_ context.Context, _, name string) (string, error) {
	if name != n.node.Name {
		return "", nil
	}
	return driver.NodeID(name, n.node.Key.Public()), nil
}

// Shim is the VM of every Pod.
type Shim struct {
	// Answer replaces the answer to Stats, Err is the error of each call.
	Answer *volumev1.StatsResponse
	Err    error
	// Grown is how large volumes became, Throttled which are told to look at their limits.
	Grown     map[string]uint64
	Throttled map[string]int
}

var _ volumev1.VolumesService = (*Shim)(nil)

// Stats implements the shim's service.
func (s *Shim) Stats(context.Context, *volumev1.StatsRequest) (*volumev1.StatsResponse, error) {
	if s.Err != nil || s.Answer != nil {
		return s.Answer, errgrpc.ToGRPC(s.Err)
	}
	return &volumev1.StatsResponse{DeviceBytes: 1 << 30, TotalBytes: 1 << 29, UsedBytes: 1 << 20, AvailableBytes: 1 << 28, TotalInodes: 100, UsedInodes: 11, AvailableInodes: 89}, nil
}

// Grow implements the shim's service.
func (s *Shim) Grow(_ context.Context, r *volumev1.GrowRequest) (*volumev1.GrowResponse, error) {
	if s.Err != nil {
		return nil, errgrpc.ToGRPC(s.Err)
	}
	if s.Grown == nil {
		s.Grown = map[string]uint64{}
	}
	s.Grown[r.GetKey()] = r.GetSizeBytes()
	return &volumev1.GrowResponse{DeviceBytes: r.GetSizeBytes()}, nil
}

// Throttle implements the shim's service.
func (s *Shim) Throttle(_ context.Context, r *volumev1.ThrottleRequest) (*volumev1.ThrottleResponse, error) {
	if s.Err != nil {
		return nil, errgrpc.ToGRPC(s.Err)
	}
	if s.Throttled == nil {
		s.Throttled = map[string]int{}
	}
	s.Throttled[r.GetKey()]++
	return &volumev1.ThrottleResponse{}, nil
}

func (s *Shim) serve(t testing.TB, path string) {
	l, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	server, err := ttrpc.NewServer()
	if err != nil {
		t.Fatal(err)
	}
	volumev1.RegisterVolumesService(server, s)
	done := make(chan struct{})
	go func() {
		defer close(done)
		_ = server.Serve(context.Background(), l)
	}()
	t.Cleanup(func() {
		_ = server.Close()
		<-done
	})
}

// Sanity runs csi-sanity over each subject, with file systems and with raw devices. A test
// binary can do so once.
func Sanity(t *testing.T, subjects ...Subject) {
	NeedRoot(t)
	for _, s := range subjects {
		f := Serve(t, s)
		bytes := s.Bytes
		if bytes == 0 {
			bytes = driver.DefaultBytes
		}
		for _, access := range []string{"mount", "block"} {
			config := sanity.NewTestConfig()
			config.Address = "unix://" + f.Address
			config.TargetPath, config.StagingPath = filepath.Join(f.Dir, access), filepath.Join(f.Dir, access+"-staging")
			config.TestVolumeSize, config.TestVolumeExpandSize = bytes, 2*bytes
			config.TestVolumeParameters, config.TestVolumeMutableParameters = s.Parameters, s.Mutable
			config.TestVolumeAccessType = access
			ginkgo.Describe(s.Name+", "+access, func() { sanity.GinkgoTest(&config) })
		}
	}
	gomega.RegisterFailHandler(ginkgo.Fail)
	suite, reporter := ginkgo.GinkgoConfiguration()
	reporter.Succinct, reporter.NoColor = !testing.Verbose(), true
	if !testing.Verbose() {
		// Half of the suite are calls that shall fail.
		klog.SetLogger(logr.Discard())
		if err := log.SetLevel("error"); err != nil {
			t.Fatal(err)
		}
	}
	ginkgo.RunSpecs(t, "csi-sanity", suite, reporter)
}
