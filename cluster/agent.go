package cluster

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"time"

	"github.com/containerd/errdefs"
	"github.com/containerd/log"

	"github.com/hypernetes/hypernetes/atomicfile"
	"github.com/hypernetes/hypernetes/cluster/apiclient"
	"github.com/hypernetes/hypernetes/cluster/component"
	"github.com/hypernetes/hypernetes/cluster/join"
	"github.com/hypernetes/hypernetes/cluster/kubeconfig"
	"github.com/hypernetes/hypernetes/cluster/layout"
	"github.com/hypernetes/hypernetes/cluster/settings"
	"github.com/hypernetes/hypernetes/cluster/status"
	"github.com/hypernetes/hypernetes/cluster/token"
)

// renewEvery is how often certificates are looked at.
const renewEvery = time.Hour

// Joined reports whether an agent has a certificate of its cluster that is still good, so
// that it needs no token to start.
func Joined(l layout.Node) bool {
	pair, err := kubeletClient(l)
	if err != nil {
		return false
	}
	ca, err := os.ReadFile(l.PKI("ca.crt"))
	if err != nil {
		return false
	}
	left, err := join.Left(pair, time.Now())
	return err == nil && left > 0 && join.Issued(pair, ca, join.Request{CN: "system:node:" + l.Name})
}

// kubeletClient reads the kubelet's certificate and key. The kubelet's link to the newest
// is by the path inside the node.
func kubeletClient(l layout.Node) ([]byte, error) {
	path := l.KubeletClient()
	target, err := os.Readlink(path)
	if err != nil {
		return nil, err
	}
	return os.ReadFile(filepath.Join(filepath.Dir(path), filepath.Base(target)))
}

// join makes an agent trust its cluster, and gives the kubelet what it asks for its first
// certificate with. A node that has joined ignores a token.
func (d *Daemon) join(ctx context.Context) (string, error) {
	in := d.input
	if Joined(in.Node) {
		return "has joined " + in.Settings.Server, os.RemoveAll(in.Node.BootstrapKubeconfig())
	}
	if d.token == "" {
		return "", fmt.Errorf("node %s has not joined %s and was given no token, or its certificate has expired: h8s token create on the server prints one: %w", in.Node.Name, in.Settings.Server, errdefs.ErrInvalidArgument)
	}
	t, err := token.Parse(d.token)
	if err != nil {
		return "", err
	}
	ca, err := join.Authority(ctx, in.Settings.Server, t, in.Node.Name, d.node.Dial)
	if err != nil {
		return "", err
	}
	if err := atomicfile.Write(in.Node.PKI("ca.crt"), ca, 0o644); err != nil {
		return "", err
	}
	// Of a cluster joined before nothing must be left that the kubelet would go on with.
	for _, path := range []string{in.Node.InnerKubeconfig("kubelet"), in.Node.StatePath("kubelet", "pki")} {
		if err := os.RemoveAll(path); err != nil {
			return "", err
		}
	}
	return in.Settings.Server, kubeconfig.Write(in.Node.BootstrapKubeconfig(), kubeconfig.Entry{
		Name: in.Node.Name, Server: in.Settings.Server, CA: ca, Token: t.Bearer(),
	})
}

// agentUsers are the components of an agent whose certificates h8s asks for, by the name
// of their files.
func agentUsers(in component.Input) map[string]join.Request {
	out := map[string]join.Request{}
	for _, u := range component.Users(in) {
		if u.Name != "proxy" && u.Name != component.Kubestack && u.Name != component.CSINode {
			continue
		}
		r := join.Request{Name: in.Node.Name + "-" + u.Name, CN: u.CN}
		if u.Group != "" {
			r.Groups = []string{u.Group}
		}
		out[u.Name] = r
	}
	return out
}

func writeAgentKubeconfigs(in component.Input) error {
	for user := range agentUsers(in) {
		if err := writeInner(in, user); err != nil {
			return err
		}
	}
	return nil
}

// enlist waits for the kubelet's certificate, gets those of the other components with it,
// closes joined, and waits for the node to be Ready.
func (d *Daemon) enlist(ctx context.Context, joined chan<- struct{}, report func(status.Event)) error {
	in := d.input
	began := time.Now()
	if err := d.awaitKubelet(ctx); err != nil {
		return err
	}
	if err := os.RemoveAll(in.Node.BootstrapKubeconfig()); err != nil {
		return err
	}
	if err := d.renewAgent(ctx); err != nil {
		return err
	}
	report(status.Event{Kind: status.Step, Name: "joined", Seconds: time.Since(began).Seconds(), Message: in.Settings.Server})
	close(joined)
	if err := d.sup.WaitReady(ctx, "kubelet"); err != nil {
		return err
	}
	api, err := d.api()
	if err != nil {
		return err
	}
	defer api.Close()
	return d.awaitNode(ctx, api, report)
}

func (d *Daemon) awaitKubelet(ctx context.Context) error {
	tick := time.NewTicker(100 * time.Millisecond)
	defer tick.Stop()
	for !Joined(d.input.Node) {
		select {
		case <-tick.C:
		case <-ctx.Done():
			return fmt.Errorf("the kubelet gets no certificate from %s (h8s logs kubelet): %w", d.input.Settings.Server, ctx.Err())
		}
	}
	return nil
}

// renewAgent gets the certificates of the agent's components that are missing or old.
func (d *Daemon) renewAgent(ctx context.Context) error {
	in := d.input
	ca, err := os.ReadFile(in.Node.PKI("ca.crt"))
	if err != nil {
		return err
	}
	var api *apiclient.Client
	var failed error
	for user, request := range agentUsers(in) {
		have, err := os.ReadFile(in.Node.PKI(user + ".crt"))
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
		if _, err := os.Stat(in.Node.PKI(user + ".key")); err == nil && join.Fresh(have, ca, request, time.Now()) {
			continue
		}
		if api == nil {
			if api, err = d.api(); err != nil {
				return err
			}
			defer api.Close()
		}
		cert, key, err := join.Certificate(ctx, api, request)
		if err == nil {
			err = errors.Join(atomicfile.Write(in.Node.PKI(user+".key"), key, 0o600), atomicfile.Write(in.Node.PKI(user+".crt"), cert, 0o644))
		}
		failed = errors.Join(failed, err)
	}
	return failed
}

// renew keeps the certificates good for as long as the daemon runs, until ctx ends.
func (d *Daemon) renew(ctx context.Context) {
	if d.input.Settings.RuntimeOnly {
		return
	}
	tick := time.NewTicker(renewEvery)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
		err := d.renewOnce(ctx)
		if err != nil && ctx.Err() == nil {
			log.G(ctx).WithError(err).Warn("certificates could not be renewed; tried again within the hour")
		}
	}
}

func (d *Daemon) renewOnce(ctx context.Context) error {
	if d.input.Settings.IsAgent() {
		ctx, cancel := context.WithTimeout(ctx, readyTimeout)
		defer cancel()
		return d.renewAgent(ctx)
	}
	wrote, err := ensureCertificates(d.input)
	if len(wrote) > 0 {
		log.G(ctx).WithField("certificates", wrote).Info("renewed")
		return errors.Join(err, writeKubeconfigs(d.input))
	}
	return err
}

// AdminClient is a client of the API server of the node l, a server, as its administrator,
// from this machine. A node attached to another has that one's.
func AdminClient(l layout.Node) (*apiclient.Client, settings.Node, error) {
	s, err := settings.Load(l.StatePath("node.json"))
	if err != nil {
		return nil, s, err
	}
	if s.Of != "" {
		if l, err = layout.NewNode(s.Of); err != nil {
			return nil, s, err
		}
		if s, err = settings.Load(l.StatePath("node.json")); err != nil {
			return nil, s, err
		}
	}
	if s.IsAgent() {
		return nil, s, fmt.Errorf("node %s is an agent of %s: run this on the server: %w", l.Name, s.Server, errdefs.ErrFailedPrecondition)
	}
	if s.RuntimeOnly {
		return nil, s, fmt.Errorf("node %s runs without Kubernetes: %w", l.Name, errdefs.ErrFailedPrecondition)
	}
	e, err := AdminEntry(component.Input{Node: l, Settings: s})
	if err != nil {
		return nil, s, err
	}
	api, err := apiclient.New(apiclient.Config{Server: e.Server, CA: e.CA, Cert: e.Cert, Key: e.Key})
	return api, s, err
}
