package command

import (
	"context"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"time"

	"github.com/containerd/errdefs"
	"github.com/containerd/log"
	"github.com/go-logr/logr"
	"github.com/spf13/cobra"
	"k8s.io/apimachinery/pkg/runtime"
	clientgoscheme "k8s.io/client-go/kubernetes/scheme"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/clientcmd"
	"k8s.io/klog/v2"
	"sigs.k8s.io/controller-runtime/pkg/client"
	crlog "sigs.k8s.io/controller-runtime/pkg/log"

	v1alpha1 "github.com/hypernetes/hypernetes/api/hypernetes/v1alpha1"
	"github.com/hypernetes/hypernetes/volume/driver"
	"github.com/hypernetes/hypernetes/volume/endpoint"
	"github.com/hypernetes/hypernetes/volume/record"
)

// Main is the command h8s-csi: it runs until ctx ends and returns the exit code, 2 for
// wrong flags.
func Main(ctx context.Context, args []string, version string, stdout, stderr io.Writer) int {
	// Our own log says what fails and what follows; client-go's says it a second time.
	klog.SetLogger(logr.Discard())
	crlog.SetLogger(logr.Discard())
	root := newRoot(version, Backends())
	root.SetArgs(args)
	root.SetOut(stdout)
	root.SetErr(stderr)
	err := root.ExecuteContext(ctx)
	switch {
	case err == nil:
		return 0
	case errdefs.IsInvalidArgument(err):
		fmt.Fprintln(stderr, "error:", err)
		return 2
	}
	log.G(ctx).WithError(err).Error("h8s-csi")
	return 1
}

func newRoot(version string, backends []*Backend) *cobra.Command {
	root := &cobra.Command{
		Use:   "h8s-csi",
		Short: "Persistent volumes for Pods in virtual machines",
		Long: `h8s-csi is the volume plugin (CSI 1.13) of Hypernetes. "h8s-csi controller" runs once in
a cluster for each driver, beside Kubernetes' provisioner, attacher, resizer and
snapshotter. "h8s-csi node" runs once on each node and serves all drivers there.

Drivers: ` + strings.Join(names(backends), ", ") + ".",
		Version: version, SilenceErrors: true, SilenceUsage: true,
		CompletionOptions: cobra.CompletionOptions{DisableDefaultCmd: true},
		RunE:              func(c *cobra.Command, _ []string) error { return c.Help() },
	}
	root.SetVersionTemplate("h8s-csi {{.Version}}\n")
	root.SetFlagErrorFunc(func(_ *cobra.Command, err error) error { return fmt.Errorf("%w: %w", err, errdefs.ErrInvalidArgument) })
	root.AddCommand(newController(version, backends), newNode(version, backends))
	for _, c := range append(root.Commands(), root) {
		c.Args = noArgs
	}
	return root
}

func noArgs(c *cobra.Command, args []string) error {
	if len(args) == 0 {
		return nil
	}
	return fmt.Errorf("%q is no command or flag: see %s --help: %w", args[0], c.CommandPath(), errdefs.ErrInvalidArgument)
}

func names(backends []*Backend) []string {
	var out []string
	for _, b := range backends {
		out = append(out, b.Driver)
	}
	return out
}

// controllerOptions are the flags of h8s-csi controller.
type controllerOptions struct {
	driver, endpoint, kubeconfig, health string
	fsTypes                              []string
	leaderElect                          bool
}

func newController(version string, backends []*Backend) *cobra.Command {
	var o controllerOptions
	c := &cobra.Command{
		Use: "controller", Short: "Serve one driver's controller services",
		Long: `Serve one driver's controller services at a socket, for the provisioner, attacher,
resizer and snapshotter of that driver. Of several replicas one serves, the leader;
what is beside the others waits for their sockets.`,
		Example: "  h8s-csi controller --driver=" + DriverLocal + " --endpoint=unix:///run/h8s-csi/local.sock --kubeconfig=/etc/h8s-csi.conf",
		RunE: func(cmd *cobra.Command, _ []string) error {
			i := slices.IndexFunc(backends, func(b *Backend) bool { return b.Driver == o.driver })
			if i < 0 {
				return wrong("driver", o.driver, "use one of "+strings.Join(names(backends), ", "))
			}
			if _, err := endpoint.Parse(o.endpoint); err != nil {
				return fmt.Errorf("--endpoint: %w", err)
			}
			return runController(cmd.Context(), o, backends[i], version)
		},
	}
	f := c.Flags()
	f.StringVar(&o.driver, "driver", "", "the CSI driver: "+strings.Join(names(backends), " or "))
	f.StringVar(&o.endpoint, "endpoint", "", "the socket, unix:///PATH")
	f.StringVar(&o.kubeconfig, "kubeconfig", "", "how to reach the API server")
	f.StringVar(&o.health, "health-address", "127.0.0.1:9648", "where /healthz, /readyz and /metrics are served; none if empty")
	f.StringSliceVar(&o.fsTypes, "fs-types", driver.DefaultFSTypes, "file systems that guests mount, the default first")
	f.BoolVar(&o.leaderElect, "leader-elect", true, "serve only while no other replica does (Lease in "+v1alpha1.SystemNamespace+")")
	for _, b := range backends {
		if b.ControllerFlags != nil {
			b.ControllerFlags(f)
		}
	}
	return c
}

// nodeOptions are the flags of h8s-csi node.
type nodeOptions struct {
	node, kubeconfig, kubeletRoot, stateDir, runDir, health string
	drivers, fsTypes                                        []string
	maxVolumes                                              int64
	collect                                                 time.Duration
}

func newNode(version string, backends []*Backend) *cobra.Command {
	var o nodeOptions
	c := &cobra.Command{
		Use: "node", Short: "Serve all drivers' node services and register them with the kubelet",
		Long: `Serve all drivers' node services at sockets in the kubelet's directory and register them
with the kubelet. No volume is mounted here: records say what a Pod's VM shall have.`,
		Example: "  h8s-csi node --node=node-1 --kubeconfig=/etc/h8s-csi.conf",
		RunE: func(cmd *cobra.Command, _ []string) error {
			chosen, err := o.check(backends)
			if err != nil {
				return err
			}
			return runNode(cmd.Context(), o, chosen, version)
		},
	}
	f := c.Flags()
	f.StringVar(&o.node, "node", "", "name of this node")
	f.StringVar(&o.kubeconfig, "kubeconfig", "", "how to reach the API server")
	f.StringVar(&o.kubeletRoot, "kubelet-root", "/var/lib/kubelet", "the kubelet's --root-dir")
	f.StringVar(&o.stateDir, "state-dir", "/var/lib/h8s-volumes", "what outlives a reboot: this node's key, local volumes")
	f.StringVar(&o.runDir, "run-dir", record.Root, "records for the shim, in memory")
	f.StringSliceVar(&o.drivers, "drivers", names(backends), "the CSI drivers to serve")
	f.StringSliceVar(&o.fsTypes, "fs-types", driver.DefaultFSTypes, "file systems that guests mount, the default first")
	f.Int64Var(&o.maxVolumes, "max-volumes", 256, "volumes of a driver that the scheduler puts on this node")
	f.DurationVar(&o.collect, "collect-interval", 5*time.Minute, "how often what crashes left behind is looked for")
	f.StringVar(&o.health, "health-address", "127.0.0.1:9647", "where /healthz, /readyz and /metrics are served; none if empty")
	for _, b := range backends {
		if b.NodeFlags != nil {
			b.NodeFlags(f)
		}
	}
	return c
}

// nodeName is what Kubernetes calls nodes (RFC 1123 subdomains).
var nodeName = regexp.MustCompile(`^[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*$`)

func wrong(flag, value, remedy string) error {
	return fmt.Errorf("--%s %.200q: %s: %w", flag, value, remedy, errdefs.ErrInvalidArgument)
}

// check looks at the flags and picks the drivers.
func (o nodeOptions) check(backends []*Backend) ([]*Backend, error) {
	if !nodeName.MatchString(o.node) || len(o.node) > driver.MaxNodeName {
		return nil, wrong("node", o.node, fmt.Sprintf("name this node as Kubernetes does, in %d bytes at most", driver.MaxNodeName))
	}
	for _, d := range []struct{ flag, path string }{{"kubelet-root", o.kubeletRoot}, {"state-dir", o.stateDir}, {"run-dir", o.runDir}} {
		if !filepath.IsAbs(d.path) || filepath.Clean(d.path) != d.path || d.path == "/" {
			return nil, wrong(d.flag, d.path, "give an absolute and clean path")
		}
	}
	// The kernel's list of mounts knows real paths only.
	if real, err := filepath.EvalSymlinks(o.kubeletRoot); err == nil && real != o.kubeletRoot {
		return nil, wrong("kubelet-root", o.kubeletRoot, "it is a symbolic link: give "+real+" here and as the kubelet's --root-dir")
	}
	if o.maxVolumes < 0 {
		return nil, wrong("max-volumes", fmt.Sprint(o.maxVolumes), "must not be negative")
	}
	if o.collect < time.Second {
		return nil, wrong("collect-interval", o.collect.String(), "must be 1s at least")
	}
	if len(o.drivers) == 0 {
		return nil, wrong("drivers", "", "name one at least of "+strings.Join(names(backends), ", "))
	}
	var chosen []*Backend
	for _, name := range o.drivers {
		i := slices.IndexFunc(backends, func(b *Backend) bool { return b.Driver == name })
		if i < 0 {
			return nil, wrong("drivers", name, "use "+strings.Join(names(backends), ", "))
		}
		if !slices.Contains(chosen, backends[i]) {
			chosen = append(chosen, backends[i])
		}
	}
	return chosen, nil
}

// connect reaches the API server.
func connect(kubeconfig string) (*rest.Config, client.WithWatch, error) {
	if kubeconfig == "" {
		return nil, nil, wrong("kubeconfig", "", "name the file that says how to reach the API server")
	}
	if _, err := os.Stat(kubeconfig); err != nil {
		return nil, nil, wrong("kubeconfig", kubeconfig, err.Error())
	}
	cfg, err := clientcmd.BuildConfigFromFlags("", kubeconfig)
	if err != nil {
		return nil, nil, wrong("kubeconfig", kubeconfig, err.Error())
	}
	cfg.QPS, cfg.Burst, cfg.UserAgent = 50, 100, "h8s-csi"
	scheme := runtime.NewScheme()
	for _, add := range []func(*runtime.Scheme) error{clientgoscheme.AddToScheme, v1alpha1.AddToScheme} {
		if err := add(scheme); err != nil {
			return nil, nil, err
		}
	}
	c, err := client.NewWithWatch(cfg, client.Options{Scheme: scheme})
	return cfg, c, err
}
