package admission

import (
	"context"
	"crypto/tls"
	"fmt"
	"net/http"
	"slices"
	"strings"
	"time"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	ctrl "sigs.k8s.io/controller-runtime"
	"sigs.k8s.io/controller-runtime/pkg/cache"
	"sigs.k8s.io/controller-runtime/pkg/certwatcher"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/webhook"
	ctrladmission "sigs.k8s.io/controller-runtime/pkg/webhook/admission"

	v1alpha1 "github.com/hypernetes/hypernetes/api/hypernetes/v1alpha1"
	"github.com/hypernetes/hypernetes/network/probe"
)

const (
	// maxBody is the API server's largest object twice, old and new.
	maxBody = 6 << 20
	// handleTimeout is below the API server's own, so that a refusal says what took long.
	handleTimeout = 4 * time.Second
)

// Setup adds to mgr the webhook, which every replica serves, and the reconciler of its
// configuration and of the policies, which the leader runs.
func Setup(ctx context.Context, mgr ctrl.Manager, o Options) error {
	host, port, ca, err := o.read()
	if err != nil {
		return err
	}
	if o.rewrite == nil {
		o.rewrite = probe.Rewrite
	}
	h := &decider{
		Options: o,
		read:    reader{cached: mgr.GetClient(), live: mgr.GetAPIReader()},
		write:   mgr.GetClient(),
		decoder: ctrladmission.NewDecoder(mgr.GetScheme()),
		events:  mgr.GetEventRecorder("h8s-admission"),
	}
	// The caches fill when the manager starts and not when the first request waits for them.
	for _, o := range []client.Object{
		&corev1.Namespace{}, &corev1.Node{}, &v1alpha1.Tenant{}, &v1alpha1.TenantNamespace{}, &v1alpha1.Network{},
		&v1alpha1.Port{}, &v1alpha1.FloatingIP{}, &v1alpha1.AddressPool{},
	} {
		if _, err := mgr.GetCache().GetInformer(ctx, o, cache.BlockUntilSynced(false)); err != nil {
			return err
		}
	}
	watcher, err := certwatcher.New(o.CertFile, o.KeyFile)
	if err != nil {
		return fmt.Errorf("webhook certificate: %w", err)
	}
	if err := mgr.Add(watcher); err != nil {
		return err
	}
	server := webhook.NewServer(webhook.Options{Host: host, Port: port, TLSOpts: []func(*tls.Config){func(c *tls.Config) {
		c.MinVersion = tls.VersionTLS12
		c.GetCertificate = watcher.GetCertificate
	}}})
	for path, handle := range h.paths() {
		server.Register(path, bounded(&ctrladmission.Webhook{Handler: handle}))
	}
	if err := mgr.Add(server); err != nil {
		return err
	}
	if err := mgr.AddReadyzCheck("webhook", server.StartedChecker()); err != nil {
		return err
	}

	objects, err := desired(o, ca)
	if err != nil {
		return err
	}
	if err := mgr.AddReadyzCheck("policies", (&inEffect{client: mgr.GetClient()}).check); err != nil {
		return err
	}
	return addRepair(mgr, objects)
}

// desired is everything that is applied, in order: policies first, so that nothing is
// unguarded while the webhook is away, and last the policy that inEffect looks for.
func desired(o Options, ca []byte) ([]*unstructured.Unstructured, error) {
	objects, err := policies(o)
	if err != nil {
		return nil, err
	}
	hooks, err := webhooks(o.WebhookAddress, ca)
	if err != nil {
		return nil, err
	}
	objects = append(objects, hooks...)
	slices.SortStableFunc(objects, func(a, b *unstructured.Unstructured) int { return last(a) - last(b) })
	return objects, nil
}

func last(o *unstructured.Unstructured) int {
	if o.GetName() == labelling && strings.HasPrefix(o.GetKind(), "Mutating") {
		return 1
	}
	return 0
}

// bounded keeps a request from taking more memory or time than it may.
func bounded(h http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		r.Body = http.MaxBytesReader(w, r.Body, maxBody)
		ctx, cancel := context.WithTimeout(r.Context(), handleTimeout)
		defer cancel()
		h.ServeHTTP(w, r.WithContext(ctx))
	})
}
