// Package controller owns the process h8s-controller: its flags, its one manager, which
// reconcilers run in it, who leads, and how it says that it is well. It must not know what
// the reconcilers do.
package controller

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"os/signal"
	"strings"
	"syscall"
	"time"

	"github.com/containerd/errdefs"
	"github.com/go-logr/logr"
	"github.com/spf13/pflag"
	coordinationv1 "k8s.io/api/coordination/v1"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	clientgoscheme "k8s.io/client-go/kubernetes/scheme"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/clientcmd"
	"k8s.io/klog/v2"
	"k8s.io/utils/ptr"
	ctrl "sigs.k8s.io/controller-runtime"
	"sigs.k8s.io/controller-runtime/pkg/cache"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/config"
	"sigs.k8s.io/controller-runtime/pkg/healthz"
	"sigs.k8s.io/controller-runtime/pkg/metrics/server"

	v1alpha1 "github.com/hypernetes/hypernetes/api/hypernetes/v1alpha1"
	"github.com/hypernetes/hypernetes/identity/admission"
	"github.com/hypernetes/hypernetes/identity/binding"
	"github.com/hypernetes/hypernetes/identity/csr"
	"github.com/hypernetes/hypernetes/identity/tenant"
	"github.com/hypernetes/hypernetes/network/claim"
	network "github.com/hypernetes/hypernetes/network/controller"
	"github.com/hypernetes/hypernetes/network/subnet"
)

// lease is the name by which replicas agree who leads.
const lease = "h8s-controller"

// Options of the process.
type Options struct {
	Kubeconfig    string
	ServiceCIDRs  string
	ReservedCIDRs string
	ClusterDomain string
	Webhook       struct{ Address, Cert, Key, CA string }
	HealthAddress string
	LeaderElect   bool
	FabricMTU     int32
	OpenStack     OpenStack
	Networks      Networks

	// PortGrace, Retry and Sweep are those of package network/controller; its defaults if
	// zero. There are no flags for them.
	PortGrace, Retry, Sweep time.Duration
}

// Flags reads the command line.
func Flags(args []string, stderr io.Writer) (Options, error) {
	var o Options
	f := pflag.NewFlagSet("h8s-controller", pflag.ContinueOnError)
	f.SetOutput(stderr)
	f.StringVar(&o.Kubeconfig, "kubeconfig", "", "file that says how to reach the API server")
	f.StringVar(&o.ServiceCIDRs, "service-cidrs", "10.96.0.0/12,fd00:10:96::/108", "ranges of ClusterIPs")
	f.StringVar(&o.ReservedCIDRs, "reserved-cidrs", "", "ranges no tenant's Network may have: nodes, Pods of no tenant, management")
	f.StringVar(&o.ClusterDomain, "cluster-domain", "cluster.local", "ends the names of Services")
	f.StringVar(&o.Webhook.Address, "webhook-address", "127.0.0.1:9643", "where the API server finds the admission webhook; empty for none")
	f.StringVar(&o.Webhook.Cert, "webhook-cert", "", "file with the webhook's certificate")
	f.StringVar(&o.Webhook.Key, "webhook-key", "", "file with its key")
	f.StringVar(&o.Webhook.CA, "webhook-ca", "", "file with the certificate of who signed it")
	f.StringVar(&o.HealthAddress, "health-address", "127.0.0.1:9644", "where /healthz, /readyz and /metrics are")
	f.BoolVar(&o.LeaderElect, "leader-elect", true, "reconcile only while no other replica does")
	o.OpenStack.flags(f)
	o.Networks.flags(f)
	f.Int32Var(&o.FabricMTU, "fabric-mtu", 1500, "MTU of the links between nodes")
	if err := f.Parse(args); err != nil {
		return o, err
	}
	switch {
	case f.NArg() > 0:
		return o, fmt.Errorf("unexpected argument %q: h8s-controller takes flags only: %w", f.Arg(0), errdefs.ErrInvalidArgument)
	case o.Kubeconfig == "":
		return o, fmt.Errorf("--kubeconfig: want a file: %w", errdefs.ErrInvalidArgument)
	case o.FabricMTU < 576+subnet.Overhead || o.FabricMTU > 9216:
		return o, fmt.Errorf("--fabric-mtu: %d: want %d to 9216: %w", o.FabricMTU, 576+subnet.Overhead, errdefs.ErrInvalidArgument)
	}
	for name, address := range map[string]string{"health-address": o.HealthAddress, "webhook-address": o.Webhook.Address} {
		if _, _, err := net.SplitHostPort(address); address != "" && err != nil {
			return o, fmt.Errorf("--%s: %q: want host:port: %w", name, address, errdefs.ErrInvalidArgument)
		}
	}
	if o.Webhook.Address != "" && (o.Webhook.Cert == "" || o.Webhook.Key == "" || o.Webhook.CA == "") {
		return o, fmt.Errorf("--webhook-cert, --webhook-key, --webhook-ca: want files, or --webhook-address= for no webhook: %w", errdefs.ErrInvalidArgument)
	}
	if _, err := o.limits(); err != nil {
		return o, err
	}
	if err := o.Networks.check(o.OpenStack); err != nil {
		return o, err
	}
	return o, o.OpenStack.check()
}

func (o Options) limits() (subnet.Limits, error) {
	services, err := subnet.ParsePrefixes(o.ServiceCIDRs)
	if err != nil || len(services) == 0 {
		return subnet.Limits{}, fmt.Errorf("--service-cidrs: %q: want networks like 10.96.0.0/12,fd00:10:96::/108: %w", o.ServiceCIDRs, errdefs.ErrInvalidArgument)
	}
	reserved, err := subnet.ParsePrefixes(o.ReservedCIDRs)
	if err != nil {
		return subnet.Limits{}, fmt.Errorf("--reserved-cidrs: %w: %w", err, errdefs.ErrInvalidArgument)
	}
	return subnet.Limits{Services: services, Reserved: reserved, FabricMTU: o.FabricMTU, DefaultProvider: o.Networks.Default}, nil
}

// Main is the command.
func Main(args []string, stderr io.Writer) int {
	o, err := Flags(args, stderr)
	if errors.Is(err, pflag.ErrHelp) {
		return 0
	} else if err != nil {
		fmt.Fprintln(stderr, "h8s-controller:", err)
		return 2
	}
	handler := slog.NewTextHandler(stderr, nil)
	ctrl.SetLogger(logr.FromSlogHandler(handler))
	klog.SetSlogLogger(slog.New(handler))
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM, syscall.SIGINT)
	defer stop()
	if err := Run(ctx, o); err != nil && ctx.Err() == nil {
		fmt.Fprintln(stderr, "h8s-controller:", err)
		return 1
	}
	return 0
}

// Run works until ctx ends.
func Run(ctx context.Context, o Options) error {
	cfg, err := clientcmd.BuildConfigFromFlags("", o.Kubeconfig)
	if err != nil {
		return fmt.Errorf("--kubeconfig %s: %w", o.Kubeconfig, err)
	}
	if cfg.QPS == 0 {
		cfg.QPS, cfg.Burst = 100, 200
	}
	cfg.UserAgent = "h8s-controller"
	if err := prepare(ctx, cfg); err != nil {
		return err
	}
	m, err := New(ctx, cfg, o)
	if err != nil {
		return err
	}
	return m.Start(ctx)
}

// Scheme knows the objects of Kubernetes and ours.
func Scheme() (*runtime.Scheme, error) {
	s := runtime.NewScheme()
	if err := clientgoscheme.AddToScheme(s); err != nil {
		return nil, err
	}
	return s, v1alpha1.AddToScheme(s)
}

// prepare waits until the API server serves our objects and makes the namespace that
// claims and the leader's lease are in.
func prepare(ctx context.Context, cfg *rest.Config) error {
	logger := ctrl.Log.WithName("prepare")
	told := ""
	for {
		err := prepareOnce(ctx, cfg)
		if err == nil {
			return nil
		}
		if told != err.Error() {
			told = err.Error()
			logger.Info("waiting for the API server", "reason", told)
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(time.Second):
		}
	}
}

func prepareOnce(ctx context.Context, cfg *rest.Config) error {
	scheme, err := Scheme()
	if err != nil {
		return err
	}
	c, err := client.New(cfg, client.Options{Scheme: scheme})
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	for _, kind := range []string{"Tenant", "TenantNamespace", "Network", "Port", "FloatingIP", "AddressPool"} {
		if _, err := c.RESTMapper().RESTMapping(v1alpha1.GroupVersion.WithKind(kind).GroupKind(), v1alpha1.GroupVersion.Version); err != nil {
			if meta.IsNoMatchError(err) {
				return fmt.Errorf("%s is not served yet", kind)
			}
			return err
		}
	}
	ns := &corev1.Namespace{}
	err = c.Get(ctx, client.ObjectKey{Name: v1alpha1.SystemNamespace}, ns)
	if !apierrors.IsNotFound(err) {
		return err
	}
	err = c.Create(ctx, &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: v1alpha1.SystemNamespace}})
	if apierrors.IsAlreadyExists(err) {
		return nil
	}
	return err
}

// manager keeps the checks of readiness, so that they are served beside the metrics.
type manager struct {
	ctrl.Manager
	ready *healthz.Handler
}

// AddReadyzCheck implements ctrl.Manager.
func (m *manager) AddReadyzCheck(name string, check healthz.Checker) error {
	m.ready.Checks[name] = check
	return nil
}

// New makes the manager with everything that runs in it.
func New(ctx context.Context, cfg *rest.Config, o Options) (ctrl.Manager, error) {
	limits, err := o.limits()
	if err != nil {
		return nil, err
	}
	scheme, err := Scheme()
	if err != nil {
		return nil, err
	}
	alive := &healthz.Handler{Checks: map[string]healthz.Checker{"ping": healthz.Ping}}
	ready := &healthz.Handler{Checks: map[string]healthz.Checker{}}
	address := o.HealthAddress
	if address == "" {
		address = "0" // none
	}
	inner, err := ctrl.NewManager(cfg, ctrl.Options{
		Scheme:         scheme,
		LeaderElection: o.LeaderElect, LeaderElectionID: lease, LeaderElectionNamespace: v1alpha1.SystemNamespace,
		LeaderElectionReleaseOnCancel: true,
		// Names of metrics; a test starts it more than once in its process.
		Controller:             config.Controller{SkipNameValidation: ptr.To(true)},
		HealthProbeBindAddress: "0",
		Metrics: server.Options{BindAddress: address, ExtraHandlers: map[string]http.Handler{
			"/healthz": http.StripPrefix("/healthz", alive), "/readyz": http.StripPrefix("/readyz", ready),
		}},
		Cache: cache.Options{
			DefaultTransform: cache.TransformStripManagedFields(),
			ByObject: map[client.Object]cache.ByObject{
				// Every node's heartbeat is a Lease too, elsewhere.
				&coordinationv1.Lease{}: {Namespaces: map[string]cache.Config{v1alpha1.ClaimNamespace: {}}},
			},
		},
	})
	if err != nil {
		return nil, err
	}
	m := &manager{inner, ready}
	started := make(chan struct{})
	if err := m.Add(everywhere(func(ctx context.Context) error {
		if inner.GetCache().WaitForCacheSync(ctx) {
			close(started)
		}
		<-ctx.Done()
		return nil
	})); err != nil {
		return nil, err
	}
	if err := m.AddReadyzCheck("caches", func(*http.Request) error {
		select {
		case <-started:
			return nil
		default:
			return errors.New("caches are not filled yet")
		}
	}); err != nil {
		return nil, err
	}
	if err := binding.Index(ctx, m.GetFieldIndexer()); err != nil {
		return nil, err
	}
	claims := claim.Store{Writer: m.GetClient(), Reader: m.GetAPIReader(), Cache: m.GetClient()}
	providers, err := o.Networks.providers(ctx, m, claims, limits, o.OpenStack)
	if err != nil {
		return nil, fmt.Errorf("networks: %w", err)
	}
	if err := network.Setup(ctx, m, network.Options{
		Limits: limits, Claims: claims, Providers: providers,
		PortGrace: o.PortGrace, Retry: o.Retry, Sweep: o.Sweep, Resync: o.Networks.Resync, Poll: o.Networks.Poll,
	}); err != nil {
		return nil, fmt.Errorf("networks: %w", err)
	}
	projects, err := o.OpenStack.identity(m)
	if err != nil {
		return nil, fmt.Errorf("keystone: %w", err)
	}
	if err := tenant.Setup(m, tenant.Options{Retry: o.Retry, Projects: projects}); err != nil {
		return nil, fmt.Errorf("tenants: %w", err)
	}
	if err := csr.Setup(m, limits.Services); err != nil {
		return nil, fmt.Errorf("certificates: %w", err)
	}
	if o.Webhook.Address == "" {
		return m, nil
	}
	volumeOf, err := o.volumeOf()
	if err != nil {
		return nil, fmt.Errorf("volumes: %w", err)
	}
	if err := admission.Setup(ctx, m, admission.Options{
		WebhookAddress: o.Webhook.Address, CertFile: o.Webhook.Cert, KeyFile: o.Webhook.Key, CAFile: o.Webhook.CA,
		ServiceCIDRs: limits.Services, ReservedCIDRs: limits.Reserved, ClusterDomain: strings.Trim(o.ClusterDomain, "."),
		FabricMTU: limits.FabricMTU, Providers: o.Networks.names(o.OpenStack), VolumeOf: volumeOf,
	}); err != nil {
		return nil, fmt.Errorf("admission: %w", err)
	}
	return m, nil
}

// everywhere runs on every replica, not only on the leader.
type everywhere func(context.Context) error

// Start implements manager.Runnable.
func (f everywhere) Start(ctx context.Context) error { return f(ctx) }

// NeedLeaderElection implements manager.LeaderElectionRunnable.
func (everywhere) NeedLeaderElection() bool { return false }
