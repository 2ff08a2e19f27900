package policy

import (
	"fmt"
	"net/netip"
	"reflect"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
	networkingv1 "k8s.io/api/networking/v1"
	"sigs.k8s.io/yaml"
)

// model is a Network like upstream's: namespaces x, y, z with Pods a, b, c each, which
// listen on 80 (called serve-80) and 81 (serve-81, on b another number: 8181).
func model() State {
	s := State{Namespaces: map[string]map[string]string{
		"kube-system": {"kubernetes.io/metadata.name": "kube-system"},
	}}
	for i, ns := range []string{"x", "y", "z"} {
		s.Namespaces[ns] = map[string]string{"ns": ns, "kubernetes.io/metadata.name": ns}
		for j, name := range []string{"a", "b", "c"} {
			p := Pod{Namespace: ns, Name: name, Labels: map[string]string{"pod": name},
				Addresses: []netip.Addr{
					netip.AddrFrom4([4]byte{10, 0, byte(i), byte(10 + j)}),
					netip.MustParseAddr(fmt.Sprintf("fd00::%d:%d", i, 10+j)),
				},
				Ports: []NamedPort{{"serve-80", unix.IPPROTO_TCP, 80}, {"serve-81", unix.IPPROTO_TCP, 81}, {"dns", unix.IPPROTO_UDP, 80}},
			}
			if name == "b" {
				p.Ports[1].Port = 8181
			}
			s.Pods = append(s.Pods, p)
		}
	}
	s.Pods = append(s.Pods, Pod{Namespace: "kube-system", Name: "dns", Labels: map[string]string{"k8s-app": "kube-dns"},
		Addresses: []netip.Addr{netip.MustParseAddr("10.96.0.10"), netip.MustParseAddr("fd00:96::a")},
		Ports:     []NamedPort{{"dns", unix.IPPROTO_UDP, 53}}})
	return s
}

// pod finds one of the model, or makes an address outside of it.
func (s State) pod(t testing.TB, key string) Pod {
	t.Helper()
	if a, err := netip.ParseAddr(key); err == nil {
		return Pod{Addresses: []netip.Addr{a}}
	}
	for _, p := range s.Pods {
		if p.Namespace+"/"+p.Name == key {
			return p
		}
	}
	t.Fatalf("no pod %s", key)
	return Pod{}
}

func parse(t testing.TB, texts ...string) []*networkingv1.NetworkPolicy {
	t.Helper()
	var out []*networkingv1.NetworkPolicy
	for i, text := range texts {
		np := &networkingv1.NetworkPolicy{}
		if err := yaml.Unmarshal([]byte(text), np); err != nil {
			t.Fatalf("%v\n%s", err, text)
		}
		if np.Namespace == "" {
			np.Namespace = "x"
		}
		if np.Name == "" {
			np.Name = fmt.Sprintf("p%d", i+1)
		}
		out = append(out, np)
	}
	return out
}

// TestSemantics has the corner cases of upstream's suite. A check is "from to port want",
// port being 80, 80/udp or 80/sctp.
func TestSemantics(t *testing.T) {
	for name, c := range map[string]struct {
		policies []string
		checks   []string
	}{
		"no policy": {nil, []string{"x/a y/b 80 +", "8.8.8.8 x/a 80 +", "x/a 8.8.8.8 53/udp +"}},
		"deny all ingress": {[]string{`spec: {podSelector: {}}`},
			[]string{"x/b x/a 80 -", "y/a x/a 80/udp -", "x/a y/a 80 +", "x/a x/a 80 +", "8.8.8.8 x/a 80 -"}},
		"deny all egress": {[]string{`spec: {podSelector: {}, policyTypes: [Egress]}`},
			[]string{"x/b x/a 80 -", "y/a x/a 80 +", "x/a y/a 80 -", "x/a kube-system/dns 53/udp -"}},
		"deny both": {[]string{`spec: {podSelector: {}, policyTypes: [Ingress, Egress]}`},
			[]string{"y/a x/a 80 -", "x/a y/a 80 -", "x/c x/c 80 +"}},
		"egress rules without policyTypes isolate both ways": {[]string{`spec: {podSelector: {}, egress: [{}]}`},
			[]string{"x/a y/a 80 +", "y/a x/a 80 -"}},
		"ingress type alone does not isolate egress": {[]string{`spec: {podSelector: {}, policyTypes: [Ingress], egress: [{to: []}]}`},
			[]string{"x/a y/a 80 +", "y/a x/a 80 -"}},
		"egress type alone ignores ingress rules": {[]string{`spec: {podSelector: {}, policyTypes: [Egress], ingress: [{}]}`},
			[]string{"x/a y/a 80 -", "y/a x/a 80 +"}},
		"an empty rule allows everything": {[]string{`spec: {podSelector: {}, ingress: [{}]}`},
			[]string{"y/a x/a 80 +", "8.8.8.8 x/a 7/sctp +", "2001:db8::1 x/a 80 +"}},
		"empty from and ports allow everything": {[]string{`spec: {podSelector: {}, ingress: [{from: [], ports: []}]}`},
			[]string{"y/a x/a 80 +", "8.8.8.8 x/a 80 +"}},
		"an empty list of rules allows nothing": {[]string{`spec: {podSelector: {}, ingress: []}`},
			[]string{"y/a x/a 80 -"}},
		"selects one Pod": {[]string{`spec: {podSelector: {matchLabels: {pod: a}}}`},
			[]string{"y/a x/a 80 -", "y/a x/b 80 +", "y/b y/a 80 +"}},
		"podSelector means the policy's namespace": {[]string{`spec: {podSelector: {matchLabels: {pod: a}}, ingress: [{from: [{podSelector: {matchLabels: {pod: b}}}]}]}`},
			[]string{"x/b x/a 80 +", "y/b x/a 80 -", "x/c x/a 80 -"}},
		"an empty podSelector as peer is the namespace": {[]string{`spec: {podSelector: {}, ingress: [{from: [{podSelector: {}}]}]}`},
			[]string{"x/b x/a 80 +", "y/b x/a 80 -", "8.8.8.8 x/a 80 -"}},
		"namespaceSelector": {[]string{`spec: {podSelector: {}, ingress: [{from: [{namespaceSelector: {matchLabels: {ns: "y"}}}]}]}`},
			[]string{"y/a x/a 80 +", "y/c x/a 80 +", "z/a x/a 80 -", "x/b x/a 80 -"}},
		"an empty namespaceSelector is all Pods, not all addresses": {[]string{`spec: {podSelector: {}, ingress: [{from: [{namespaceSelector: {}}]}]}`},
			[]string{"y/a x/a 80 +", "x/b x/a 80 +", "8.8.8.8 x/a 80 -"}},
		"both selectors in one peer are and": {[]string{`spec: {podSelector: {}, ingress: [{from: [{namespaceSelector: {matchLabels: {ns: "y"}}, podSelector: {matchLabels: {pod: b}}}]}]}`},
			[]string{"y/b x/a 80 +", "y/a x/a 80 -", "x/b x/a 80 -", "z/b x/a 80 -"}},
		"both selectors in two peers are or": {[]string{`spec: {podSelector: {}, ingress: [{from: [{namespaceSelector: {matchLabels: {ns: "y"}}}, {podSelector: {matchLabels: {pod: b}}}]}]}`},
			[]string{"y/b x/a 80 +", "y/a x/a 80 +", "x/b x/a 80 +", "z/b x/a 80 -", "x/c x/a 80 -"}},
		"matchExpressions": {[]string{`spec: {podSelector: {matchExpressions: [{key: pod, operator: In, values: [a, b]}]}, ingress: [{from: [{namespaceSelector: {matchExpressions: [{key: ns, operator: NotIn, values: [x]}]}, podSelector: {matchExpressions: [{key: pod, operator: Exists}]}}]}]}`},
			[]string{"y/a x/a 80 +", "x/c x/a 80 -", "x/b x/c 80 +", "kube-system/dns x/a 80 -"}},
		"NotIn matches what lacks the label": {[]string{`spec: {podSelector: {}, ingress: [{from: [{namespaceSelector: {matchExpressions: [{key: ns, operator: NotIn, values: [x]}]}}]}]}`},
			[]string{"kube-system/dns x/a 80 +", "x/b x/a 80 -"}},
		"the namespace's own name as a label": {[]string{`spec: {podSelector: {}, egress: [{to: [{namespaceSelector: {matchLabels: {kubernetes.io/metadata.name: kube-system}}, podSelector: {matchLabels: {k8s-app: kube-dns}}}], ports: [{protocol: UDP, port: 53}]}], policyTypes: [Egress]}`},
			[]string{"x/a kube-system/dns 53/udp +", "x/a kube-system/dns 53 -", "x/a y/a 53/udp -"}},
		"ports": {[]string{`spec: {podSelector: {}, ingress: [{ports: [{port: 80}]}]}`},
			[]string{"y/a x/a 80 +", "y/a x/a 81 -", "y/a x/a 80/udp -", "y/a x/a 80/sctp -"}},
		"a protocol without a port": {[]string{`spec: {podSelector: {}, ingress: [{ports: [{protocol: UDP}]}]}`},
			[]string{"y/a x/a 1/udp +", "y/a x/a 65535/udp +", "y/a x/a 80 -"}},
		"SCTP": {[]string{`spec: {podSelector: {}, ingress: [{ports: [{protocol: SCTP, port: 80}]}]}`},
			[]string{"y/a x/a 80/sctp +", "y/a x/a 80 -"}},
		"several ports and peers": {[]string{`spec: {podSelector: {}, ingress: [{from: [{podSelector: {}}, {namespaceSelector: {matchLabels: {ns: z}}}], ports: [{port: 80}, {protocol: UDP, port: 81}]}]}`},
			[]string{"x/b x/a 80 +", "z/b x/a 81/udp +", "z/b x/a 81 -", "y/b x/a 80 -"}},
		"rules are not mixed": {[]string{`spec: {podSelector: {}, ingress: [{from: [{namespaceSelector: {matchLabels: {ns: "y"}}}], ports: [{port: 80}]}, {from: [{namespaceSelector: {matchLabels: {ns: z}}}], ports: [{port: 81}]}]}`},
			[]string{"y/a x/a 80 +", "y/a x/a 81 -", "z/a x/a 81 +", "z/a x/a 80 -"}},
		"policies add up": {[]string{
			`spec: {podSelector: {}}`,
			`spec: {podSelector: {matchLabels: {pod: a}}, ingress: [{ports: [{port: 80}]}]}`,
			`spec: {podSelector: {matchLabels: {pod: a}}, ingress: [{ports: [{port: 81}]}]}`},
			[]string{"y/a x/a 80 +", "y/a x/a 81 +", "y/a x/a 82 -", "y/a x/b 80 -"}},
		"both sides must agree": {[]string{
			`spec: {podSelector: {}, policyTypes: [Egress], egress: [{to: [{namespaceSelector: {matchLabels: {ns: "y"}}}]}]}`,
			`{metadata: {namespace: "y"}, spec: {podSelector: {matchLabels: {pod: a}}, ingress: [{from: [{namespaceSelector: {matchLabels: {ns: z}}}]}]}}`},
			[]string{"x/a y/b 80 +", "x/a y/a 80 -", "z/a y/a 80 +", "x/a z/a 80 -"}},
		"named port": {[]string{`spec: {podSelector: {}, ingress: [{ports: [{port: serve-81}]}]}`},
			[]string{"y/a x/a 81 +", "y/a x/a 8181 -", "y/a x/b 8181 +", "y/a x/b 81 -", "y/a x/a 80 -"}},
		"named port of egress is the destination's": {[]string{`spec: {podSelector: {}, policyTypes: [Egress], egress: [{ports: [{port: serve-81}]}]}`},
			[]string{"x/a y/a 81 +", "x/a y/b 8181 +", "x/a y/b 81 -", "x/a 8.8.8.8 81 -"}},
		"named port has a protocol": {[]string{`spec: {podSelector: {}, ingress: [{ports: [{port: dns}]}, {ports: [{protocol: UDP, port: serve-80}]}]}`},
			[]string{"y/a x/a 80/udp -", "y/a x/a 80 -"}},
		"an unknown name allows nothing": {[]string{`spec: {podSelector: {}, ingress: [{ports: [{port: nobody}]}]}`},
			[]string{"y/a x/a 80 -"}},
		"named and numbered": {[]string{`spec: {podSelector: {}, ingress: [{from: [{namespaceSelector: {}}], ports: [{port: serve-80}, {port: 82}]}]}`},
			[]string{"y/a x/a 80 +", "y/a x/a 82 +", "y/a x/a 81 -"}},
		"endPort": {[]string{`spec: {podSelector: {}, ingress: [{ports: [{port: 80, endPort: 90}]}]}`},
			[]string{"y/a x/a 80 +", "y/a x/a 90 +", "y/a x/a 91 -", "y/a x/a 79 -", "y/a x/a 85/udp -"}},
		"ranges that overlap": {[]string{`spec: {podSelector: {}, ingress: [{ports: [{port: 80, endPort: 90}, {port: 85, endPort: 95}, {port: 96}, {protocol: UDP, port: 80, endPort: 80}]}]}`},
			[]string{"y/a x/a 88 +", "y/a x/a 95 +", "y/a x/a 96 +", "y/a x/a 97 -", "y/a x/a 80/udp +", "y/a x/a 81/udp -"}},
		"ipBlock": {[]string{`spec: {podSelector: {}, ingress: [{from: [{ipBlock: {cidr: 8.8.0.0/16}}]}]}`},
			[]string{"8.8.8.8 x/a 80 +", "8.9.0.0 x/a 80 -", "8.7.255.255 x/a 80 -", "y/a x/a 80 -"}},
		"ipBlock with exceptions": {[]string{`spec: {podSelector: {}, egress: [{to: [{ipBlock: {cidr: 0.0.0.0/0, except: [10.0.0.0/8, 8.8.8.8/32, 255.255.255.255/32, 0.0.0.0/32]}}]}]}`},
			[]string{"x/a 8.8.8.7 80 +", "x/a 8.8.8.8 80 -", "x/a 8.8.8.9 80 +", "x/a y/a 80 -", "x/a 255.255.255.254 80 +", "x/a 255.255.255.255 80 -", "x/a 11.0.0.0 80 +", "x/a 9.255.255.255 80 +"}},
		"ipBlock means Pods' addresses too": {[]string{`spec: {podSelector: {}, egress: [{to: [{ipBlock: {cidr: 10.0.1.0/24, except: [10.0.1.10/32]}}]}]}`},
			[]string{"x/a y/b 80 +", "x/a y/a 80 -"}},
		"an exception of one block is no exception of another": {[]string{`spec: {podSelector: {}, egress: [{to: [{ipBlock: {cidr: 10.0.1.0/24, except: [10.0.1.10/32]}}, {ipBlock: {cidr: 10.0.1.10/32}}]}]}`},
			[]string{"x/a y/a 80 +"}},
		"an exception is no denial of what another rule allows": {[]string{`spec: {podSelector: {}, egress: [{to: [{ipBlock: {cidr: 10.0.1.0/24, except: [10.0.1.10/32]}}]}, {to: [{namespaceSelector: {matchLabels: {ns: "y"}}}], ports: [{port: 80}]}]}`},
			[]string{"x/a y/a 80 +", "x/a y/a 81 -", "x/a y/b 81 +"}},
		"IPv6 block": {[]string{`spec: {podSelector: {}, ingress: [{from: [{ipBlock: {cidr: "2001:db8::/32", except: ["2001:db8:1::/48"]}}]}]}`},
			[]string{"2001:db8::1 x/a 80 +", "2001:db8:1::1 x/a 80 -", "2001:db9:: x/a 80 -", "8.8.8.8 x/a 80 -"}},
		"all of IPv6 but one": {[]string{`spec: {podSelector: {}, ingress: [{from: [{ipBlock: {cidr: "::/0", except: ["2001:db8::/128"]}}]}]}`},
			[]string{"2001:db8::1 x/a 80 +", "2001:db8:: x/a 80 -", "ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff x/a 80 +", "8.8.8.8 x/a 80 -"}},
		"host bits in a block": {[]string{`spec: {podSelector: {}, ingress: [{from: [{ipBlock: {cidr: 8.8.8.8/16}}]}]}`},
			[]string{"8.8.1.1 x/a 80 +"}},
		"named port and block": {[]string{`spec: {podSelector: {}, policyTypes: [Egress], egress: [{to: [{ipBlock: {cidr: 10.0.1.0/24}}], ports: [{port: serve-81}]}]}`},
			[]string{"x/a y/b 8181 +", "x/a y/b 81 -", "x/a z/b 8181 -"}},

		// Mistakes allow less, never more.
		"bad podSelector isolates the namespace": {[]string{`spec: {podSelector: {matchExpressions: [{key: pod, operator: Near, values: [a]}]}, ingress: [{}]}`},
			[]string{"y/a x/a 80 -", "y/a x/c 80 -", "x/a y/a 80 +"}},
		"bad peer selector": {[]string{`spec: {podSelector: {}, ingress: [{from: [{podSelector: {matchLabels: {"not a key!": a}}}]}]}`},
			[]string{"y/a x/a 80 -", "x/b x/a 80 -"}},
		"bad peer beside a good one": {[]string{`spec: {podSelector: {}, ingress: [{from: [{ipBlock: {cidr: nonsense}}, {namespaceSelector: {matchLabels: {ns: "y"}}}]}]}`},
			[]string{"y/a x/a 80 +", "z/a x/a 80 -"}},
		"bad exception": {[]string{`spec: {podSelector: {}, ingress: [{from: [{ipBlock: {cidr: 8.8.0.0/16, except: [8.8]}}]}]}`},
			[]string{"8.8.8.8 x/a 80 -"}},
		"empty peer": {[]string{`spec: {podSelector: {}, ingress: [{from: [{}]}]}`}, []string{"y/a x/a 80 -"}},
		"bad ports are not all ports": {[]string{`spec: {podSelector: {}, ingress: [{ports: [{port: 0}, {port: 90, endPort: 80}, {endPort: 80}, {port: serve-80, endPort: 90}, {protocol: ICMP}, {port: 70000}, {port: ""}]}]}`},
			[]string{"y/a x/a 80 -", "y/a x/a 90 -", "y/a x/a 81 -"}},
		"unknown policyType isolates both": {[]string{`spec: {podSelector: {}, policyTypes: [Sideways]}`},
			[]string{"y/a x/a 80 -", "x/a y/a 80 -"}},
		"ipBlock beside a selector": {[]string{`spec: {podSelector: {}, ingress: [{from: [{ipBlock: {cidr: 0.0.0.0/0}, podSelector: {}}]}]}`},
			[]string{"y/a x/a 80 -"}},
	} {
		t.Run(name, func(t *testing.T) {
			s := model()
			s.Policies = parse(t, c.policies...)
			for _, check := range c.checks {
				var from, to, on, want string
				if n, err := fmt.Sscan(check, &from, &to, &on, &want); n != 4 {
					t.Fatal(check, err)
				}
				protocol, port := uint8(unix.IPPROTO_TCP), uint16(0)
				number, kind, _ := strings.Cut(on, "/")
				fmt.Sscan(number, &port)
				switch kind {
				case "udp":
					protocol = unix.IPPROTO_UDP
				case "sctp":
					protocol = unix.IPPROTO_SCTP
				}
				v, err := Evaluate(s, s.pod(t, from), s.pod(t, to), protocol, port)
				if err != nil {
					t.Fatal(check, err)
				}
				// Both families differ in ipBlock cases only, where IPv4 is what is asked for.
				if v.Allowed != (want == "+") {
					t.Errorf("%s: %+v", check, v)
				}
			}
			problems, err := Problems(s)
			if err != nil {
				t.Fatal(err)
			}
			if bad := strings.Contains(name, "bad") || strings.Contains(name, "unknown policyType") || strings.Contains(name, "empty peer") || strings.Contains(name, "beside"); bad != (len(problems) > 0) {
				t.Errorf("problems: %v", problems)
			}
		})
	}
}

func TestWords(t *testing.T) {
	s := model()
	s.Policies = parse(t,
		`{metadata: {name: deny}, spec: {podSelector: {}}}`,
		`{metadata: {name: web}, spec: {podSelector: {matchLabels: {pod: a}}, ingress: [{ports: [{port: 81}]}, {from: [{podSelector: {}}], ports: [{port: 80}]}]}}`,
		`{metadata: {name: v4}, spec: {podSelector: {matchLabels: {pod: c}}, ingress: [{from: [{ipBlock: {cidr: 10.0.0.0/8}}]}]}}`)
	s.Hosts = []netip.Addr{netip.MustParseAddr("169.254.7.1")}
	for _, c := range []struct {
		from, to string
		want     Verdict
	}{
		{"x/b", "x/a", Verdict{true, "no policy selects it", "policy x/web, ingress rule 2"}},
		{"y/b", "x/a", Verdict{false, "no policy selects it", "isolated by x/deny, x/web: no rule allows it"}},
		{"x/a", "y/a", Verdict{true, "no policy selects it", "no policy selects it"}},
		{"x/a", "x/a", Verdict{true, "a Pod may always reach itself", "a Pod may always reach itself"}},
		{"y/a", "x/c", Verdict{true, "no policy selects it", "IPv4: policy x/v4, ingress rule 1; IPv6: isolated by x/deny, x/v4: no rule allows it"}},
		{"169.254.7.1", "x/a", Verdict{true, "outside the Network", "from the Pod's own node, which policies do not bind"}},
		{"x/a", "9.9.9.9", Verdict{true, "no policy selects it", "outside the Network"}},
	} {
		v, err := Evaluate(s, s.pod(t, c.from), s.pod(t, c.to), unix.IPPROTO_TCP, 80)
		if err != nil || v != c.want {
			t.Errorf("%s to %s: %+v %v, want %+v", c.from, c.to, v, err, c.want)
		}
	}
	if _, err := Evaluate(s, s.pod(t, "8.8.8.8"), s.pod(t, "::1"), unix.IPPROTO_TCP, 80); !errdefs.IsFailedPrecondition(err) {
		t.Errorf("no family in common: %v", err)
	}
}

func TestProblemsSayFieldAndValue(t *testing.T) {
	s := model()
	s.Policies = parse(t, `{metadata: {name: broken}, spec: {podSelector: {}, ingress: [{from: [{ipBlock: {cidr: 10.0.0.0/33}}], ports: [{port: 90, endPort: 80}]}]}}`)
	got, err := Problems(s)
	want := []Problem{
		{"x/broken", "spec.ingress[0].ports[0].endPort 80: want 90 to 65535; the port is left out"},
		{"x/broken", `spec.ingress[0].from[0].ipBlock.cidr "10.0.0.0/33": want a network like 10.0.0.0/8; the peer is left out`},
	}
	if err != nil || !reflect.DeepEqual(got, want) {
		t.Errorf("%v %v", got, err)
	}
}

func TestBounds(t *testing.T) {
	s := model()
	s.Pods[0].Links = []string{"sixteen-letters-"}
	if _, err := compile(s); !errdefs.IsInvalidArgument(err) || !strings.Contains(err.Error(), "pod x/a: link") {
		t.Errorf("long link: %v", err)
	}
	s.Pods[0].Links, s.Pods[1].Links = []string{"l"}, []string{"l"}
	if _, err := compile(s); !errdefs.IsInvalidArgument(err) {
		t.Errorf("one link for two pods: %v", err)
	}

	// One policy with too much denies; many of them are refused.
	s = model()
	big := parse(t, `{metadata: {name: big}, spec: {podSelector: {}}}`)[0]
	var r networkingv1.NetworkPolicyIngressRule
	for i := range maxPolicyRules {
		np := parse(t, fmt.Sprintf(`spec: {ingress: [{from: [{podSelector: {matchLabels: {n: "%d"}}}]}]}`, i%3))[0]
		np.Spec.Ingress[0].From[0].PodSelector.MatchLabels["n"] = fmt.Sprint(i)
		r.From = append(r.From, np.Spec.Ingress[0].From...)
	}
	big.Spec.Ingress = []networkingv1.NetworkPolicyIngressRule{r, {}}
	s.Policies = []*networkingv1.NetworkPolicy{big, nil}
	v, err := Evaluate(s, s.pod(t, "y/a"), s.pod(t, "x/a"), unix.IPPROTO_TCP, 80)
	if err != nil || v.Allowed {
		t.Errorf("a policy beyond bounds: %+v %v", v, err)
	}
	if p, _ := Problems(s); len(p) != 1 || !strings.Contains(p[0].Message, "at most 4096") {
		t.Errorf("%v", p)
	}
	half := big.DeepCopy()
	half.Spec.Ingress[0].From = half.Spec.Ingress[0].From[:maxPolicyRules/2-1]
	s.Policies = nil
	for i := range 20 {
		np := half.DeepCopy()
		np.Name = fmt.Sprint("many", i)
		s.Policies = append(s.Policies, np)
	}
	if _, err := compile(s); !errdefs.IsResourceExhausted(err) {
		t.Errorf("a State beyond bounds: %v", err)
	}
}

// TestSharing: cost grows with policies, not with Pods.
func TestSharing(t *testing.T) {
	s := model()
	s.Policies = parse(t, `spec: {podSelector: {}, ingress: [{from: [{podSelector: {}}], ports: [{port: serve-80}]}]}`,
		`spec: {podSelector: {}, ingress: [{from: [{podSelector: {}}], ports: [{port: serve-80}]}]}`)
	count := func(n int) (chains, sets int) {
		s := s
		s.Pods = nil
		for i := range n {
			s.Pods = append(s.Pods, Pod{Namespace: "x", Name: fmt.Sprint(i), Links: []string{fmt.Sprint("l", i)},
				Addresses: []netip.Addr{netip.AddrFrom4([4]byte{10, 0, byte(i >> 8), byte(i)})}})
		}
		p, err := compile(s)
		if err != nil {
			t.Fatal(err)
		}
		r := render(p, s)
		if got := len(r.sets[mapIngress].elements); got != n {
			t.Errorf("%d links of %d", got, n)
		}
		return len(r.chains), len(r.sets)
	}
	c1, s1 := count(1)
	c2, s2 := count(1000)
	if c1 != c2 || s1 != s2 || c1 != 3+1+2 {
		t.Errorf("%d chains and %d sets for one Pod, %d and %d for 1000", c1, s1, c2, s2)
	}
}

func FuzzCompile(f *testing.F) {
	f.Add("spec: {podSelector: {}, ingress: [{from: [{ipBlock: {cidr: 0.0.0.0/0, except: [10.0.0.0/8]}}], ports: [{port: 1, endPort: 2}]}]}")
	f.Add("spec: {podSelector: {matchExpressions: [{key: a, operator: In, values: [b]}]}, egress: [{to: [{namespaceSelector: {}}], ports: [{port: web}]}]}")
	f.Add(`spec: {podSelector: {}, ingress: [{from: [{ipBlock: {cidr: "::/0", except: ["ffff::/16", "::ffff:1.2.3.4/128"]}}]}]}`)
	f.Fuzz(func(t *testing.T, text string) {
		np := &networkingv1.NetworkPolicy{}
		if yaml.Unmarshal([]byte(text), np) != nil {
			return
		}
		np.Namespace = "x"
		s := model()
		for i := range s.Pods {
			s.Pods[i].Links = []string{fmt.Sprint("l", i)}
		}
		s.Policies = []*networkingv1.NetworkPolicy{np}
		p, err := compile(s)
		if err != nil {
			return
		}
		r := render(p, s)
		for name, c := range r.chains {
			if len(name) > 120 || strings.ContainsAny(name, "\x00\n") {
				t.Errorf("chain %q", name)
			}
			if len(c.rules) != len(c.comments) {
				t.Errorf("chain %s: %d rules, %d comments", name, len(c.rules), len(c.comments))
			}
		}
		for name, set := range p.sets {
			for i, b := range set.blocks {
				if b.to.Less(b.from) || i > 0 && !set.blocks[i-1].to.Next().Less(b.from) {
					t.Errorf("set %s: %v", name, set.blocks)
				}
			}
		}
		if _, err := Evaluate(s, s.Pods[0], s.Pods[4], unix.IPPROTO_TCP, 80); err != nil {
			t.Error(err)
		}
	})
}
