package cli

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"syscall"
	"time"

	"github.com/containerd/errdefs"
	"github.com/containerd/log"
	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"github.com/hypernetes/hypernetes/cluster/doctor"
	"github.com/hypernetes/hypernetes/cluster/kubeconfig"
	"github.com/hypernetes/hypernetes/cluster/layout"
	"github.com/hypernetes/hypernetes/cluster/node"
	"github.com/hypernetes/hypernetes/cluster/settings"
	"github.com/hypernetes/hypernetes/cluster/status"
)

// nodeOptions are the flags of commands that start a node.
type nodeOptions struct {
	name            string
	apiPort         int
	publish         []string
	runtimeOnly     bool
	egress          bool
	ignorePreflight bool
	cinderConfig    string
	openStack       settings.OpenStack
	reserved        []string
}

// add adds the flags of a node in namespaces of its own, addCommon those of any node.
func (o *nodeOptions) add(f *pflag.FlagSet) {
	o.addCommon(f)
	f.IntVar(&o.apiPort, "api-port", settings.APIPort, "loopback port of this machine for the API server")
	f.StringArrayVarP(&o.publish, "publish", "p", nil, "publish a hostPort or NodePort on this machine's loopback: PORT or HOSTPORT:NODEPORT; may be repeated")
	f.BoolVar(&o.egress, "egress", false, "connect Pods to the outside world through slirp4netns")
}

func (o *nodeOptions) addCommon(f *pflag.FlagSet) {
	f.StringVarP(&o.name, "name", "n", DefaultNode, "name of the node")
	f.BoolVar(&o.runtimeOnly, "runtime-only", false, "start only the container runtime, for hyperctl; no Kubernetes")
	f.BoolVar(&o.ignorePreflight, "ignore-preflight", false, "start even if h8s doctor finds something missing")
}

// addOpenStack adds the flags of a server that belongs to a cloud.
func (o *nodeOptions) addOpenStack(f *pflag.FlagSet) {
	f.StringVar(&o.openStack.CloudConfig, "openstack-cloud-config", "", "clouds.yaml with the cluster's own credentials at OpenStack, mode 0600; empty for no OpenStack")
	f.StringVar(&o.openStack.Cloud, "openstack-cloud", "", "which cloud of it")
	f.StringVar(&o.openStack.KeystoneCloud, "keystone-cloud", "", "which cloud of it checks users' tokens, if another: a user with the role service in its project")
	f.StringVar(&o.openStack.KeystoneRoles, "keystone-roles", "", "Keystone's roles and what they stand for: member=manager,…; reader, member and manager for themselves if empty")
	f.StringVar(&o.openStack.KeystoneTenants, "keystone-tenants", "", "Keystone projects that tenants are made for: tag=NAME or domain=ID; none if empty")
	f.StringVar(&o.openStack.Networks, "network-provider", settings.Builtin, "who carries Networks that name nobody: builtin, or neutron of the OpenStack cloud")
	f.StringVar(&o.openStack.External, "openstack-external-network", "", "name or ID of the cloud's network that routers lead to and floating IPs are of; the only one if empty")
	f.StringVar(&o.openStack.Profile, "openstack-profile", "full", "full: the cluster's user has the role admin; least: a role in each tenant's project")
	f.StringVar(&o.openStack.Octavia, "octavia-provider", "", "provider that Octavia makes load balancers with, such as amphora or ovn; its default if empty")
	f.StringVar(&o.cinderConfig, "cinder-config", "", "file that says of Cinder's storage what Cinder does not: NFS exports, Ceph's keyrings (docs/storage.md); none if empty")
	f.StringSliceVar(&o.reserved, "reserve-cidr", nil, "network that no tenant may use, such as that of OpenStack's APIs; may be repeated")
}

// mergeOpenStack puts the flags that were given into the settings.
func (o *nodeOptions) mergeOpenStack(s *settings.Node, f *pflag.FlagSet) error {
	var cloud settings.OpenStack
	if s.OpenStack != nil {
		cloud = *s.OpenStack
	}
	changed := false
	for name, field := range map[string]struct{ to, from *string }{
		"openstack-cloud-config": {&cloud.CloudConfig, &o.openStack.CloudConfig},
		"openstack-cloud":        {&cloud.Cloud, &o.openStack.Cloud},
		"keystone-cloud":         {&cloud.KeystoneCloud, &o.openStack.KeystoneCloud},
		"keystone-roles":         {&cloud.KeystoneRoles, &o.openStack.KeystoneRoles},
		"keystone-tenants":       {&cloud.KeystoneTenants, &o.openStack.KeystoneTenants},

		"network-provider":           {&cloud.Networks, &o.openStack.Networks},
		"openstack-external-network": {&cloud.External, &o.openStack.External},
		"openstack-profile":          {&cloud.Profile, &o.openStack.Profile},
		"octavia-provider":           {&cloud.Octavia, &o.openStack.Octavia},
	} {
		if f.Changed(name) {
			*field.to, changed = *field.from, true
		}
	}
	if !changed {
		return nil
	}
	if cloud.CloudConfig == "" && cloud.Cloud == "" {
		if f.Changed("network-provider") && cloud.Networks == settings.Neutron {
			return fmt.Errorf("network-provider %s: needs --openstack-cloud-config and --openstack-cloud: %w", cloud.Networks, errdefs.ErrInvalidArgument)
		}
		s.OpenStack = nil
		return nil
	}
	if cloud.CloudConfig != "" {
		path, err := filepath.Abs(cloud.CloudConfig)
		if err != nil {
			return err
		}
		cloud.CloudConfig = path
	}
	s.OpenStack = &cloud
	if err := s.Validate(); err != nil {
		return err
	}
	// What h8s-controller would end with is said here.
	_, err := doctor.CloudCredentials(cloud)
	return err
}

// settings merges the flags that were given into the settings the node had.
func (o *nodeOptions) settings(l layout.Node, f *pflag.FlagSet) (settings.Node, error) {
	s, err := settings.Load(l.StatePath("node.json"))
	if errdefs.IsNotFound(err) {
		s, err = settings.Node{Name: l.Name, APIPort: settings.APIPort, NodeIP: settings.IsolatedIP}, nil
	}
	if err != nil {
		return s, err
	}
	if f.Changed("api-port") {
		s.APIPort = o.apiPort
	}
	if f.Changed("runtime-only") {
		s.RuntimeOnly = o.runtimeOnly
	}
	if f.Changed("egress") {
		s.Egress = o.egress
	}
	if f.Changed("publish") {
		s.Publish = nil
		for _, text := range o.publish {
			p, err := settings.ParsePublish(text)
			if err != nil {
				return s, err
			}
			s.Publish = append(s.Publish, p)
		}
	}
	if f.Changed("cinder-config") {
		if s.CinderConfig = o.cinderConfig; s.CinderConfig != "" {
			if s.CinderConfig, err = filepath.Abs(s.CinderConfig); err != nil {
				return s, err
			}
		}
	}
	if f.Changed("reserve-cidr") {
		s.Reserved = o.reserved
	}
	if err := o.mergeOpenStack(&s, f); err != nil {
		return s, err
	}
	return s, s.Validate()
}

func newUpCommand() *cobra.Command {
	o := &nodeOptions{}
	var merge bool
	cmd := &cobra.Command{
		Use:   "up",
		Short: "Start a node with its control plane",
		Long: `Starts a node and the Kubernetes control plane in namespaces of their own and returns
when the node is Ready. On a node that is up it does nothing and says so. Settings are
remembered: a later "h8s up" without flags starts the node as it was.`,
		Example: `  h8s up
  h8s up --publish 8001 --merge-kubeconfig
  h8s up --name two --api-port 7443`,
		Args: noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error { return runUp(cmd, o, merge) },
	}
	o.add(cmd.Flags())
	o.addOpenStack(cmd.Flags())
	cmd.Flags().BoolVar(&merge, "merge-kubeconfig", false, "add the cluster to your kubeconfig and select it")
	return cmd
}

func runUp(cmd *cobra.Command, o *nodeOptions, merge bool) error {
	ctx, out := cmd.Context(), cmd.OutOrStdout()
	if err := needRoot(); err != nil {
		return err
	}
	a, l, err := find(o.name)
	if err != nil {
		return err
	}
	want, err := o.settings(l, cmd.Flags())
	if err != nil {
		return err
	}
	if want.HostNetwork {
		starts := "server"
		if want.IsAgent() {
			starts = "agent"
		}
		return becausef("H8S_USAGE", "node %s is on this machine's own network: h8s %s starts it; h8s up --name OTHER makes one in namespaces of its own: %w", l.Name, starts, errdefs.ErrInvalidArgument)
	}
	client := status.NewClient(l.StatusSocket())
	if st, err := client.Status(ctx); err == nil {
		if err := alreadyUp(ctx, cmd, client, st, want, merge); err != nil {
			return err
		}
		return startFurther(cmd, l)
	}
	if want.Of != "" {
		return startOne(cmd, l, want)
	}
	began := time.Now()
	p := newProgress(out)
	defer p.end()
	if err := preflight(ctx, a, l, want, o.ignorePreflight, p); err != nil {
		return err
	}
	last, err := spawn(ctx, l, superviseInput{Node: want}, p.event)
	p.end()
	if err != nil {
		return err
	}
	if last.Kind == status.Fail {
		return because(last.Reason, errors.New(last.Message))
	}
	if err := startFurther(cmd, l); err != nil {
		return err
	}
	return announce(cmd, l, want, time.Since(began), merge)
}

// alreadyUp is `h8s up` on a node that runs or is being started.
func alreadyUp(ctx context.Context, cmd *cobra.Command, client *status.Client, st status.Node, want settings.Node, merge bool) error {
	out := cmd.OutOrStdout()
	for st.Phase == status.Starting {
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(200 * time.Millisecond):
		}
		var err error
		if st, err = client.Status(ctx); err != nil {
			return err
		}
	}
	l, err := layout.NewNode(st.Name)
	if err != nil {
		return err
	}
	if st.Phase == status.Failed || st.Phase == status.Stopping {
		return becausef("H8S_START_FAILED", "node %s is %s: %s", st.Name, st.Phase, st.Error)
	}
	if merge {
		if err := mergeKubeconfig(l, st.Settings); err != nil {
			return err
		}
	}
	fmt.Fprintf(out, "Node %s is up already, nothing to do (%s).\n", st.Name, st.Phase)
	if !sameSettings(st.Settings, want) {
		fmt.Fprintln(out, "It runs with other settings than asked for; to change them, with Pods staying: h8s down --keep-pods, then h8s up with the new flags.")
	}
	return nil
}

func sameSettings(a, b settings.Node) bool {
	x, err1 := json.Marshal(a)
	y, err2 := json.Marshal(b)
	return err1 == nil && err2 == nil && bytes.Equal(x, y)
}

// spawn starts the daemon in a session of its own and follows its start.
func spawn(ctx context.Context, l layout.Node, s superviseInput, report func(status.Event)) (status.Event, error) {
	in, err := json.Marshal(s)
	if err != nil {
		return status.Event{}, err
	}
	exe, err := os.Executable()
	if err != nil {
		return status.Event{}, err
	}
	if err := os.MkdirAll(l.StatePath("log"), 0o755); err != nil {
		return status.Event{}, err
	}
	logFile, err := node.OpenLog(l.Log("h8s"))
	if err != nil {
		return status.Event{}, err
	}
	defer logFile.Close()
	r, w, err := os.Pipe()
	if err != nil {
		return status.Event{}, err
	}
	defer r.Close()
	daemon := exec.Command(exe, "supervise", "--name", l.Name)
	daemon.Stdin, daemon.Stdout, daemon.Stderr = bytes.NewReader(in), logFile, logFile
	daemon.ExtraFiles, daemon.Dir = []*os.File{w}, "/"
	daemon.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	err = daemon.Start()
	_ = w.Close()
	if err != nil {
		return status.Event{}, fmt.Errorf("start the daemon: %w", err)
	}
	stop := context.AfterFunc(ctx, func() { _ = r.SetReadDeadline(time.Now()) })
	defer stop()
	last, err := status.ReadEvents(r, report)
	if ctx.Err() != nil {
		return last, ctx.Err()
	}
	if err != nil {
		return last, becausef("H8S_START_FAILED", "%w; its log is %s", err, l.Log("h8s"))
	}
	if _, err := os.Stat(l.StatusSocket()); last.Kind == status.Fail && errors.Is(err, fs.ErrNotExist) {
		// It told its failure as its last act and is about to end.
		if err := daemon.Wait(); err != nil {
			log.G(ctx).WithError(err).Debug("daemon ended")
		}
	}
	return last, nil
}

func announce(cmd *cobra.Command, l layout.Node, s settings.Node, took time.Duration, merge bool) error {
	out := cmd.OutOrStdout()
	if s.RuntimeOnly {
		fmt.Fprintf(out, "Runtime ready in %.1fs. Next: hyperctl --node %s run -d busybox sleep 1000\n", took.Seconds(), s.Name)
		return nil
	}
	fmt.Fprintf(out, "Ready in %.1fs. ", took.Seconds())
	if merge {
		if err := mergeKubeconfig(l, s); err != nil {
			return err
		}
		fmt.Fprintf(out, "kubectl context is %q. Next: kubectl get nodes\n", s.Name)
		return nil
	}
	fmt.Fprintf(out, "Next: h8s kubectl%s get pods -A\n", nameSuffix(l.Name))
	return nil
}

// mergeKubeconfig adds the node's cluster to the user's kubeconfig.
func mergeKubeconfig(l layout.Node, s settings.Node) error {
	path, err := kubeconfig.UserPath()
	if err != nil {
		return err
	}
	e := kubeconfig.Entry{Name: l.Name, Server: fmt.Sprintf("https://127.0.0.1:%d", s.APIPort)}
	var err1, err2, err3 error
	e.CA, err1 = os.ReadFile(l.PKI("ca.crt"))
	e.Cert, err2 = os.ReadFile(l.PKI("admin.crt"))
	e.Key, err3 = os.ReadFile(l.PKI("admin.key"))
	if err := errors.Join(err1, err2, err3); err != nil {
		return err
	}
	return kubeconfig.Merge(path, e)
}
