package csr

import (
	"context"
	"fmt"
	"net/netip"
	"slices"
	"time"

	certificatesv1 "k8s.io/api/certificates/v1"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	ctrl "sigs.k8s.io/controller-runtime"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/log"
	"sigs.k8s.io/controller-runtime/pkg/manager"
	"sigs.k8s.io/controller-runtime/pkg/reconcile"

	v1alpha1 "github.com/hypernetes/hypernetes/api/hypernetes/v1alpha1"
)

var _ reconcile.Reconciler = (*approver)(nil)

// approver writes decisions down.
type approver struct {
	client   client.Client
	services []netip.Prefix
}

// Setup registers the approver. services are the ranges of ClusterIPs.
func Setup(m manager.Manager, services []netip.Prefix) error {
	return ctrl.NewControllerManagedBy(m).Named("csr").
		For(&certificatesv1.CertificateSigningRequest{}).
		Complete(&approver{m.GetClient(), services})
}

// Reconcile implements reconcile.Reconciler.
func (r *approver) Reconcile(ctx context.Context, req reconcile.Request) (reconcile.Result, error) {
	c := &certificatesv1.CertificateSigningRequest{}
	if err := r.client.Get(ctx, req.NamespacedName, c); err != nil {
		return reconcile.Result{}, client.IgnoreNotFound(err)
	}
	if len(c.Status.Certificate) > 0 || slices.ContainsFunc(c.Status.Conditions, func(c certificatesv1.CertificateSigningRequestCondition) bool {
		return c.Type == certificatesv1.CertificateApproved || c.Type == certificatesv1.CertificateDenied
	}) {
		return reconcile.Result{}, nil
	}
	facts, err := r.facts(ctx)
	if err != nil {
		return reconcile.Result{}, err
	}
	d := Decide(c.Spec, facts)
	logger := log.FromContext(ctx).WithValues("signer", c.Spec.SignerName, "requester", c.Spec.Username, "answer", d.Answer.String(), "reason", d.Reason)
	kind := certificatesv1.CertificateApproved
	switch d.Answer {
	case Ignore:
		return reconcile.Result{}, nil
	case Wait:
		logger.V(1).Info(d.Message)
		return reconcile.Result{RequeueAfter: 5 * time.Second}, nil
	case Deny:
		kind = certificatesv1.CertificateDenied
	}
	c.Status.Conditions = append(c.Status.Conditions, certificatesv1.CertificateSigningRequestCondition{
		Type: kind, Status: corev1.ConditionTrue, Reason: d.Reason, Message: d.Message, LastUpdateTime: metav1.Now(),
	})
	if err := r.client.SubResource("approval").Update(ctx, c); err != nil {
		if apierrors.IsConflict(err) || apierrors.IsNotFound(err) {
			return reconcile.Result{}, nil
		}
		return reconcile.Result{}, fmt.Errorf("write the decision down: %w", err)
	}
	logger.Info(d.Message)
	return reconcile.Result{}, nil
}

// facts reads what decisions need.
func (r *approver) facts(ctx context.Context) (Facts, error) {
	tenants, nodes := &v1alpha1.TenantList{}, &corev1.NodeList{}
	if err := r.client.List(ctx, tenants); err != nil {
		return Facts{}, err
	}
	if err := r.client.List(ctx, nodes); err != nil {
		return Facts{}, err
	}
	return Facts{
		Tenant: func(name string) ([]string, bool) {
			i := slices.IndexFunc(tenants.Items, func(t v1alpha1.Tenant) bool { return t.Name == name && t.DeletionTimestamp.IsZero() })
			if i < 0 {
				return nil, false
			}
			return tenants.Items[i].Spec.Owners, true
		},
		Node: func(name string) ([]string, bool) {
			i := slices.IndexFunc(nodes.Items, func(n corev1.Node) bool { return n.Name == name })
			if i < 0 {
				return nil, false
			}
			var out []string
			for _, a := range nodes.Items[i].Status.Addresses {
				if a.Type == corev1.NodeInternalIP || a.Type == corev1.NodeExternalIP {
					out = append(out, a.Address)
				}
			}
			return out, true
		},
		Foreign: func(node string, a netip.Addr) bool {
			if slices.ContainsFunc(r.services, func(p netip.Prefix) bool { return p.Contains(a) }) {
				return true
			}
			return slices.ContainsFunc(nodes.Items, func(n corev1.Node) bool {
				return n.Name != node && slices.ContainsFunc(n.Status.Addresses, func(x corev1.NodeAddress) bool {
					b, err := netip.ParseAddr(x.Address)
					return err == nil && b.Unmap() == a
				})
			})
		},
	}, nil
}
