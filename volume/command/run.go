package command

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"github.com/containerd/errdefs"
	"github.com/containerd/log"
	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc"

	"github.com/hypernetes/hypernetes/volume/backend"
	"github.com/hypernetes/hypernetes/volume/driver"
	"github.com/hypernetes/hypernetes/volume/endpoint"
	"github.com/hypernetes/hypernetes/volume/machine"
	"github.com/hypernetes/hypernetes/volume/owner"
	"github.com/hypernetes/hypernetes/volume/placeholder"
	"github.com/hypernetes/hypernetes/volume/record"
	"github.com/hypernetes/hypernetes/volume/sealed"
)

// maxRequest bounds a request; the largest one has a few maps of 4 KiB.
const maxRequest = 256 << 10

// newServer is a server whose services speak CSI's errors.
func newServer(name string, m *metrics) *grpc.Server {
	return grpc.NewServer(grpc.MaxRecvMsgSize(maxRequest), grpc.UnaryInterceptor(driver.Interceptor(name, m.observe(name))))
}

// runController serves one driver's controller until ctx ends.
func runController(ctx context.Context, o controllerOptions, b *Backend, version string) error {
	rest, api, err := connect(o.kubeconfig)
	if err != nil {
		return err
	}
	socket, err := endpoint.Parse(o.endpoint)
	if err != nil {
		return err
	}
	parts, err := b.Controller(ctx, ControllerEnv{REST: rest, Client: api})
	if err != nil {
		return fmt.Errorf("driver %s: %w", b.Driver, err)
	}
	service := &driver.Controller{
		Driver: b.Driver, Volumes: parts.Volumes, FSTypes: o.fsTypes, MultiNode: parts.MultiNode, TopologyKeys: parts.TopologyKeys,
	}
	if _, ok := parts.Volumes.(backend.Attachments); ok && parts.PublishedNodes {
		service.Nodes = &nodeIDs{reader: api}
	}
	m := newMetrics()
	var served atomic.Bool
	server := newServer(b.Driver, m)
	csi.RegisterIdentityServer(server, &driver.Identity{Name: b.Driver, Version: version, Controller: true, Topology: len(parts.TopologyKeys) > 0})
	csi.RegisterControllerServer(server, service)

	work := func(ctx context.Context) error {
		group, ctx := errgroup.WithContext(ctx)
		group.Go(func() error {
			return endpoint.Serve(ctx, server, socket, func() {
				served.Store(true)
				log.G(ctx).WithFields(log.Fields{"driver": b.Driver, "socket": socket}).Info("serving")
			})
		})
		if parts.Run != nil {
			group.Go(func() error { return ended(ctx, parts.Run(ctx)) })
		}
		return group.Wait()
	}
	group, ctx := errgroup.WithContext(ctx)
	group.Go(func() error {
		if o.leaderElect {
			return lead(ctx, rest, "h8s-csi-controller-"+b.Driver, work)
		}
		return work(ctx)
	})
	group.Go(func() error {
		return serveHealth(ctx, o.health, m, func() error {
			if !served.Load() {
				return errors.New("not serving: starting, or another replica leads")
			}
			return nil
		})
	})
	return group.Wait()
}

// ended hides the error of what was ended.
func ended(ctx context.Context, err error) error {
	if ctx.Err() != nil && errors.Is(err, context.Canceled) {
		return nil
	}
	return err
}

// runNode serves all drivers' node services until ctx ends.
func runNode(ctx context.Context, o nodeOptions, backends []*Backend, version string) error {
	rest, api, err := connect(o.kubeconfig)
	if err != nil {
		return err
	}
	for _, dir := range []string{o.stateDir, o.runDir} {
		if err := os.MkdirAll(dir, 0o700); err != nil {
			return fmt.Errorf("make %s: %w", dir, err)
		}
	}
	unlock, err := only(o.runDir)
	if err != nil {
		return err
	}
	defer unlock()
	key, err := sealed.Load(filepath.Join(o.stateDir, "node.key"))
	if err != nil {
		return err
	}
	store, places, locks := record.Store{Root: o.runDir}, placeholder.Places{Dir: filepath.Join(o.runDir, "placeholders")}, &driver.Locks{}
	if err := store.Memory(); err != nil {
		return err
	}
	m := newMetrics()
	group, ctx := errgroup.WithContext(ctx)
	collector := &driver.Collector{Store: store, Places: places, Root: o.kubeletRoot, Locks: locks, Interval: o.collect, Observe: m.collected}

	var registrations []*endpoint.Registration
	for _, b := range backends {
		parts, err := b.Node(ctx, NodeEnv{REST: rest, Client: api, Node: o.node, StateDir: o.stateDir, RunDir: o.runDir})
		if err != nil {
			group.Go(func() error { return fmt.Errorf("driver %s: %w", b.Driver, err) })
			break
		}
		service := &driver.Node{
			Driver: b.Driver, Name: o.node, Key: key, Store: store, Places: places, Machines: machine.Machines{Addresses: store},
			Files: parts.Files, Roots: parts.Roots, FSTypes: o.fsTypes, Topology: parts.Topology, MaxVolumes: o.maxVolumes, Locks: locks,
		}
		if parts.Tenants {
			service.Owners = owner.API{Reader: api}
		}
		if l, ok := parts.Files.(backend.Limited); ok {
			l.Tell(service.Limit)
		}
		collector.Nodes = append(collector.Nodes, service)
		socket := filepath.Join(o.kubeletRoot, "plugins", b.Driver, "csi.sock")
		server := newServer(b.Driver, m)
		csi.RegisterIdentityServer(server, &driver.Identity{Name: b.Driver, Version: version, Topology: parts.Topology != nil})
		csi.RegisterNodeServer(server, service)
		registration := endpoint.NewRegistration(b.Driver, socket, m.registered(b.Driver))
		registrations = append(registrations, registration)
		group.Go(func() error {
			served := make(chan struct{})
			announced, stop := errgroup.WithContext(ctx)
			announced.Go(func() error { return endpoint.Serve(stop, server, socket, func() { close(served) }) })
			announced.Go(func() error {
				// The kubelet dials at once what it is told of.
				select {
				case <-served:
				case <-stop.Done():
					return nil
				}
				return endpoint.Serve(stop, registration.Server(), filepath.Join(o.kubeletRoot, "plugins_registry", b.Driver+"-reg.sock"), func() {
					log.G(ctx).WithFields(log.Fields{"driver": b.Driver, "socket": socket}).Info("serving")
				})
			})
			return announced.Wait()
		})
		if parts.Run != nil {
			group.Go(func() error { return ended(ctx, parts.Run(ctx)) })
		}
	}
	group.Go(func() error { return collector.Run(ctx) })
	group.Go(func() error {
		return serveHealth(ctx, o.health, m, func() error { return unregistered(registrations) })
	})
	return group.Wait()
}

func unregistered(registrations []*endpoint.Registration) error {
	var missing []string
	for _, r := range registrations {
		if ok, reason := r.State(); !ok {
			missing = append(missing, r.Driver()+": "+reason)
		}
	}
	if len(missing) > 0 {
		return errors.New("not registered with the kubelet: " + strings.Join(missing, "; "))
	}
	return nil
}

// only makes sure that one process writes the node's records: operations are ordered by
// locks in memory.
func only(dir string) (unlock func(), err error) {
	path := filepath.Join(dir, "plugin.lock")
	f, err := os.OpenFile(path, os.O_CREATE|os.O_RDONLY|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0o600)
	if err != nil {
		return nil, fmt.Errorf("--run-dir: %w", err)
	}
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		_ = f.Close()
		return nil, fmt.Errorf("--run-dir %s: another h8s-csi node runs on it (%s is locked): stop that one: %w: %w", dir, path, err, errdefs.ErrFailedPrecondition)
	}
	return func() { _ = f.Close() }, nil
}
