package controller

import (
	"testing"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/types"
	"sigs.k8s.io/controller-runtime/pkg/client/fake"

	v1alpha1 "github.com/hypernetes/hypernetes/api/hypernetes/v1alpha1"
	"github.com/hypernetes/hypernetes/network/subnet"
)

// TestRoutedAmongOthers: what nodes have routes to is nobody's who was there before, also
// of those whose status does not say yet what they have.
func TestRoutedAmongOthers(t *testing.T) {
	now := time.Now().Truncate(time.Second)
	network := func(name, cidr string, at time.Time) *v1alpha1.Network {
		return &v1alpha1.Network{
			ObjectMeta: metav1.ObjectMeta{Namespace: "tenant-" + name, Name: name, UID: types.UID(name), CreationTimestamp: metav1.NewTime(at)},
			Spec:       v1alpha1.NetworkSpec{Subnets: map[string]v1alpha1.Subnet{"a": {CIDR: cidr}}},
		}
	}
	for name, x := range map[string]struct {
		cidr    string
		at      time.Time
		phase   string
		subnets []v1alpha1.SubnetStatus
		want    bool
	}{
		"active":             {"10.0.0.0/16", now.Add(-time.Second), v1alpha1.NetworkActive, []v1alpha1.SubnetStatus{{Name: "a", CIDR: "10.0.0.0/16"}}, true},
		"not looked at yet":  {"10.0.0.0/16", now.Add(-time.Second), "", nil, true},
		"on its way":         {"10.0.0.0/16", now.Add(-time.Second), v1alpha1.NetworkPending, nil, true},
		"a range taken back": {"10.1.0.0/16", now.Add(-time.Second), v1alpha1.NetworkFailed, []v1alpha1.SubnetStatus{{Name: "a", CIDR: "10.0.0.0/16"}}, true},
		"refused":            {"10.0.0.0/16", now.Add(-time.Second), v1alpha1.NetworkFailed, nil, false},
		"invalid":            {"10.0.0.1/16", now.Add(-time.Second), "", nil, false},
		"later":              {"10.0.0.0/16", now.Add(time.Second), v1alpha1.NetworkActive, []v1alpha1.SubnetStatus{{Name: "a", CIDR: "10.0.0.0/16"}}, false},
		"elsewhere":          {"10.1.0.0/16", now.Add(-time.Second), v1alpha1.NetworkActive, []v1alpha1.SubnetStatus{{Name: "a", CIDR: "10.1.0.0/16"}}, false},
	} {
		t.Run(name, func(t *testing.T) {
			s := runtime.NewScheme()
			if err := v1alpha1.AddToScheme(s); err != nil {
				t.Fatal(err)
			}
			o := network("other", x.cidr, x.at)
			o.Status.Phase, o.Status.Subnets = x.phase, x.subnets
			n := network("mine", "10.0.4.0/24", now)
			r := &networks{base: base{client: fake.NewClientBuilder().WithScheme(s).WithObjects(o, n).Build()}}
			f, err := r.routed(t.Context(), n, subnet.Normalise(n.Spec, nil))
			if err != nil || (f != nil) != x.want {
				t.Errorf("%v, %+v", err, f)
			}
			// What n has routes to already it keeps; a range more is asked for anew.
			n.Status.HostAccess, n.Status.Subnets = v1alpha1.HostRouted, subnet.Normalise(n.Spec, nil)
			if f, err := r.routed(t.Context(), n, n.Status.Subnets); err != nil || f != nil {
				t.Errorf("%v, %+v", err, f)
			}
			n.Spec.Subnets["b"] = v1alpha1.Subnet{CIDR: "10.0.5.0/24"}
			if f, err := r.routed(t.Context(), n, subnet.Normalise(n.Spec, n.Status.Subnets)); err != nil || (f != nil) != x.want {
				t.Errorf("a range more: %v, %+v", err, f)
			}
		})
	}
}
