package ipam

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"strings"
	"sync"
	"testing"

	"github.com/containerd/errdefs"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/client/fake"
	"sigs.k8s.io/controller-runtime/pkg/client/interceptor"

	v1alpha1 "github.com/hypernetes/hypernetes/api/hypernetes/v1alpha1"
)

func subnet(index int, cidr, gateway string) Subnet {
	return Subnet{Index: index, Prefix: netip.MustParsePrefix(cidr), Gateway: netip.MustParseAddr(gateway)}
}

var layouts = map[string][]Subnet{
	"v4":                   {subnet(0, "192.168.0.0/29", "192.168.0.1")},
	"v4 other gateway":     {subnet(0, "192.168.0.0/28", "192.168.0.9")},
	"two v4":               {subnet(1, "10.0.0.0/29", "10.0.0.6"), subnet(0, "10.1.0.0/28", "10.1.0.1")},
	"v6":                   {subnet(0, "fd00::/112", "fd00::1")},
	"dual":                 {subnet(0, "10.0.0.0/26", "10.0.0.1"), subnet(1, "fd00::/64", "fd00::1")},
	"dual, v6 first":       {subnet(3, "fd00::/112", "fd00::2003"), subnet(2, "10.0.0.0/26", "10.0.0.1"), subnet(1, "10.0.1.0/29", "10.0.1.2")},
	"dual, v4 beyond v6":   {subnet(0, "10.0.0.0/16", "10.0.0.1"), subnet(1, "fd00::/112", "fd00::1")},
	"dual, several v6":     {subnet(0, "10.0.0.0/27", "10.0.0.1"), subnet(1, "fd01::/112", "fd01::5"), subnet(2, "fd02::/64", "fd02::1")},
	"gateway far up in v6": {subnet(0, "10.0.0.0/27", "10.0.0.1"), subnet(1, "fd01::/64", "fd01::ffff:ffff:ffff:ffff")},
}

// Every address of a layout is given out once, none is reserved, and then it is said that
// there is no more.
func TestChooseGivesEachOnce(t *testing.T) {
	for name, subnets := range layouts {
		t.Run(name, func(t *testing.T) {
			r := rand.New(rand.NewPCG(1, 2))
			taken := map[netip.Addr]bool{}
			limit := 5000
			n := 0
			for ; n < limit; n++ {
				got, err := Choose(subnets, func(a netip.Addr) bool { return taken[a] }, r)
				if err != nil {
					var exhausted ErrExhausted
					if !errors.As(err, &exhausted) || !errors.Is(err, errdefs.ErrResourceExhausted) {
						t.Fatal(err)
					}
					first, _ := families(subnets)
					for _, s := range first {
						if !strings.Contains(err.Error(), s.Prefix.String()) {
							t.Errorf("%q does not name %s", err, s.Prefix)
						}
					}
					break
				}
				seen := map[bool]bool{}
				for _, a := range got {
					if taken[a] {
						t.Fatalf("%s a second time", a)
					}
					taken[a] = true
					s, ok := find(subnets, a)
					if !ok || a == s.Gateway || reserved(s, a) {
						t.Fatalf("%s was given out", a)
					}
					if seen[a.Is4()] {
						t.Fatalf("two of one family: %v", got)
					}
					seen[a.Is4()] = true
				}
				again, err := Request(subnets, got[:1])
				if err != nil || fmt.Sprint(again) != fmt.Sprint(got) {
					t.Fatalf("Request(%v) = %v, %v; chosen %v", got[:1], again, err, got)
				}
				if len(got) == 2 {
					if again, err = Request(subnets, got[1:]); err == nil && fmt.Sprint(again) != fmt.Sprint(got) {
						t.Fatalf("Request(%v) = %v; chosen %v", got[1:], again, got)
					}
				}
			}
			if c := Capacity(subnets); n < limit && c != n && len(subnets) < 3 {
				t.Errorf("Capacity %d, given out %d", c, n)
			}
		})
	}
}

func TestDerived(t *testing.T) {
	for _, c := range []struct {
		subnets    []Subnet
		want, have string
	}{
		{layouts["dual"], "10.0.0.5", "[10.0.0.5 fd00::5]"},
		{layouts["dual"], "fd00::5", "[10.0.0.5 fd00::5]"},
		{layouts["dual, v6 first"], "10.0.0.5", "[10.0.0.5 fd00::2005]"},
		{layouts["dual, v6 first"], "10.0.1.3", "[10.0.1.3 fd00::1003]"},
		{layouts["dual, v6 first"], "10.0.0.3", "no IPv6 address follows"},
		{layouts["dual, v4 beyond v6"], "10.0.17.1", "no IPv6 address follows"},
		{layouts["dual"], "fd00::1:0:0:5", "follows from none"},
		{layouts["dual"], "10.0.0.1", "is the gateway of 10.0.0.0/26"},
		{layouts["dual"], "10.0.0.63", "is reserved in 10.0.0.0/26"},
		{layouts["dual"], "10.0.0.0", "is reserved"},
		{layouts["dual"], "10.9.0.0", "not in a subnet of the network (10.0.0.0/26, fd00::/64)"},
		{layouts["dual"], "10.0.0.5 fd00::6", "goes with fd00::5"},
		{layouts["dual"], "10.0.0.5 10.0.0.6", "at most one of each family"},
		{layouts["v6"], "fd00::ffff", "[fd00::ffff]"},
		{layouts["v6"], "fd00::", "is reserved"},
	} {
		var want []netip.Addr
		for _, s := range strings.Fields(c.want) {
			want = append(want, netip.MustParseAddr(s))
		}
		got, err := Request(c.subnets, want)
		if text := fmt.Sprint(got); err != nil {
			if !strings.Contains(err.Error(), c.have) || !errdefs.IsInvalidArgument(err) {
				t.Errorf("%s: %v, want %s", c.want, err, c.have)
			}
		} else if text != c.have {
			t.Errorf("%s: %s, want %s", c.want, text, c.have)
		}
	}
}

func TestMAC(t *testing.T) {
	a, b := MAC("tenant-a/default", netip.MustParseAddr("10.0.0.5")), MAC("tenant-b/default", netip.MustParseAddr("10.0.0.5"))
	if a.String() == b.String() || a[0]&3 != 2 || len(a) != 6 {
		t.Errorf("%s, %s", a, b)
	}
}

func network(cidr, gateway string) *v1alpha1.Network {
	n := &v1alpha1.Network{}
	n.Namespace, n.Name, n.UID = "tenant-a", "default", "uid-1"
	n.Status.Subnets = []v1alpha1.SubnetStatus{{Name: "s", CIDR: cidr, Gateway: gateway}}
	return n
}

func fakeClient(t *testing.T, funcs interceptor.Funcs) client.Client {
	t.Helper()
	s := runtime.NewScheme()
	if err := v1alpha1.AddToScheme(s); err != nil {
		t.Fatal(err)
	}
	return fake.NewClientBuilder().WithScheme(s).WithInterceptorFuncs(funcs).Build()
}

// Two nodes that know nothing of each other's claims fill a subnet without a double.
func TestClaimConcurrently(t *testing.T) {
	c, n := fakeClient(t, interceptor.Funcs{}), network("10.0.0.0/26", "10.0.0.1")
	var wg sync.WaitGroup
	var mu sync.Mutex
	seen := map[string]string{}
	for i := range 61 {
		wg.Add(1)
		go func() {
			defer wg.Done()
			node := fmt.Sprint("n", i%2)
			p, err := Claimer{Ports: c, Node: node}.Claim(t.Context(), Claim{Network: n, Pod: v1alpha1.PodRef{UID: fmt.Sprint(i)}})
			mu.Lock()
			defer mu.Unlock()
			if err != nil {
				t.Error(err)
			} else if seen[p.Name] != "" {
				t.Errorf("%s twice", p.Name)
			} else {
				seen[p.Name] = node
			}
		}()
	}
	wg.Wait()
	_, err := Claimer{Ports: c, Node: "n"}.Claim(t.Context(), Claim{Network: n})
	if !errors.As(err, new(ErrExhausted)) {
		t.Errorf("the 62nd: %v", err)
	}
}

func TestClaimRefusals(t *testing.T) {
	n := network("10.0.0.0/24", "10.0.0.1")
	c := fakeClient(t, interceptor.Funcs{})
	claimer := Claimer{Ports: c, Node: "n1"}
	pod := v1alpha1.PodRef{Namespace: "web", Name: "a", UID: "1", Sandbox: "s1", Interface: "eth0"}
	five := []netip.Addr{netip.MustParseAddr("10.0.0.5")}
	first, err := claimer.Claim(t.Context(), Claim{Network: n, Pod: pod, Addresses: five})
	if err != nil {
		t.Fatal(err)
	}
	again := pod
	again.Sandbox = "s2"
	second, err := claimer.Claim(t.Context(), Claim{Network: n, Pod: again, Addresses: five})
	if err != nil || second.UID != first.UID || second.Spec.Pod.Sandbox != "s2" {
		t.Errorf("the same Pod's next sandbox: %+v, %v", second, err)
	}
	other := v1alpha1.PodRef{Namespace: "web", Name: "b", UID: "2", Interface: "eth0"}
	if _, err = claimer.Claim(t.Context(), Claim{Network: n, Pod: other, Addresses: five}); !errdefs.IsAlreadyExists(err) || !strings.Contains(err.Error(), "web/a") {
		t.Errorf("another Pod: %v", err)
	}
	if _, err = claimer.Claim(t.Context(), Claim{Network: n, Pod: other, Port: "default.10-0-0-9"}); !errdefs.IsInvalidArgument(err) {
		t.Errorf("no such Port: %v", err)
	}
	held := &v1alpha1.Port{Spec: v1alpha1.PortSpec{Network: "default", Addresses: []string{"10.0.0.9"}, Retain: true}}
	held.Namespace, held.Name = "tenant-a", "default.10-0-0-9"
	if err := c.Create(t.Context(), held); err != nil {
		t.Fatal(err)
	}
	if p, err := claimer.Claim(t.Context(), Claim{Network: n, Pod: other, Port: held.Name}); err != nil || p.Spec.Node != "n1" || p.Spec.Pod.Name != "b" || p.Labels[v1alpha1.LabelNetwork] != "default" {
		t.Errorf("claimed beforehand: %+v, %v", p, err)
	}
	refusing := fakeClient(t, interceptor.Funcs{Create: func(context.Context, client.WithWatch, client.Object, ...client.CreateOption) error {
		return apierrors.NewForbidden(schema.GroupResource{Resource: "ports"}, "x", errors.New("exceeded quota: ports"))
	}})
	if _, err := (Claimer{Ports: refusing}).Claim(t.Context(), Claim{Network: n}); !errors.Is(err, ErrQuota) || !apierrors.IsForbidden(err) {
		t.Errorf("quota: %v", err)
	}
}
