package cluster

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"github.com/hypernetes/hypernetes/cluster/cgroup"
	"github.com/hypernetes/hypernetes/cluster/component"
	"github.com/hypernetes/hypernetes/cluster/layout"
	"github.com/hypernetes/hypernetes/cluster/node"
	"github.com/hypernetes/hypernetes/cluster/settings"
	"github.com/hypernetes/hypernetes/cluster/status"
	"github.com/hypernetes/hypernetes/proc"
)

const (
	drainTimeout = 90 * time.Second
	sweepTimeout = 20 * time.Second
)

// Down stops the node once; further calls return the same last event when it is
// stopped. Pods are stopped in order unless they are to be kept, in which case the
// node's namespaces stay too.
func (d *Daemon) Down(ctx context.Context, keepPods bool, report func(status.Event)) status.Event {
	d.down.Do(func() {
		// What a start is about to make must not appear behind the back of the stop.
		d.set(status.Stopping, nil)
		d.askStop()
		<-d.started
		began := time.Now()
		err := d.stop(ctx, keepPods, report)
		d.last = status.Event{Kind: status.Done, Seconds: time.Since(began).Seconds()}
		if err != nil {
			d.last = status.Event{Kind: status.Fail, Message: err.Error(), Reason: "H8S_STOP_FAILED"}
		}
		close(d.ended)
	})
	return d.last
}

func (d *Daemon) stop(ctx context.Context, keepPods bool, report func(status.Event)) error {
	d.mu.Lock()
	sup := d.sup
	d.mu.Unlock()
	var failed error
	step := stepper(report)
	if sup != nil {
		// The kubelet first: it would start again what is being stopped.
		step("kubelet", func() (string, error) { sup.Stop("kubelet"); return "", nil })
		if !keepPods {
			step("pods", func() (string, error) { return drained(ctx, d.input.Node) })
		}
		step("components", func() (string, error) { sup.Stop(); return "", nil })
	}
	if d.gateway != nil {
		d.gateway.Close()
	}
	if keepPods {
		return nil
	}
	step("namespaces", func() (string, error) {
		if err := d.cgroups.Leave(d.input.Node.Cgroup()); err != nil {
			return "", err
		}
		failed = errors.Join(sweep(ctx, d.cgroups, d.input.Node), clearRules(d.input.Settings), clearRun(d.input.Node))
		return "", failed
	})
	return failed
}

func stepper(report func(status.Event)) func(name string, f func() (string, error)) {
	return func(name string, f func() (string, error)) {
		report(status.Event{Kind: status.Begin, Name: name})
		began := time.Now()
		message, err := f()
		e := status.Event{Kind: status.Step, Name: name, Seconds: time.Since(began).Seconds(), Message: message}
		if err != nil {
			e.Kind, e.Message = status.Warn, err.Error()
		}
		report(e)
	}
}

func drained(ctx context.Context, l layout.Node) (string, error) {
	ctx, cancel := context.WithTimeout(ctx, drainTimeout)
	defer cancel()
	n, err := drain(ctx, l)
	return fmt.Sprintf("%d stopped", n), err
}

// Stop stops a node that has no daemon: what runs is found by its records and its
// cgroup.
func Stop(ctx context.Context, a layout.Artifacts, l layout.Node, keepPods bool, report func(status.Event)) error {
	cg, err := cgroup.Open()
	if err != nil {
		return err
	}
	lock, err := lockNode(l)
	if errors.Is(err, fs.ErrNotExist) {
		return sweep(ctx, cg, l) // no run directory: at most an empty cgroup is left
	}
	if err != nil {
		return err
	}
	defer func() {
		if !keepPods {
			_ = os.Remove(l.StatusSocket()) // of the daemon that is gone
			_ = os.Remove(l.RunPath("lock"))
			removeIfEmpty(l.Run, layout.RunRoot)
		}
		_ = lock.Close()
	}()
	step := stepper(report)
	step("kubelet", func() (string, error) { return "", stopRecorded(ctx, l, "kubelet") })
	if !keepPods {
		step("pods", func() (string, error) { return drainHeadless(ctx, a, l, cg) })
	}
	step("components", func() (string, error) {
		s, err := settings.Load(l.StatePath("node.json"))
		if errdefs.IsNotFound(err) {
			s, err = settings.Node{Name: l.Name}, nil
		}
		failed := err
		// Of every role: what was not started has no record.
		s.Role, s.Server, s.RuntimeOnly = "", "", false
		all := component.All(component.Input{Node: l, Settings: s})
		for i := len(all) - 1; i >= 0; i-- {
			failed = errors.Join(failed, stopRecorded(ctx, l, all[i].Name))
		}
		return "", failed
	})
	if keepPods {
		return nil
	}
	var failed error
	step("namespaces", func() (string, error) {
		s, err := settings.Load(l.StatePath("node.json"))
		if errdefs.IsNotFound(err) {
			err = nil
		}
		failed = errors.Join(err, sweep(ctx, cg, l), clearRules(s), clearRun(l))
		return "", failed
	})
	return failed
}

// drainHeadless stops the Pods of a node without a daemon. Where containerd is not
// running either, as after down --keep-pods, it is started for as long as that takes.
func drainHeadless(ctx context.Context, a layout.Artifacts, l layout.Node, cg *cgroup.Host) (string, error) {
	s, err := settings.Load(l.StatePath("node.json"))
	if errdefs.IsNotFound(err) {
		return "none", nil
	}
	if err != nil {
		return "", err
	}
	n, err := node.Open(l, s, cg)
	if errors.Is(err, fs.ErrNotExist) {
		return "none", nil
	}
	if err != nil {
		return "", err
	}
	in := newInput(a, l, s, cg)
	in.Settings.RuntimeOnly, in.Settings.Egress = true, false
	sup, err := newSupervisor(n, in, component.All(in), nil)
	if err != nil {
		return "", err
	}
	defer sup.Stop()
	ctx, cancel := context.WithTimeout(ctx, drainTimeout)
	defer cancel()
	if err := sup.Start(ctx); err != nil {
		return "", err
	}
	return drained(ctx, l)
}

// stopRecorded ends the recorded process of a component, patiently at first.
func stopRecorded(ctx context.Context, l layout.Node, name string) error {
	b, err := os.ReadFile(l.Record(name))
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	var id proc.ID
	if err := json.Unmarshal(b, &id); err != nil {
		return err
	}
	_ = id.Signal(unix.SIGTERM)
	ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	if waitGone(ctx, id) != nil {
		_ = id.Signal(unix.SIGKILL)
	}
	return os.Remove(l.Record(name))
}

func waitGone(ctx context.Context, id proc.ID) error {
	r, w, err := os.Pipe()
	if err != nil {
		return err
	}
	defer r.Close()
	stop := context.AfterFunc(ctx, func() { _ = w.Close() })
	defer func() {
		if stop() {
			_ = w.Close()
		}
	}()
	gone, err := id.Wait(r)
	if err == nil && !gone {
		err = ctx.Err()
	}
	return err
}

// sweep kills what is left in the node's cgroup, the anchor included, and removes it.
func sweep(ctx context.Context, cg *cgroup.Host, l layout.Node) error {
	ctx, cancel := context.WithTimeout(ctx, sweepTimeout)
	defer cancel()
	if err := cg.Kill(ctx, l.Cgroup()); err != nil {
		return err
	}
	if err := cg.Remove(ctx, l.Cgroup()); err != nil {
		return err
	}
	if entries := cg.Children("/h8s"); len(entries) == 0 {
		return cg.Remove(ctx, "/h8s")
	}
	return nil
}

// clearRules removes the rules components left on the machine's own network.
func clearRules(s settings.Node) error {
	if !s.HostNetwork {
		return nil // they ended with the node's network namespace
	}
	return node.RemoveRules("kube-proxy", "cni_hostport", "cni_plugins_masquerade")
}

// clearRun empties the node's run directory but for the lock and the socket, which
// their holder removes.
func clearRun(l layout.Node) error {
	entries, err := os.ReadDir(l.Run)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	var failed error
	for _, e := range entries {
		path := filepath.Join(l.Run, e.Name())
		if path == l.StatusSocket() || e.Name() == "lock" {
			continue
		}
		failed = errors.Join(failed, os.RemoveAll(path))
	}
	return failed
}

func removeIfEmpty(dirs ...string) {
	for _, dir := range dirs {
		_ = unix.Rmdir(dir) // fails if something else is in there, which then stays
	}
}
