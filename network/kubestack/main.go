package kubestack

import (
	"context"
	"errors"
	"fmt"
	"io"
	"path/filepath"

	"github.com/containerd/log"
	"github.com/go-logr/logr"
	"github.com/spf13/pflag"
	"k8s.io/apimachinery/pkg/runtime"
	clientgoscheme "k8s.io/client-go/kubernetes/scheme"
	"k8s.io/client-go/tools/clientcmd"
	"k8s.io/klog/v2"
	"sigs.k8s.io/controller-runtime/pkg/client"
	crlog "sigs.k8s.io/controller-runtime/pkg/log"

	v1alpha1 "github.com/hypernetes/hypernetes/api/hypernetes/v1alpha1"
	"github.com/hypernetes/hypernetes/network/edge"
	"github.com/hypernetes/hypernetes/network/netns"
	"github.com/hypernetes/hypernetes/network/probe"
)

// Main is the command kubestack: it runs until the context ends and returns the exit code.
func Main(ctx context.Context, args []string, version string, stdout, stderr io.Writer) int {
	opts, err := Parse(args)
	switch {
	case errors.Is(err, pflag.ErrHelp):
		return 0
	case err != nil:
		fmt.Fprintln(stderr, "error:", err)
		return 2
	case opts.Version:
		fmt.Fprintln(stdout, "kubestack", version)
		return 0
	}
	// Our own log says what fails and what follows; client-go's says it a second time.
	klog.SetLogger(logr.Discard())
	crlog.SetLogger(logr.Discard())
	if err := Run(ctx, opts); err != nil {
		log.G(ctx).WithError(err).Error("kubestack")
		return 1
	}
	return 0
}

// Run is the daemon with the kernel's parts.
func Run(ctx context.Context, opts Options) error {
	api, err := connect(opts.Kubeconfig)
	if err != nil {
		return err
	}
	ns, err := netns.Current()
	if err != nil {
		return err
	}
	defer ns.Close()
	manager, err := edge.New(edge.Config{Dir: filepath.Join(opts.RunDir, "edges"), Node: opts.NodeIP, VXLANPort: opts.VXLANPort, NS: ns})
	if err != nil {
		return err
	}
	d, err := New(opts, Parts{API: api, Edges: edges{manager}, Plane: plane{}, Routes: hostRoutes{ns}, Prober: probe.Run})
	if err != nil {
		return err
	}
	return d.Run(ctx)
}

func connect(kubeconfig string) (client.WithWatch, error) {
	cfg, err := clientcmd.BuildConfigFromFlags("", kubeconfig)
	if err != nil {
		return nil, fmt.Errorf("--kubeconfig: %w", err)
	}
	cfg.QPS, cfg.Burst, cfg.UserAgent = 100, 200, "kubestack"
	scheme := runtime.NewScheme()
	for _, add := range []func(*runtime.Scheme) error{clientgoscheme.AddToScheme, v1alpha1.AddToScheme} {
		if err := add(scheme); err != nil {
			return nil, err
		}
	}
	return client.NewWithWatch(cfg, client.Options{Scheme: scheme})
}
