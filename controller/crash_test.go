package controller

import (
	"context"
	"fmt"
	"net/http"
	"os"
	"os/exec"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	coordinationv1 "k8s.io/api/coordination/v1"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/tools/clientcmd"
	"sigs.k8s.io/controller-runtime/pkg/client"

	v1alpha1 "github.com/hypernetes/hypernetes/api/hypernetes/v1alpha1"
	"github.com/hypernetes/hypernetes/network/claim"
	"github.com/hypernetes/hypernetes/test/controlplane"
)

// In the environment of a child: how often it may write before it is killed.
const childWrites = "H8S_CONTROLLER_WRITES"

// child is a controller in a process of its own, which is killed as soon as the API server
// has done the last write it may make, before it knows of it.
func child(kubeconfig string) error {
	left, err := strconv.Atoi(os.Getenv(childWrites))
	if err != nil {
		return err
	}
	cfg, err := clientcmd.BuildConfigFromFlags("", kubeconfig)
	if err != nil {
		return err
	}
	cfg.QPS, cfg.Burst = 100, 200
	if err := prepare(context.Background(), cfg); err != nil {
		return err
	}
	w := &writes{}
	w.left.Store(int64(left))
	cfg.Wrap(func(next http.RoundTripper) http.RoundTripper {
		return roundTripper(func(r *http.Request) (*http.Response, error) {
			resp, err := next.RoundTrip(r)
			if err == nil && resp.StatusCode < 300 {
				w.count(r)
			}
			return resp, err
		})
	})
	o := testOptions()
	o.LeaderElect, o.HealthAddress = false, "127.0.0.1:0"
	m, err := New(context.Background(), cfg, o)
	if err != nil {
		return err
	}
	return m.Start(context.Background())
}

type roundTripper func(*http.Request) (*http.Response, error)

func (f roundTripper) RoundTrip(r *http.Request) (*http.Response, error) { return f(r) }

type writes struct{ left atomic.Int64 }

func (w *writes) count(r *http.Request) {
	// Events are told beside the work.
	if r.Method == http.MethodGet || strings.Contains(r.URL.Path, "/events") || strings.Contains(r.URL.RawQuery, "dryRun") {
		return
	}
	if w.left.Add(-1) == 0 {
		_ = syscall.Kill(os.Getpid(), syscall.SIGKILL)
		select {}
	}
}

// mortal runs controllers one after another, each of which is killed after its n-th write,
// n being 1, 2, 3 in turn; lives is how many there were. stop ends it.
func (c *cluster) mortal() (lives *atomic.Int64, stop func()) {
	c.t.Helper()
	kubeconfig := controlplane.Kubeconfig(c.t, controlplane.As(c.cfg, "h8s:controller", "h8s:controllers", "system:authenticated"))
	ctx, cancel := context.WithCancel(context.Background())
	lives = &atomic.Int64{}
	var wg sync.WaitGroup
	wg.Go(func() {
		runtime.LockOSThread() // the death signal comes when the thread that started it ends
		for ctx.Err() == nil {
			cmd := exec.CommandContext(ctx, os.Args[0], kubeconfig)
			cmd.Env = append(os.Environ(), fmt.Sprintf("%s=%d", childWrites, 1+lives.Load()%3))
			cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
			out, err := cmd.CombinedOutput()
			if status, ok := cmd.ProcessState.Sys().(syscall.WaitStatus); ctx.Err() == nil && (!ok || status.Signal() != syscall.SIGKILL) {
				c.t.Errorf("the controller ended by itself: %v\n%s", err, out)
				return
			}
			lives.Add(1)
		}
	})
	stop = sync.OnceFunc(func() { cancel(); wg.Wait() })
	c.t.Cleanup(stop)
	return lives, stop
}

// claims are the Leases of numbers, with their owners.
func (c *cluster) claims() []string {
	c.t.Helper()
	list := &coordinationv1.LeaseList{}
	if err := c.admin.List(context.Background(), list, client.InNamespace(v1alpha1.ClaimNamespace), client.HasLabels{claim.LabelKind}); err != nil {
		c.t.Fatal(err)
	}
	var out []string
	for _, l := range list.Items {
		holder := "nobody"
		if l.Spec.HolderIdentity != nil {
			holder = *l.Spec.HolderIdentity
		}
		out = append(out, l.Labels[claim.LabelKind]+" "+holder)
	}
	slices.Sort(out)
	return out
}

// TestCrash kills the controller after each write it makes while Networks, LoadBalancers,
// FloatingIPs and Tenants come and go: it ends as it would have otherwise, with one claim
// for each of them and none for what is gone.
func TestCrash(t *testing.T) {
	c := &cluster{t: t, cfg: controlplane.Start(t)}
	var err error
	if c.admin, err = client.New(c.cfg, client.Options{Scheme: controlplane.Scheme()}); err != nil {
		t.Fatal(err)
	}
	c.patience = 2 * time.Minute
	c.rights()
	var wg sync.WaitGroup
	ctx, cancel := context.WithCancel(context.Background())
	wg.Go(func() { c.finalizeNamespaces(ctx) })
	t.Cleanup(func() { cancel(); wg.Wait() })
	lives, stop := c.mortal()

	blue := c.tenant("blue")
	c.pool(poolOf("all", 0, nil, "192.0.2.10-192.0.2.19"))
	second := networkOf("blue", "second", "10.7.0.0/24")
	c.create(second)
	c.networkSays(second, v1alpha1.NetworkActive, "Active", "")
	web := c.space("blue", "web")
	svc := serviceOf("web", "www")
	c.create(svc)
	f := &v1alpha1.FloatingIP{ObjectMeta: metav1.ObjectMeta{Namespace: "tenant-blue", Name: "f"}}
	c.create(f)
	c.eventually("addresses", func() error {
		if err := c.get(svc); err != nil {
			return err
		}
		if err := c.get(f); err != nil {
			return err
		}
		if len(svc.Status.LoadBalancer.Ingress) != 1 || f.Status.Address == "" {
			return fmt.Errorf("%+v, %+v", svc.Status.LoadBalancer, f.Status)
		}
		return nil
	})
	first := networkOf("blue", "default", "")
	if err := c.get(first); err != nil {
		t.Fatal(err)
	}
	want := []string{
		claim.Address + " " + claim.OwnerOf(claim.KindService, svc).String(), claim.Address + " " + claim.OwnerOf(claim.KindFloatingIP, f).String(),
		claim.VNI + " " + claim.OwnerOf(claim.KindNetwork, first).String(), claim.VNI + " " + claim.OwnerOf(claim.KindNetwork, second).String(),
	}
	slices.Sort(want)
	claimed := func() error {
		if got := c.claims(); !slices.Equal(got, want) {
			return fmt.Errorf("claims\n%s\nwant\n%s", strings.Join(got, "\n"), strings.Join(want, "\n"))
		}
		return nil
	}
	c.eventually("one claim each", claimed)
	address, floating, vni := svc.Status.LoadBalancer.Ingress[0].IP, f.Status.Address, first.Status.VNI
	t.Logf("made after %d lives", lives.Load())

	drop := func(owners ...string) {
		want = slices.DeleteFunc(want, func(s string) bool {
			return slices.ContainsFunc(owners, func(o string) bool { return strings.Contains(s, o) })
		})
	}
	c.delete(second)
	c.gone(second)
	drop("/second/")
	c.eventually("the Network's claim is gone", claimed)
	c.delete(f)
	c.gone(f)
	drop("/f/")
	c.eventually("the FloatingIP's claim is gone", claimed)
	// What stays has kept what it had.
	if err := c.get(svc); err != nil || svc.Status.LoadBalancer.Ingress[0].IP != address || address == floating {
		t.Errorf("address %+v, %v, was %s", svc.Status.LoadBalancer, err, address)
	}
	if err := c.get(first); err != nil || first.Status.VNI != vni {
		t.Errorf("VNI %d, %v, was %d", first.Status.VNI, err, vni)
	}
	// The Namespace goes with its Service while the tenant goes.
	c.delete(blue)
	for _, o := range []client.Object{web, first, blue} {
		c.gone(o)
	}
	for _, name := range []string{"web", "tenant-blue"} {
		c.gone(namespaceOf(name))
	}
	c.eventually("the Service is gone", func() error {
		if err := c.get(&corev1.Service{ObjectMeta: svc.ObjectMeta}); !apierrors.IsNotFound(err) {
			return fmt.Errorf("%v", err)
		}
		return nil
	})
	want = nil
	c.eventually("no claim is left", claimed)
	stop()
	t.Logf("gone after %d lives", lives.Load())
	if lives.Load() < 10 {
		t.Errorf("the controller was killed %d times only", lives.Load())
	}
}
