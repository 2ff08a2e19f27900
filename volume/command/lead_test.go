package command

import (
	"context"
	"strings"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	coordinationv1 "k8s.io/api/coordination/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"sigs.k8s.io/controller-runtime/pkg/client"

	v1alpha1 "github.com/hypernetes/hypernetes/api/hypernetes/v1alpha1"
	"github.com/hypernetes/hypernetes/test/controlplane"
)

// TestLead: of two replicas one works, the other takes over when the first has ended its
// work, and one whose lease somebody takes stops.
func TestLead(t *testing.T) {
	const patience = time.Minute
	cfg := controlplane.Start(t)
	api, err := client.New(cfg, client.Options{Scheme: controlplane.Scheme()})
	if err != nil {
		t.Fatal(err)
	}
	if err := api.Create(t.Context(), &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: v1alpha1.SystemNamespace}}); err != nil {
		t.Fatal(err)
	}
	type replica struct {
		began, end chan struct{}
		stop       context.CancelFunc
		result     chan error
	}
	run := func() *replica {
		ctx, cancel := context.WithCancel(t.Context())
		r := &replica{make(chan struct{}), make(chan struct{}), cancel, make(chan error, 1)}
		go func() {
			r.result <- lead(ctx, cfg, "test", func(ctx context.Context) error {
				close(r.began)
				<-ctx.Done()
				<-r.end
				return nil
			})
		}()
		return r
	}
	await := func(what string, c <-chan struct{}) {
		t.Helper()
		select {
		case <-c:
		case <-time.After(patience):
			t.Fatalf("%s: not within %v", what, patience)
		}
	}
	first := run()
	await("the first leads", first.began)
	second, third := run(), run()
	third.stop()
	if err := <-third.result; err != nil {
		t.Errorf("one that never led: %v", err)
	}
	first.stop() // its work goes on
	held := func() string {
		l := &coordinationv1.Lease{}
		if err := api.Get(t.Context(), client.ObjectKey{Namespace: v1alpha1.SystemNamespace, Name: "test"}, l); err != nil {
			t.Fatal(err)
		}
		return *l.Spec.HolderIdentity
	}
	was := held()
	select {
	case <-second.began:
		t.Fatal("two work at a time")
	case <-time.After(2 * retry):
	}
	if held() != was || was == "" {
		t.Errorf("the lease was %q's, is %q's", was, held())
	}
	close(first.end)
	if err := <-first.result; err != nil {
		t.Error(err)
	}
	await("the second leads", second.began)

	close(second.end)
	l := &coordinationv1.Lease{}
	for {
		if err := api.Get(t.Context(), client.ObjectKey{Namespace: v1alpha1.SystemNamespace, Name: "test"}, l); err != nil {
			t.Fatal(err)
		}
		thief, now, long := "thief", metav1.NowMicro(), int32(3600)
		l.Spec.HolderIdentity, l.Spec.RenewTime, l.Spec.LeaseDurationSeconds = &thief, &now, &long
		if err := api.Update(t.Context(), l); err == nil {
			break
		}
	}
	select {
	case err := <-second.result:
		if !errdefs.IsUnavailable(err) || !strings.Contains(err.Error(), "h8s-system/test was lost") {
			t.Errorf("%v", err)
		}
	case <-time.After(patience):
		t.Error("it works on without the lease")
	}
}
