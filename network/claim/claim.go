// Package claim owns the numbers that only one object of the cluster may have: VNIs and
// external addresses. A claim is a Lease in h8s-system named by the number, so that making
// it is atomic in the API server; its holderIdentity names the object, and is the truth
// for the data plane. It must not know what the numbers are used for.
package claim

import (
	"context"
	"fmt"
	"net/netip"
	"strconv"
	"strings"
	"time"

	"github.com/containerd/errdefs"
	coordinationv1 "k8s.io/api/coordination/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"sigs.k8s.io/controller-runtime/pkg/client"

	v1alpha1 "github.com/hypernetes/hypernetes/api/hypernetes/v1alpha1"
)

// What is claimed, the value of LabelKind.
const (
	Address = "address"
	VNI     = "vni"
)

// Kinds of owners.
const (
	KindNetwork    = "Network"
	KindService    = "Service"
	KindFloatingIP = "FloatingIP"
)

// Labels and annotations of a Lease. They are for finding it; holderIdentity is the truth.
const (
	LabelKind  = "hypernetes.io/claim"
	LabelOwner = "hypernetes.io/claim-owner" // UID
	// AnnotationAddress is the address, in its canonical form.
	AnnotationAddress = "hypernetes.io/address"
	// AnnotationPool is the AddressPool it was taken from.
	AnnotationPool = "hypernetes.io/pool"
)

// Owner is an object that holds a claim.
type Owner struct {
	Kind, Namespace, Name string
	UID                   types.UID
}

// OwnerOf is the Owner that obj is.
func OwnerOf(kind string, obj client.Object) Owner {
	return Owner{kind, obj.GetNamespace(), obj.GetName(), obj.GetUID()}
}

// String is what holderIdentity says.
func (o Owner) String() string {
	return o.Kind + "/" + o.Namespace + "/" + o.Name + "/" + string(o.UID)
}

// ParseOwner reads a holderIdentity.
func ParseOwner(s string) (Owner, bool) {
	parts := strings.Split(s, "/")
	if len(parts) != 4 || parts[0] == "" || parts[2] == "" || parts[3] == "" {
		return Owner{}, false
	}
	return Owner{parts[0], parts[1], parts[2], types.UID(parts[3])}, true
}

// AddressName is the name of the Lease that claims a.
func AddressName(a netip.Addr) string {
	return Address + "-" + strings.NewReplacer(".", "-", ":", "-").Replace(a.String())
}

// VNIName is the name of the Lease that claims vni.
func VNIName(vni int32) string { return VNI + "-" + strconv.Itoa(int(vni)) }

// Claimable says whether a can be named by a Lease: an address that ends in :: cannot.
func Claimable(a netip.Addr) bool { return a.IsValid() && !strings.HasSuffix(a.String(), ":") }

// Claim is a Lease read.
type Claim struct {
	// Name of the Lease.
	Name string
	// Owner has it; zero while it is kept back.
	Owner Owner
	// Tenant and Pool it was claimed for; the last ones while it is kept back.
	Tenant, Pool string
	// Address or VNI, by kind.
	Address netip.Addr
	VNI     int32
	// FreeAt is when one that is kept back may be had by others.
	FreeAt time.Time

	lease *coordinationv1.Lease
}

// Held says whether somebody has it.
func (c Claim) Held() bool { return c.Owner != Owner{} }

// Of reads a Lease.
func Of(l *coordinationv1.Lease) (Claim, bool) {
	c := Claim{Name: l.Name, Tenant: l.Labels[v1alpha1.LabelTenant], Pool: l.Annotations[AnnotationPool], lease: l}
	switch kind, rest, _ := strings.Cut(l.Name, "-"); kind {
	case Address:
		a, err := netip.ParseAddr(l.Annotations[AnnotationAddress])
		if err != nil || AddressName(a) != l.Name {
			return Claim{}, false
		}
		c.Address = a
	case VNI:
		n, err := strconv.ParseInt(rest, 10, 32)
		if err != nil {
			return Claim{}, false
		}
		c.VNI = int32(n)
	default:
		return Claim{}, false
	}
	if h := l.Spec.HolderIdentity; h != nil {
		o, ok := ParseOwner(*h)
		if !ok {
			return Claim{}, false
		}
		c.Owner = o
		return c, true
	}
	if l.Spec.RenewTime != nil && l.Spec.LeaseDurationSeconds != nil {
		c.FreeAt = l.Spec.RenewTime.Add(time.Duration(*l.Spec.LeaseDurationSeconds) * time.Second)
	}
	return c, true
}

// Request is a claim to make.
type Request struct {
	Owner Owner
	// Tenant it counts for; empty for none.
	Tenant string
	// Pool of an address.
	Pool string
	// Explicit says that the number was asked for by name: a tenant may have back at once
	// what is kept back after it had it.
	Explicit bool
}

// Store makes and releases claims. Reader must not be a cache: whether a number is free
// is asked of the API server.
type Store struct {
	Writer client.Writer
	Reader client.Reader
	// Cache, if set, is believed when it says that who asks has the number already.
	Cache client.Reader
	Now   func() time.Time
}

func (s Store) now() time.Time {
	if s.Now == nil {
		return time.Now()
	}
	return s.Now()
}

// ClaimAddress takes an address. The error is errdefs.ErrAlreadyExists if somebody else
// has it and errdefs.ErrUnavailable if it is kept back.
func (s Store) ClaimAddress(ctx context.Context, a netip.Addr, r Request) error {
	l := s.lease(AddressName(a), Address, r)
	l.Annotations = map[string]string{AnnotationAddress: a.String(), AnnotationPool: r.Pool}
	return s.claim(ctx, l, r)
}

// ClaimVNI takes a VNI; errors are those of ClaimAddress.
func (s Store) ClaimVNI(ctx context.Context, vni int32, r Request) error {
	return s.claim(ctx, s.lease(VNIName(vni), VNI, r), r)
}

func (s Store) lease(name, kind string, r Request) *coordinationv1.Lease {
	holder, now := r.Owner.String(), metav1.NewMicroTime(s.now())
	l := &coordinationv1.Lease{
		ObjectMeta: metav1.ObjectMeta{
			Name: name, Namespace: v1alpha1.ClaimNamespace,
			Labels: map[string]string{LabelKind: kind, LabelOwner: string(r.Owner.UID)},
		},
		Spec: coordinationv1.LeaseSpec{HolderIdentity: &holder, AcquireTime: &now},
	}
	if r.Tenant != "" {
		l.Labels[v1alpha1.LabelTenant] = r.Tenant
	}
	return l
}

func (s Store) claim(ctx context.Context, want *coordinationv1.Lease, r Request) error {
	if s.Cache != nil {
		have := &coordinationv1.Lease{}
		if err := s.Cache.Get(ctx, client.ObjectKeyFromObject(want), have); err == nil {
			if h := have.Spec.HolderIdentity; h != nil && *h == r.Owner.String() {
				return nil
			}
		}
	}
	err := s.Writer.Create(ctx, want.DeepCopy())
	if err == nil || !apierrors.IsAlreadyExists(err) {
		return err
	}
	have := &coordinationv1.Lease{}
	if err := s.Reader.Get(ctx, client.ObjectKeyFromObject(want), have); err != nil {
		return err // gone meanwhile: the caller tries again
	}
	if h := have.Spec.HolderIdentity; h != nil {
		if *h == r.Owner.String() {
			return nil
		}
		return fmt.Errorf("%s is held by %s: %w", want.Name, *h, errdefs.ErrAlreadyExists)
	}
	c, ok := Of(have)
	if !ok {
		return fmt.Errorf("%s is not a claim of ours: %w", want.Name, errdefs.ErrAlreadyExists)
	}
	if again := r.Explicit && r.Tenant == c.Tenant; s.now().Before(c.FreeAt) && !again {
		return fmt.Errorf("%s is kept back until %s: %w", want.Name, c.FreeAt.UTC().Format(time.RFC3339), errdefs.ErrUnavailable)
	}
	have.Labels, have.Annotations, have.Spec = want.Labels, want.Annotations, want.Spec
	if err := s.Writer.Update(ctx, have); apierrors.IsConflict(err) || apierrors.IsNotFound(err) {
		return fmt.Errorf("%s was taken meanwhile: %w", want.Name, errdefs.ErrAlreadyExists)
	} else if err != nil {
		return err
	}
	return nil
}

// List returns the claims of a kind, those kept back included.
func (s Store) List(ctx context.Context, kind string, opts ...client.ListOption) ([]Claim, error) {
	list := &coordinationv1.LeaseList{}
	opts = append(opts, client.InNamespace(v1alpha1.ClaimNamespace), client.MatchingLabels{LabelKind: kind})
	if err := s.Reader.List(ctx, list, opts...); err != nil {
		return nil, err
	}
	var out []Claim
	for i := range list.Items {
		if c, ok := Of(&list.Items[i]); ok {
			out = append(out, c)
		}
	}
	return out, nil
}

// Owned returns what o holds.
func (s Store) Owned(ctx context.Context, kind string, o Owner) ([]Claim, error) {
	list := &coordinationv1.LeaseList{}
	if err := s.Reader.List(ctx, list, client.InNamespace(v1alpha1.ClaimNamespace),
		client.MatchingLabels{LabelKind: kind, LabelOwner: string(o.UID)}); err != nil {
		return nil, err
	}
	var out []Claim
	for i := range list.Items {
		if c, ok := Of(&list.Items[i]); ok && c.Owner == o {
			out = append(out, c)
		}
	}
	return out, nil
}

// Release gives a claim up. For keepBack nobody else gets it: what is still on its way to
// the old owner must not reach a new one.
func (s Store) Release(ctx context.Context, c Claim, keepBack time.Duration) error {
	version, uid := c.lease.ResourceVersion, c.lease.UID
	if keepBack < time.Second {
		err := s.Writer.Delete(ctx, c.lease.DeepCopy(), client.Preconditions{UID: &uid, ResourceVersion: &version})
		return client.IgnoreNotFound(err)
	}
	l := c.lease.DeepCopy()
	now, seconds := metav1.NewMicroTime(s.now()), int32(min(keepBack/time.Second, 1<<30))
	l.Spec = coordinationv1.LeaseSpec{RenewTime: &now, LeaseDurationSeconds: &seconds}
	delete(l.Labels, LabelOwner)
	return client.IgnoreNotFound(s.Writer.Update(ctx, l))
}

// Sweep deletes what was kept back long enough.
func (s Store) Sweep(ctx context.Context, all []Claim) error {
	for _, c := range all {
		if c.Held() || s.now().Before(c.FreeAt) {
			continue
		}
		if err := s.Release(ctx, c, 0); err != nil && !apierrors.IsConflict(err) {
			return err
		}
	}
	return nil
}
