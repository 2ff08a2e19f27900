package cluster

import (
	"context"
	"errors"
	"fmt"
	"os"
	"strings"
	"time"

	"github.com/containerd/log"
	"golang.org/x/sync/errgroup"

	"github.com/hypernetes/hypernetes/cluster/apiclient"
	"github.com/hypernetes/hypernetes/cluster/component"
	"github.com/hypernetes/hypernetes/cluster/kubeconfig"
	"github.com/hypernetes/hypernetes/cluster/manifest"
	"github.com/hypernetes/hypernetes/cluster/node"
	"github.com/hypernetes/hypernetes/cluster/preload"
	"github.com/hypernetes/hypernetes/cluster/settings"
	"github.com/hypernetes/hypernetes/cluster/status"
	"github.com/hypernetes/hypernetes/cluster/supervisor"
	"github.com/hypernetes/hypernetes/cluster/token"
)

// startComponents starts all components and, beside them, what needs only some:
// image import once containerd serves, bootstrap objects once the API server does.
func (d *Daemon) startComponents(ctx context.Context, components []component.Component, report func(status.Event)) error {
	in := d.input
	// What components beside others wait for: the bootstrap objects, or to have joined.
	gate := make(chan struct{})
	sup, err := newSupervisor(d.node, in, components, gate)
	if err != nil {
		return err
	}
	sup.OnReady = func(name string, took time.Duration, adopted bool) {
		e := status.Event{Kind: status.Step, Name: name, Seconds: took.Seconds()}
		if adopted {
			e.Message = "was running"
		}
		report(e)
	}
	d.mu.Lock()
	d.sup = sup
	d.mu.Unlock()

	report(status.Event{Kind: status.Begin, Name: "components"})
	imported := make(chan error, 1)
	archives, err := preload.List(in.Artifacts.ImagesDir())
	if err != nil {
		log.G(ctx).WithError(err).Warn("image archives")
		report(status.Event{Kind: status.Warn, Name: "images", Message: err.Error()})
	}
	go func() { imported <- d.importImages(ctx, archives, report) }()
	// Whichever of the two fails first ends the other's waiting, and is what is told.
	both, bothCtx := errgroup.WithContext(ctx)
	both.Go(func() error { return sup.Start(bothCtx) })
	both.Go(func() error {
		switch {
		case in.Settings.RuntimeOnly:
			return nil
		case in.Settings.IsAgent():
			return d.enlist(bothCtx, gate, report)
		}
		return d.bootstrap(bothCtx, archives, gate, report)
	})
	err = both.Wait()
	// Images are not waited for: they come in while the first Pods are scheduled.
	go func() {
		if err := <-imported; err != nil {
			log.G(ctx).WithError(err).Warn("images")
		}
	}()
	return err
}

// newSupervisor prepares a supervisor of components inside the node n; gate is closed
// when there is what they wait for beside each other.
func newSupervisor(n *node.Node, in component.Input, components []component.Component, gate <-chan struct{}) (*supervisor.Supervisor, error) {
	check := probes(in, n.Dial)
	check["slirp4netns"] = func(context.Context) error {
		if !n.HasLink(settings.EgressLink) {
			return errors.New("no link " + settings.EgressLink + " yet")
		}
		return nil
	}
	for _, c := range components {
		if check[c.Name] == nil {
			// The CSI sidecars serve nobody: they are ready when they run.
			check[c.Name] = func(context.Context) error { return nil }
		}
	}
	specs := make([]supervisor.Spec, 0, len(components))
	for _, c := range components {
		spec := supervisor.Spec{
			Name: c.Name, Path: c.Path, Args: c.Args, Env: c.Env, After: c.After,
			Ready: check[c.Name], StopTimeout: time.Duration(c.StopSeconds) * time.Second, Inputs: c.Files,
		}
		if c.AfterObjects || c.AfterJoin {
			spec.Gate = gate
		}
		if c.OnHost {
			spec.Launcher = node.OnHost{Node: n}
		}
		specs = append(specs, spec)
	}
	return supervisor.New(n, supervisor.Files{Log: in.Node.Log, Record: in.Node.Record}, specs)
}

// bootstrap applies the cluster's first objects, closes applied, and waits for the node to
// be Ready.
func (d *Daemon) bootstrap(ctx context.Context, archives []preload.Archive, applied chan<- struct{}, report func(status.Event)) error {
	in := d.input
	if err := d.sup.WaitReady(ctx, "kube-apiserver"); err != nil {
		return err
	}
	began := time.Now()
	api, err := d.api()
	if err != nil {
		return err
	}
	defer api.Close()
	ca, err := os.ReadFile(in.Node.PKI("ca.crt"))
	if err != nil {
		return err
	}
	overhead, err := manifest.LoadOverhead(in.Artifacts.Share("overhead.json"))
	if err != nil {
		return err
	}
	forward := ""
	if in.Settings.HostNetwork {
		forward = "/etc/resolv.conf"
	} else if in.Settings.Egress {
		forward = settings.EgressResolver
	}
	objects, err := manifest.Render(manifest.Values{
		Forward: forward, Server: in.Settings.APIServer(), BootstrapGroup: token.Group,
		NodeIP: in.Settings.NodeIP, MetricsPort: component.MetricsPort, DNSServiceIP: settings.DNSServiceIP,
		ClusterDomain: settings.ClusterDomain, CA: ca, CoreDNSImage: preload.Find(archives, "h8s.local/coredns:"), Overhead: overhead,
		OpenStack: in.Settings.OpenStack != nil,
	})
	if err != nil {
		return err
	}
	if err := manifest.Apply(ctx, api, objects); err != nil {
		return fmt.Errorf("bootstrap objects: %w", err)
	}
	close(applied)
	report(status.Event{Kind: status.Step, Name: "objects", Seconds: time.Since(began).Seconds()})
	if err := d.sup.WaitReady(ctx, "kubelet"); err != nil {
		return err
	}
	if err := d.awaitNode(ctx, api, report); err != nil {
		return err
	}
	// The kubelet may not say this of itself.
	return manifest.Apply(ctx, api, []manifest.Object{manifest.ControlPlane(in.Node.Name)})
}

func (d *Daemon) awaitNode(ctx context.Context, api *apiclient.Client, report func(status.Event)) error {
	began, name := time.Now(), d.input.Node.Name
	message, err := waitNodeReady(ctx, api, name, d.kubeletStarted())
	if err != nil {
		return fmt.Errorf("node %s does not become Ready: %w", name, err)
	}
	report(status.Event{Kind: status.Step, Name: "node ready", Seconds: time.Since(began).Seconds(), Message: message})
	return nil
}

// kubeletStarted is when this daemon started the kubelet, to the second as the API
// tells times, or zero if it adopted a running one.
func (d *Daemon) kubeletStarted() time.Time {
	for _, c := range d.sup.Status() {
		if c.Name == "kubelet" && !c.Adopted {
			return c.Since.Add(-time.Duration(c.ReadySeconds * float64(time.Second))).Truncate(time.Second)
		}
	}
	return time.Time{}
}

// api is a client of the node's API server, dialling from the node: as administrator, or
// as the node itself where the server is another's.
func (d *Daemon) api() (*apiclient.Client, error) {
	in := d.input
	e, err := credentials(in, "admin")
	if in.Settings.IsAgent() {
		var pair []byte
		pair, err = kubeletClient(in.Node)
		ca, caErr := os.ReadFile(in.Node.PKI("ca.crt"))
		e, err = kubeconfig.Entry{CA: ca, Cert: pair, Key: pair}, errors.Join(err, caErr)
	}
	if err != nil {
		return nil, err
	}
	return apiclient.New(apiclient.Config{Server: in.Settings.APIServer(), CA: e.CA, Cert: e.Cert, Key: e.Key, Dial: d.node.Dial})
}

// kubeNode is the part of a Node object h8s reads.
type kubeNode struct {
	Status struct {
		Conditions []struct {
			Type, Status, Message string
			LastHeartbeatTime     time.Time
		}
		Capacity map[string]string
		NodeInfo struct{ KubeletVersion string }
	}
}

// waitNodeReady waits for the node's Ready condition to be true as of since or later,
// because the API server remembers it from before a stop, and returns a short
// description of the node.
func waitNodeReady(ctx context.Context, api *apiclient.Client, name string, since time.Time) (string, error) {
	tick := time.NewTicker(100 * time.Millisecond)
	defer tick.Stop()
	var last error
	for {
		var n kubeNode
		err := api.Get(ctx, "/api/v1/nodes/"+name, &n)
		if err != nil {
			last = err
		}
		for _, c := range n.Status.Conditions {
			if c.Type != "Ready" || c.LastHeartbeatTime.Before(since) {
				continue
			}
			if c.Status == "True" {
				return fmt.Sprintf("%s, %s CPU, %s memory", n.Status.NodeInfo.KubeletVersion, n.Status.Capacity["cpu"], n.Status.Capacity["memory"]), nil
			}
			last = errors.New(c.Message)
		}
		select {
		case <-ctx.Done():
			return "", errors.Join(ctx.Err(), last)
		case <-tick.C:
		}
	}
}

func (d *Daemon) importImages(ctx context.Context, archives []preload.Archive, report func(status.Event)) error {
	if len(archives) == 0 {
		return nil
	}
	if err := d.sup.WaitReady(ctx, "containerd"); err != nil {
		return err
	}
	conn, err := dialCRI(d.input.Node)
	if err != nil {
		return err
	}
	defer conn.Close()
	// Beyond the start: the context of a start ends when the node is ready.
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), readyTimeout)
	defer cancel()
	began := time.Now()
	n, err := preload.Import(ctx, images{d.input.Artifacts, d.input.Node, conn}, archives, d.input.Node.StatePath("images.json"))
	e := status.Event{Kind: status.Step, Name: "images", Seconds: time.Since(began).Seconds(), Message: fmt.Sprintf("%d imported, %d present", n, len(archives)-n)}
	if err != nil {
		first, rest, more := strings.Cut(err.Error(), "\n")
		if e.Kind, e.Message = status.Warn, first; more {
			e.Message = fmt.Sprintf("%s (and %d more, see h8s logs)", first, strings.Count(rest, "\n")+1)
		}
	}
	report(e)
	return err
}
