package admission

import (
	"context"
	"fmt"
	"net/http"
	"sync/atomic"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"sigs.k8s.io/controller-runtime/pkg/client"

	v1alpha1 "github.com/hypernetes/hypernetes/api/hypernetes/v1alpha1"
)

// labelling is the policy that gives Ports their label.
const labelling = "ports.hypernetes.io"

// inEffect tells whether the API server acts on our policies: it reads them about once a
// second, and until then a tenant's Service, say, is neither refused nor completed. It takes
// them in the order they were written, so the last one stands for all.
type inEffect struct {
	client client.Client
	seen   atomic.Bool
}

// patience is how long a check waits, which spares who asks ten times a second ten refusals.
const patience = 700 * time.Millisecond

// check is a healthz.Checker.
func (e *inEffect) check(r *http.Request) error {
	if e.seen.Load() {
		return nil
	}
	ctx, cancel := context.WithTimeout(r.Context(), patience)
	defer cancel()
	t := time.NewTicker(patience / 7)
	defer t.Stop()
	for {
		err := e.look(ctx)
		if err == nil {
			e.seen.Store(true)
			return nil
		}
		select {
		case <-ctx.Done():
			return err
		case <-t.C:
		}
	}
}

func (e *inEffect) look(ctx context.Context) error {
	const network = "readiness"
	p := &v1alpha1.Port{
		ObjectMeta: metav1.ObjectMeta{Namespace: v1alpha1.SystemNamespace, Name: v1alpha1.PortName(network, "192.0.2.1")},
		Spec:       v1alpha1.PortSpec{Network: network, Addresses: []string{"192.0.2.1"}, Retain: true},
	}
	if err := e.client.Create(ctx, p, client.DryRunAll); err != nil {
		return fmt.Errorf("admission policies: %w", err)
	}
	if p.Labels[v1alpha1.LabelNetwork] != network {
		return fmt.Errorf("the API server has not taken up the policy %s yet", labelling)
	}
	return nil
}
