package controller

import (
	"context"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"github.com/containerd/errdefs"

	v1alpha1 "github.com/hypernetes/hypernetes/api/hypernetes/v1alpha1"
	"github.com/hypernetes/hypernetes/network/provider"
)

// unknown is an error that says nothing about the object: whoever was asked did not answer.
type unknown struct{ error }

func (u *unknown) Unwrap() error { return u.error }

// addressProviderOf is the one of a name, if it has addresses of its own.
func (b base) addressProviderOf(name string) AddressProvider {
	for _, p := range b.o.Providers {
		if p.Name() == name {
			ap, _ := p.(AddressProvider)
			return ap
		}
	}
	return nil
}

// carrier is who has the external addresses of a Port's Network, nil for AddressPools.
func (b base) carrier(ctx context.Context, x *v1alpha1.Port) (AddressProvider, error) {
	n := &v1alpha1.Network{}
	if err := b.client.Get(ctx, client.ObjectKey{Namespace: x.Namespace, Name: x.Spec.Network}, n); err != nil {
		return nil, client.IgnoreNotFound(err)
	}
	return b.addressProviderOf(n.Status.Provider), nil
}

// addressProvider is who f's address is to be of, nil for AddressPools. An address that it
// has decides; then where it leads; then the Networks the tenant has, if all of them are
// one provider's; then the cluster's default.
func (r *floatingIPs) addressProvider(ctx context.Context, f *v1alpha1.FloatingIP) (AddressProvider, error) {
	if f.Status.Provider != "" {
		if p := r.addressProviderOf(f.Status.Provider); p != nil {
			return p, nil
		}
		return nil, refuse("NoProvider", "its address is of provider %s, which the cluster no longer has: ask the operator", f.Status.Provider)
	}
	if f.Spec.Pool != "" {
		err := r.client.Get(ctx, client.ObjectKey{Name: f.Spec.Pool}, &v1alpha1.AddressPool{})
		if client.IgnoreNotFound(err) != nil || err == nil {
			return nil, err
		}
	}
	x, err := r.target(ctx, r.client, f)
	if err == nil {
		return r.carrier(ctx, x)
	}
	if _, ok := asRefusal(err); !ok {
		return nil, err
	}
	list := &v1alpha1.NetworkList{}
	if err := r.client.List(ctx, list, client.InNamespace(f.Namespace)); err != nil {
		return nil, err
	}
	name := ""
	for i := range list.Items {
		switch p := list.Items[i].Status.Provider; {
		case p == "" || p == name:
		case name == "":
			name = p
		default:
			return r.addressProviderOf(r.o.Providers[0].Name()), nil
		}
	}
	if name == "" {
		name = r.o.Providers[0].Name()
	}
	return r.addressProviderOf(name), nil
}

// ensureAtProvider is ensure for addresses that are a provider's.
func (r *floatingIPs) ensureAtProvider(ctx context.Context, f *v1alpha1.FloatingIP, p AddressProvider) error {
	at := func(target *v1alpha1.Port, was v1alpha1.FloatingIPStatus) error {
		seen := f.DeepCopy()
		seen.Status = was
		st, err := p.EnsureAddress(ctx, seen, target)
		if st.ID != "" {
			if f.Status.ProviderID == "" {
				r.note(f, corev1.EventTypeNormal, "Allocated", "Allocate", "%s of %s", st.Address, st.Pool)
			}
			f.Status.Provider, f.Status.ProviderID, f.Status.Pool, f.Status.Address = p.Name(), st.ID, st.Pool, st.Address
		}
		switch {
		case err == nil:
		case ctx.Err() != nil:
			return ctx.Err()
		case errdefs.IsUnavailable(err), errdefs.IsUnauthorized(err):
			return &unknown{err}
		case provider.Reason(err, "") != "":
			return refuse(provider.Reason(err, ""), "%v", err)
		default:
			return &unknown{err}
		}
		if st.Repaired != "" {
			r.note(f, corev1.EventTypeWarning, "Repaired", "Repair", "%s: put right", st.Repaired)
		}
		set(&f.Status.Conditions, f.Generation, v1alpha1.ConditionInSync, metav1.ConditionTrue, "InSync", "the provider has what is asked for")
		return nil
	}
	was := *f.Status.DeepCopy()
	if was.Address == "" {
		if err := at(nil, was); err != nil {
			return err
		}
		was = *f.Status.DeepCopy()
	}
	x, why := r.target(ctx, r.client, f)
	if why == nil {
		switch other, err := r.carrier(ctx, x); {
		case err != nil:
			return err
		case other == nil || other.Name() != p.Name():
			why = refuse("ProviderMismatch", "Port %s is in Network %s, which is not of provider %s, whose address %s is: make another FloatingIP",
				x.Name, x.Spec.Network, p.Name(), f.Status.Address)
		default:
			why = r.lead(ctx, f, x)
		}
	}
	if _, ok := asRefusal(why); why != nil && !ok {
		return why
	}
	if why != nil {
		x = nil
	}
	if err := at(x, was); err != nil {
		return err
	}
	return why
}

// releaseAtProviders gives up what providers have of f.
func (r *floatingIPs) releaseAtProviders(ctx context.Context, f *v1alpha1.FloatingIP) error {
	for _, p := range r.o.Providers {
		ap, ok := p.(AddressProvider)
		// One without any address may be of a controller that died before it wrote it down.
		if !ok || f.Status.Provider != p.Name() && (f.Status.Provider != "" || f.Status.Address != "") {
			continue
		}
		if err := ap.ReleaseAddress(ctx, f); err != nil && !apierrors.IsNotFound(err) {
			return err
		}
	}
	return nil
}
