package sandbox

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"os"
	"strings"
	"time"

	"github.com/containerd/errdefs"
	"github.com/containerd/log"
	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/types/known/anypb"
	"google.golang.org/protobuf/types/known/timestamppb"

	hyperstart "github.com/hypernetes/hypernetes/api/hyperstart/v1"
	"github.com/hypernetes/hypernetes/guest/channel"
	"github.com/hypernetes/hypernetes/proc"
	"github.com/hypernetes/hypernetes/runtime/agent"
	"github.com/hypernetes/hypernetes/runtime/cgroup"
	"github.com/hypernetes/hypernetes/runtime/nic"
	"github.com/hypernetes/hypernetes/runtime/podspec"
	"github.com/hypernetes/hypernetes/runtime/record"
	"github.com/hypernetes/hypernetes/runtime/vmm"
	"github.com/hypernetes/hypernetes/runtime/volume"
)

// scratchSerial names the writable disk in the guest.
const scratchSerial = "h8s-scratch"

// create takes host resources in order; each is in the record before it is taken. What
// was taken is given back by end.
func (s *Sandbox) create(ctx context.Context, options *anypb.Any, netns string) error {
	var err error
	if s.pod, err = podspec.Parse(options, s.opt.Config); err != nil {
		return err
	}
	if err := fits(s.pod.MemoryBytes); err != nil {
		return err
	}
	s.netns = netns
	self, err := proc.Find(os.Getpid())
	if err != nil {
		return err
	}
	s.record = record.Record{
		ID: s.opt.ID, Namespace: s.opt.Namespace, Bundle: s.opt.Bundle, Socket: s.opt.Socket, Shim: self,
		Pod: s.pod.Namespace + "/" + s.pod.Name, Network: nic.State{NetNS: netns},
	}
	if err := s.enterGroup(); err != nil {
		return err
	}
	if err := s.save(); err != nil {
		return err
	}
	if err := s.findVolumes(); err != nil {
		return err
	}
	uid, release, err := s.opt.Host.User(s.opt.ID)
	if err != nil {
		return err
	}
	s.uid = release
	if s.attach, err = s.opt.Host.Attach(ctx, netns); err != nil {
		return fmt.Errorf("network of the pod: %w", err)
	}
	s.record.Network = s.attach.State()
	if err := s.save(); err != nil {
		return err
	}
	return s.startVM(ctx, uid)
}

// fits refuses a VM with more memory than the machine has: its guest would spend
// gigabytes on describing memory that can never be used.
func fits(memory int64) error {
	var info unix.Sysinfo_t
	if err := unix.Sysinfo(&info); err != nil {
		return fmt.Errorf("memory of the machine: %w", err)
	}
	if total := int64(info.Totalram) * int64(info.Unit); memory > total {
		return fmt.Errorf("memory of the pod's vm is %d MiB, this machine has %d MiB: lower the memory limits of its containers, or set max_memory_mib in hyper.toml: %w",
			memory>>20, total>>20, errdefs.ErrResourceExhausted)
	}
	return nil
}

func (s *Sandbox) save() error { return s.record.Save(s.opt.Config.StateDir) }

func (s *Sandbox) enterGroup() error {
	if s.opt.NoCgroups {
		return nil
	}
	g, err := cgroup.Plan(s.pod.CgroupParent, s.opt.ID)
	if err != nil {
		return err
	}
	s.record.Cgroup = g
	if err := s.save(); err != nil {
		return err
	}
	if err := g.Make(); err != nil {
		return err
	}
	s.group = groupHandle{g}
	if err := g.Enter(os.Getpid()); err != nil {
		return fmt.Errorf("enter the pod's cgroup: %w", err)
	}
	return nil
}

func (s *Sandbox) startVM(ctx context.Context, uid int) error {
	machine, accel, err := s.opt.Host.VMM(ctx)
	if err != nil {
		return err
	}
	s.accel = accel
	cfg := s.opt.Config
	vmc := vmm.Config{
		ID: vmID(s.opt.ID), Kernel: cfg.Kernel, Initrd: cfg.Initrd, Cmdline: cfg.Cmdline,
		Machine: cfg.Machine, Accelerator: accel, VCPUs: s.pod.VCPUs, MaxVCPUs: s.pod.VCPUs,
		MemoryBytes: s.pod.MemoryBytes, UID: uid, GID: uid, Console: s.console,
	}
	if s.record.Cgroup != nil {
		vmc.Cgroups = s.record.Cgroup.Paths
	}
	scratch, err := s.opt.Host.Scratch(ctx)
	if err != nil {
		return fmt.Errorf("scratch disk: %w", err)
	}
	if scratch != nil {
		defer scratch.Close()
		vmc.Disks = append(vmc.Disks, vmm.Disk{Serial: scratchSerial, File: scratch, Discard: true})
	}
	open, err := s.attachVolumes(ctx, &vmc)
	if err != nil {
		return err
	}
	defer open.close()
	for _, l := range s.attach.Links {
		vmc.NICs = append(vmc.NICs, vmm.NIC{Tap: l.Tap, MAC: l.MAC})
	}
	if s.turn, err = s.opt.Host.Turn(ctx, accel); err != nil {
		return fmt.Errorf("start vm: %w", err)
	}
	vm, err := machine.Start(ctx, vmc)
	if err != nil {
		s.turn()
		return fmt.Errorf("start vm: %w", err)
	}
	s.mu.Lock()
	s.vm, s.vmPID = vm, vm.PID()
	s.mu.Unlock()
	s.layers = newLayers(vm)
	if s.storage != nil {
		s.wg.Add(1)
		go s.watchStorage()
	}
	if err := s.attach.Close(); err != nil {
		log.G(s.ctx).WithError(err).Warn("close taps")
	}
	if s.record.VMM, err = proc.Find(vm.PID()); err == nil {
		err = s.save()
	}
	if err != nil {
		s.turn()
		return fmt.Errorf("vmm: %w", err)
	}
	return nil
}

// vmID makes a sandbox id a VM name: [a-z0-9-], at most 64.
func vmID(id string) string {
	b := []byte(strings.ToLower(id))
	for i, c := range b {
		if (c < 'a' || c > 'z') && (c < '0' || c > '9') {
			b[i] = '-'
		}
	}
	return string(b[:min(len(b), 64)])
}

// boot brings the guest up and starts what runs beside it.
func (s *Sandbox) boot() {
	defer s.wg.Done()
	defer s.turn()
	began := time.Now()
	ctx, cancel := context.WithTimeout(s.ctx, s.opt.Config.BootTimeout())
	// Killing the VM at the deadline ends whatever waits for the guest; a VM that dies
	// while booting ends the wait.
	stop := context.AfterFunc(ctx, func() { _ = s.vm.Kill() })
	ended := make(chan struct{})
	defer func() { <-ended }()
	defer cancel()
	go func() {
		defer close(ended)
		select {
		case <-s.vm.Done():
			cancel()
		case <-ctx.Done():
		}
	}()
	err := s.configure(ctx)
	if !stop() && err == nil {
		err = ctx.Err()
	}
	if err != nil {
		err = s.explainBoot(err)
		s.bootErr = err
		close(s.booted)
		_ = s.vm.Kill()
		return
	}
	log.G(s.ctx).WithField("pod", s.record.Pod).WithField("vm", s.vm.PID()).
		WithField("milliseconds", time.Since(began).Milliseconds()).
		WithField("kernel", fmt.Sprintf("%.80q", s.agent.Hello.KernelRelease)).Info("guest is up")
	close(s.booted)
	s.wg.Add(2)
	go s.follow()
	go s.heartbeat()
}

func (s *Sandbox) explainBoot(err error) error {
	select {
	case <-s.vm.Done():
		e := s.vm.Exit()
		return fmt.Errorf("vm ended while booting: %s (%s): %w", e.Reason, e.Detail, err)
	default:
	}
	return fmt.Errorf("boot guest: %w", err)
}

// configure says hello and describes the whole sandbox in one message.
func (s *Sandbox) configure(ctx context.Context) error {
	host, err := channel.NewHost(s.vm.Channel())
	if err != nil {
		return err
	}
	s.host = host
	a, err := agent.Dial(ctx, host, s.opt.Version)
	if err != nil {
		return err
	}
	s.agent = a
	if err := s.checkFeatures(); err != nil {
		return err
	}
	if err := a.Configure(ctx, s.configuration()); err != nil {
		return fmt.Errorf("configure guest: %w", err)
	}
	s.watcher = volume.NewWatcher(s.ctx, a.PutFiles)
	if s.netns == "" || len(s.attach.Interfaces) == 0 {
		return nil
	}
	if s.forward, err = s.opt.Host.Forward(s.ctx, s.netns, a.DialPort); err != nil {
		// A Pod without port-forward is better than none.
		log.G(s.ctx).WithError(err).Warn("port-forward does not work for this pod")
		s.forward = nil
	}
	return nil
}

func (s *Sandbox) configuration() *hyperstart.ConfigureRequest {
	entropy := make([]byte, 256)
	_, _ = rand.Read(entropy) // never fails
	r := &hyperstart.ConfigureRequest{
		SandboxId: s.opt.ID, Hostname: s.pod.Hostname, ResolvConf: s.pod.ResolvConf, Sysctls: s.pod.Sysctls,
		Clock: timestamppb.Now(), Entropy: entropy, SharePidNamespace: s.pod.SharePIDNamespace,
		Interfaces: s.attach.Interfaces, Routes: s.attach.Routes, Neighbors: s.attach.Neighbors,
		Volumes: s.volumes.Volumes(),
	}
	if s.opt.Config.Scratch != "" {
		r.ScratchSerial = scratchSerial
	}
	if r.Hostname == "" {
		// What a container without a name of its own sees under other runtimes.
		r.Hostname, _ = os.Hostname()
	}
	if r.ResolvConf == nil {
		r.ResolvConf = nodeResolvConf()
	}
	var addresses []string
	for _, i := range s.attach.Interfaces {
		addresses = append(addresses, i.Addresses...)
	}
	r.Hosts = podspec.Hosts(r.Hostname, addresses)
	return r
}

// nodeResolvConf is the node's resolver, for sandboxes that say nothing of DNS.
func nodeResolvConf() []byte {
	f, err := os.Open("/etc/resolv.conf")
	if err != nil {
		return nil
	}
	defer f.Close()
	b := make([]byte, 64<<10)
	n, err := f.Read(b)
	if err != nil && !errors.Is(err, os.ErrClosed) {
		return nil
	}
	return b[:n]
}
