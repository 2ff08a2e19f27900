// Package hyperstart is PID 1 of a Pod's VM: it boots the guest, opens the channel to
// the shim and serves it until the VM is shut down.
//
// It owns the order in which its packages come up. It must not know the host.
package hyperstart

import (
	"context"
	"errors"
	"fmt"
	"os"
	"runtime/debug"
	"strconv"
	"time"

	"golang.org/x/sys/unix"

	"github.com/containerd/log"

	api "github.com/hypernetes/hypernetes/api/hyperstart/v1"
	"github.com/hypernetes/hypernetes/guest/channel"
	"github.com/hypernetes/hypernetes/guest/hyperstart/block"
	"github.com/hypernetes/hypernetes/guest/hyperstart/boot"
	"github.com/hypernetes/hypernetes/guest/hyperstart/cgroup"
	"github.com/hypernetes/hypernetes/guest/hyperstart/container"
	"github.com/hypernetes/hypernetes/guest/hyperstart/crun"
	"github.com/hypernetes/hypernetes/guest/hyperstart/events"
	"github.com/hypernetes/hypernetes/guest/hyperstart/port"
	"github.com/hypernetes/hypernetes/guest/hyperstart/reaper"
	"github.com/hypernetes/hypernetes/guest/hyperstart/sandbox"
	"github.com/hypernetes/hypernetes/guest/hyperstart/server"
	"github.com/hypernetes/hypernetes/guest/hyperstart/stdio"
	"github.com/hypernetes/hypernetes/guest/hyperstart/storage"
	"github.com/hypernetes/hypernetes/guest/hyperstart/volume"
)

const (
	// Dir is everything of hyperstart's in the guest.
	Dir        = "/run/h8s"
	cgroupRoot = "/sys/fs/cgroup"
	// memoryGoal keeps the agent's heap small; it is no hard limit.
	memoryGoal = 24 << 20
	// protocolMinor is this guest's minor version of hyperstart.v1.
	protocolMinor = 1
)

// Main is PID 1. It returns only when the guest cannot go on; the caller exits, which
// panics the kernel and so ends the VM.
func Main(version string) error {
	started := boot.Uptime()
	debug.SetMemoryLimit(memoryGoal)
	ctx := context.Background()
	r := reaper.New()
	go r.Run(ctx) // lives as long as PID 1
	if err := bring(); err != nil {
		return err
	}
	ready := make(chan struct{})
	go func() { // ends by itself; Ready is its result
		defer close(ready)
		if err := boot.Modules(boot.ModuleOrder); err != nil {
			log.L.WithError(err).Warn("not every kernel module is loaded")
		}
	}()
	srv, hello, err := assemble(ctx, r, ready, version)
	if err != nil {
		return err
	}
	opener, err := open(ctx)
	if err != nil {
		return err
	}
	hello.InitStartedMs = started
	hello.ChannelOpenMs = boot.Uptime()
	return serve(ctx, srv, opener)
}

func bring() error {
	if err := boot.Root(); err != nil {
		return err
	}
	if err := boot.Mounts(); err != nil {
		return err
	}
	boot.Console()
	if err := boot.Cgroups(cgroupRoot); err != nil {
		return err
	}
	if err := boot.Limits(); err != nil {
		return err
	}
	for _, d := range []string{"containers", "volumes", "pins", "l", "x", "crun"} {
		if err := os.MkdirAll(Dir+"/"+d, 0o711); err != nil {
			return fmt.Errorf("make directory: %w", err)
		}
	}
	// Shared, so that mount propagation between a Pod's containers can work.
	vols := Dir + "/volumes"
	if err := unix.Mount(vols, vols, "", unix.MS_BIND, ""); err != nil {
		return fmt.Errorf("bind volumes: %w", err)
	}
	if err := unix.Mount("", vols, "", unix.MS_SHARED, ""); err != nil {
		return fmt.Errorf("share volumes: %w", err)
	}
	return nil
}

func assemble(ctx context.Context, r *reaper.Reaper, ready <-chan struct{}, version string) (*server.Server, *api.HelloResponse, error) {
	sb := sandbox.New(Dir, r)
	streams, log := stdio.NewRegistry(), events.New()
	volumes := volume.New(Dir+"/volumes", sb.Scratch, block.Host{Find: storage.Find, Run: r.Command})
	watcher, err := cgroup.NewWatcher()
	if err != nil {
		return nil, nil, err
	}
	go watcher.Run(ctx) // lives as long as PID 1
	features := kernelFeatures()
	containers := container.New(container.Config{
		Dir: Dir + "/containers", Cgroups: cgroupRoot, CgroupParent: "/pod", Own: Dir + "/",
		Runtime: &crun.Runtime{Path: "/usr/bin/crun", Root: Dir + "/crun", Scratch: Dir + "/x", Reaper: r},
		Sandbox: sb, Volumes: volumes, Layers: storage.NewLayers(Dir + "/l"),
		Streams: streams, Events: log, OOM: watcher,
		Seccomp: features["seccomp"], Swap: features["swap"],
	})
	hello := helloResponse(version, features)
	srv, err := server.New(server.Config{
		Sandbox: sb, Containers: containers, Volumes: volumes, Streams: streams, Events: log,
		Hello: hello, Ready: ready, PowerOff: powerOff,
	})
	return srv, hello, err
}

// kernelFeatures looks at what is optional in a kernel.
func kernelFeatures() map[string]bool {
	has := func(p string) bool { _, err := os.Stat(p); return err == nil }
	return map[string]bool{
		"seccomp": has("/proc/sys/kernel/seccomp/actions_avail"),
		"swap":    has(cgroupRoot + "/pod/memory.swap.max"),
		// The kernel's half; the scratch disk's template is the other.
		"project-quota": has("/proc/sys/fs/quota"),
		"xfs":           block.Has("xfs"),
	}
}

func helloResponse(version string, features map[string]bool) *api.HelloResponse {
	out := &api.HelloResponse{ProtocolMinor: protocolMinor, AgentVersion: version}
	var uts unix.Utsname
	if unix.Uname(&uts) == nil {
		out.KernelRelease = unix.ByteSliceToString(uts.Release[:])
	}
	for _, f := range []string{"seccomp", "swap", "project-quota", "xfs"} {
		if features[f] {
			out.Features = append(out.Features, f)
		}
	}
	out.Features = append(out.Features, "shared-pid-namespace", "reattach-streams", "block-volumes")
	return out
}

func open(ctx context.Context) (port.Opener, error) {
	cmdline, err := os.ReadFile("/proc/cmdline")
	if err != nil {
		return nil, fmt.Errorf("read kernel command line: %w", err)
	}
	if v, ok := boot.Cmdline(string(cmdline), "h8s.vsock"); ok {
		n, err := strconv.ParseUint(v, 10, 32)
		if err != nil {
			return nil, fmt.Errorf("kernel command line: h8s.vsock=%q is no port: %w", v, err)
		}
		return port.Vsock(n), nil
	}
	return port.Serial(ctx, channel.PortName)
}

// serve serves one connection after the other: the host's end of the channel may
// close and come back.
func serve(ctx context.Context, srv *server.Server, opener port.Opener) error {
	for {
		conn, err := opener.Open(ctx)
		if err != nil {
			return err
		}
		if err := srv.Serve(ctx, conn); err != nil {
			log.L.WithError(err).Warn("channel ended")
		}
		if err := conn.Close(); err != nil && !errors.Is(err, os.ErrClosed) {
			log.L.WithError(err).Warn("channel did not close cleanly")
		}
	}
}

// answerTime is left to the answer of Shutdown to leave the VM.
const answerTime = 50 * time.Millisecond

func powerOff() {
	unix.Sync()
	// The answer is in the channel's queue; there is no event for its having been read.
	<-time.After(answerTime)
	_ = unix.Unmount(Dir+"/scratch", unix.MNT_DETACH)
	if err := boot.PowerOff(); err != nil {
		log.L.WithError(err).Error("power off failed")
		os.Exit(1) // panics the kernel
	}
}
