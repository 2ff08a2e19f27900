package controller

import (
	"net/netip"
	"strings"
	"testing"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	v1alpha1 "github.com/hypernetes/hypernetes/api/hypernetes/v1alpha1"
)

func TestChoose(t *testing.T) {
	pool := func(name string, def bool, tenants []string, addresses ...string) v1alpha1.AddressPool {
		return v1alpha1.AddressPool{ObjectMeta: metav1.ObjectMeta{Name: name}, Spec: v1alpha1.AddressPoolSpec{Addresses: addresses, Tenants: tenants, Default: def}}
	}
	all := []v1alpha1.AddressPool{
		pool("b", false, nil, "192.0.2.0/28"),
		pool("a", false, nil, "192.0.2.16/28"),
		pool("blues", false, []string{"blue"}, "198.51.100.0/28"),
		pool("reds", true, []string{"red"}, "203.0.113.0/28"),
		pool("six", false, nil, "2001:db8::/120"),
		pool("broken", true, nil, "x"),
	}
	for name, c := range map[string]struct {
		pools []v1alpha1.AddressPool
		wish  wish
		want  string // pool, or the reason of the refusal
	}{
		"by name":              {all, wish{tenant: "blue", pool: "blues"}, "blues"},
		"another's":            {all, wish{tenant: "blue", pool: "reds"}, "NoPool"},
		"nobody's namespace":   {all, wish{pool: "blues"}, "NoPool"},
		"none of the name":     {all, wish{tenant: "blue", pool: "x"}, "NoPool"},
		"unreadable":           {all, wish{tenant: "blue", pool: "broken"}, "NoPool"},
		"default":              {all, wish{tenant: "red"}, "reds"},
		"several":              {all, wish{tenant: "blue"}, "PoolAmbiguous"},
		"the only one":         {all[:1], wish{tenant: "blue"}, "b"},
		"the only one of IPv6": {all, wish{tenant: "blue", v6: true}, "six"},
		"no IPv6":              {all[:2], wish{tenant: "blue", v6: true}, "NoPool"},
		"none at all":          {nil, wish{tenant: "blue"}, "NoPool"},
		"by address":           {all, wish{tenant: "blue", address: netip.MustParseAddr("192.0.2.17")}, "a"},
		"another's address":    {all, wish{tenant: "blue", address: netip.MustParseAddr("203.0.113.2")}, "AddressNotInPool"},
		"address not of pool":  {all, wish{tenant: "blue", pool: "a", address: netip.MustParseAddr("192.0.2.2")}, "AddressNotInPool"},
	} {
		p, _, err := choose(c.pools, c.wish)
		got := ""
		if why, ok := asRefusal(err); ok {
			got = why.reason
			if strings.Contains(why.message, "reds") && c.wish.tenant != "red" && c.wish.pool != "reds" {
				t.Errorf("%s: tells of another tenant's pool: %s", name, why.message)
			}
		} else if err == nil {
			got = p.Name
		}
		if got != c.want {
			t.Errorf("%s: %s (%v), want %s", name, got, err, c.want)
		}
	}
}

func TestRequested(t *testing.T) {
	for name, c := range map[string]struct {
		annotation, field string
		want              int // addresses; -1 for a refusal
	}{
		"nothing":           {"", "", 0},
		"annotation":        {"192.0.2.1", "", 1},
		"field":             {"", "192.0.2.1", 1},
		"annotation wins":   {"192.0.2.1", "x", 1},
		"both families":     {"192.0.2.1, 2001:db8::1", "", 2},
		"two of one family": {"192.0.2.1,192.0.2.2", "", -1},
		"a name":            {"example.com", "", -1},
		"a network":         {"192.0.2.0/24", "", -1},
		"a zone":            {"fe80::1%eth0", "", -1},
	} {
		s := &corev1.Service{Spec: corev1.ServiceSpec{LoadBalancerIP: c.field}}
		if c.annotation != "" {
			s.Annotations = map[string]string{AnnotationAddress: c.annotation}
		}
		got, err := requested(s)
		if (err != nil) != (c.want < 0) || (err == nil && len(got) != c.want) {
			t.Errorf("%s: %v, %v", name, got, err)
		}
	}
}
