package bench

import (
	"context"
	"encoding/json"
	"fmt"
	"net/netip"
	"path/filepath"
	"runtime"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/google/nftables"
	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	"sigs.k8s.io/controller-runtime/pkg/client"

	v1alpha1 "github.com/hypernetes/hypernetes/api/hypernetes/v1alpha1"
	"github.com/hypernetes/hypernetes/network/edge"
	"github.com/hypernetes/hypernetes/network/edge/edgetest"
	"github.com/hypernetes/hypernetes/network/netns"
	"github.com/hypernetes/hypernetes/network/policy"
	"github.com/hypernetes/hypernetes/network/service"
	"github.com/hypernetes/hypernetes/test/artifacts"
)

// fleetSizes are how many Services there are, one after the other.
var fleetSizes = []int{100, 1000, 5000}

// BenchmarkNetwork measures tenants' Networks beside what upstream does for one: see the
// package comment. Its parts are in the order in which the cluster grows, each with all
// Services made so far.
func BenchmarkNetwork(b *testing.B) {
	d := newBed(b)
	m := samples{}
	rounds := number("H8S_BENCH_ROUNDS", 5)
	at, load := time.Now(), loadAverage()
	d.benchmarkPods(m, 2*rounds)
	d.benchmarkMemory(m, 3, 10)
	d.benchmarkPlane(m, rounds)
	b.ReportMetric(0, "ns/op")
	b.ReportMetric(m.ratio("add further", "add ptp").median(), "add/ptp")
	b.ReportMetric(m.ratio("change ours 5000", "change proxy 5000").median(), "change/kube-proxy")
	b.ReportMetric(m.ratio("MB/s edge", "MB/s plain").median(), "edge/veth")
	b.ReportMetric(m.ratio("MB/s edge far", "MB/s plain").median(), "vxlan/veth")
	text, err := json.MarshalIndent(m, "", "  ")
	d.must(err)
	dir := filepath.Join(artifacts.Dir(), "bench")
	d.must(writeFile(filepath.Join(dir, "network.json"), append(text, '\n')))
	report := m.networkReport(fmt.Sprintf("%s, load at the start %s", machine(b.Context()), load), at, fleetSizes)
	d.must(writeFile(filepath.Join(dir, "network.md"), []byte(report)))
	b.Logf("%s", report)
}

// benchmarkPods measures how a Pod gets its network: the CNI plugins as a runtime calls
// them, and beneath ours what edge and policy do, without plugin, daemon and API server.
func (d *bed) benchmarkPods(m samples, rounds int) {
	d.b.Helper()
	d.upstreamPod(0, "warm").add()
	d.tenantPod(0, d.tenant("10.9.0.0/24"), "warm").add()
	node := d.rig.Nodes[2]
	d.direct(samples{}, node, 0)
	for i := range rounds {
		p := d.upstreamPod(0, fmt.Sprint("p", i))
		m.seconds("add ptp", p.add())
		namespace := d.tenant("10.9.0.0/24")
		first, second := d.tenantPod(0, namespace, "first"), d.tenantPod(0, namespace, "second")
		m.seconds("add first", first.add())
		m.seconds("add further", second.add())
		d.direct(m, node, i+1)
	}
}

// direct makes an edge and plugs two Pods in, as the daemon does.
func (d *bed) direct(m samples, node *edgetest.Node, i int) {
	d.b.Helper()
	ctx := d.b.Context()
	n := edgetest.Network{Spec: edge.Spec{
		ID: fmt.Sprintf("%08x", 0xbe000000+i), Name: "bench/direct", VNI: uint32(9000 + i), MTU: edgetest.MTU, Egress: true,
		Subnets: []netip.Prefix{netip.MustParsePrefix("10.9.0.0/24")}, Gateways: []netip.Addr{netip.MustParseAddr("10.9.0.1")},
		Local: []netip.Addr{netip.MustParseAddr("10.96.0.10")},
	}}
	var policies *policy.Table
	state := policy.State{Namespaces: map[string]map[string]string{"app": nil}}
	for j, name := range []string{"first", "further"} {
		ns := d.rig.Namespace(fmt.Sprintf("direct-%d-%d", i, j))
		ip := netip.AddrFrom4([4]byte{10, 9, 0, byte(j + 5)})
		a := edge.Attachment{
			Link: edge.LinkName(ns.Path(), "eth0"), NetNS: ns.Path(), Interface: "eth0", MTU: n.Spec.MTU, Default: true,
			MAC: []byte{0x0a, 0x58, 10, 9, 0, byte(j + 5)}, Addresses: []netip.Addr{ip}, Gateways: n.Spec.Gateways, Subnets: n.Spec.Subnets,
		}
		n.Spec.Ports = append(n.Spec.Ports, edge.Port{Addresses: a.Addresses, MAC: a.MAC, Node: node.Address, Link: a.Link})
		state.Pods = append(state.Pods, policy.Pod{Namespace: "app", Name: name, Addresses: a.Addresses, Links: []string{a.Link}})
		began := time.Now()
		e, err := node.Manager.Ensure(ctx, n.Spec)
		d.must(err)
		if policies == nil {
			policies, err = policy.Open(e.NS())
			d.must(err)
		}
		d.must(policies.Sync(ctx, state))
		d.must(e.Attach(ctx, a))
		d.must(e.Up(ctx, a.Link))
		m.seconds("direct "+name, time.Since(began))
	}
}

// benchmarkMemory measures what a Network with one Pod on a node costs that node, beside
// an empty namespace and a Pod of the ptp plugin, several at a time. The Pods' own
// namespaces are not part of it.
func (d *bed) benchmarkMemory(m samples, rounds, networks int) {
	d.b.Helper()
	per := func(name string, bytes int64) { m.megabytes(name, bytes/int64(networks)) }
	for i := range rounds {
		before := d.slab()
		for j := range networks {
			d.rig.Namespace(fmt.Sprintf("empty-%d-%d", i, j))
		}
		per("slab empty", d.slab()-before)
		// What can be made before is not in the difference.
		var pods, others []*netPod
		for j := range networks {
			others = append(others, d.upstreamPod(1, fmt.Sprintf("m%d-%d", i, j)))
		}
		before = d.slab()
		for _, p := range others {
			p.add()
		}
		per("slab ptp", d.slab()-before)
		for range networks {
			pods = append(pods, d.tenantPod(1, d.tenant("10.9.0.0/24"), "only"))
		}
		before = d.slab()
		daemon, err := pss(d.stacks[1].pid)
		d.must(err)
		for _, p := range pods {
			p.add()
		}
		per("slab network", d.slab()-before)
		after, err := pss(d.stacks[1].pid)
		d.must(err)
		per("pss network", after-daemon)
	}
}

// plane is what the Service benchmarks share.
type plane struct {
	near, far    *netPod // ours: on the first node and on the second
	from         *netPod
	upFrom       *netPod
	upNear       *netPod
	upFar        *netPod
	namespace    string
	edge         string // the Network's on the first node
	moved        bool   // far has another address by now
	ours, theirs *discoveryv1.EndpointSlice
}

// benchmarkPlane measures everything that depends on the number of Services: programming,
// memory, then traffic and names with all of them there.
func (d *bed) benchmarkPlane(m samples, rounds int) {
	d.b.Helper()
	was := d.stacks[0].edges()
	namespace := d.tenant("10.0.0.0/16")
	p := &plane{
		namespace: namespace,
		from:      d.tenantPod(0, namespace, "from"), near: d.tenantPod(0, namespace, "near"), far: d.tenantPod(1, namespace, "far"),
		upFrom: d.upstreamPod(0, "from"), upNear: d.upstreamPod(0, "near"), upFar: d.upstreamPod(1, "far"),
	}
	for _, pod := range []*netPod{p.from, p.near, p.far, p.upFrom, p.upNear, p.upFar} {
		pod.add()
	}
	for _, e := range d.stacks[0].edges() {
		if !slices.Contains(was, e) {
			p.edge = e
		}
	}
	d.namespace("up", nil)
	// Each side has one Service that the other does not see, to change it.
	ignored := map[string]string{v1alpha1.LabelServiceProxy: v1alpha1.ServiceProxy}
	var err error
	p.ours, err = d.endpointService(namespace, "change", "10.98.0.1", corev1.ProtocolTCP, 80, 8000, ignored, fleetEndpoints(60000)...)
	d.must(err)
	p.theirs, err = d.endpointService("up", "change", "10.98.0.2", corev1.ProtocolTCP, 80, 8000, nil, fleetEndpoints(60000)...)
	d.must(err)
	_, err = d.endpointService(namespace, "near", "10.98.1.1", corev1.ProtocolTCP, 80, 8000, ignored, p.near.Address)
	d.must(err)
	_, err = d.endpointService(namespace, "far", "10.98.1.2", corev1.ProtocolTCP, 80, 8000, ignored, p.far.Address)
	d.must(err)
	_, err = d.endpointService("up", "near", "10.98.2.1", corev1.ProtocolTCP, 80, 8000, nil, p.upNear.Address)
	d.must(err)
	_, err = d.endpointService("up", "far", "10.98.2.2", corev1.ProtocolTCP, 80, 8000, nil, p.upFar.Address)
	d.must(err)
	_, err = d.endpointService("up", "dns", "10.96.0.10", corev1.ProtocolUDP, 53, 53, nil, p.upNear.Address)
	d.must(err)
	made := 0
	for _, n := range fleetSizes {
		d.fleet(namespace, made, n)
		made = n
		d.benchmarkServices(m, p, n)
	}
	d.benchmarkTraffic(m, p, rounds)
	d.benchmarkNames(m, p, rounds)
}

func fleetEndpoints(i int) []netip.Addr {
	var out []netip.Addr
	for j := range endpointsEach {
		k := i*endpointsEach + j
		out = append(out, netip.AddrFrom4([4]byte{10, 0, byte(1 + k>>8%250), byte(k)}))
	}
	return out
}

// fleet makes Services number from to to-1.
func (d *bed) fleet(namespace string, from, to int) {
	d.b.Helper()
	var wg sync.WaitGroup
	const workers = 16
	errs := make([]error, workers)
	for w := range workers {
		wg.Go(func() {
			for i := from + w; i < to && errs[w] == nil; i += workers {
				ip := netip.AddrFrom4([4]byte{10, 97, byte(i >> 8), byte(i)})
				_, errs[w] = d.endpointService(namespace, fmt.Sprintf("s%05d", i), ip.String(), corev1.ProtocolTCP, 80, int32(8000+i%1000), nil, fleetEndpoints(i)...)
			}
		})
	}
	wg.Wait()
	for _, err := range errs {
		d.must(err)
	}
}

const changesEach = 8

// benchmarkServices measures programming with n Services.
func (d *bed) benchmarkServices(m samples, p *plane, n int) {
	d.b.Helper()
	ctx := d.b.Context()
	name := func(what string) string { return fmt.Sprintf("%s %d", what, n) }

	// Everything from nothing: kube-proxy from its start, ours with the first Pod of the
	// Network on a node.
	for range 2 {
		if d.proxy != nil {
			d.proxy.stop()
			before := d.slab()
			d.dropTable(d.upstream[0], nftables.TableFamilyIPv4, "kube-proxy")
			m.megabytes(fmt.Sprintf("slab proxy %d", d.programmed), before-d.slab())
		}
		rules, total := d.kubeProxy()
		d.programmed = n
		m.seconds(name("load proxy"), rules)
		m.seconds(name("start proxy"), total)

		edges := len(d.stacks[1].edges())
		p.far.del()
		d.eventually("the edge goes", func() error {
			if len(d.stacks[1].edges()) >= edges {
				return fmt.Errorf("%d edges, want %d", len(d.stacks[1].edges()), edges-1)
			}
			return nil
		})
		address := p.far.Address
		m.seconds(name("start ours"), p.far.add())
		if p.far.Address != address { // a Service and servers are to find it
			p.moved = true
		}
	}
	if got := d.elements(d.upstream[0], nftables.TableFamilyIPv4, "kube-proxy", "service-ips"); got < n {
		d.b.Fatalf("kube-proxy programmed %d Services, want %d", got, n)
	}
	rss, err := pss(d.proxy.pid)
	d.must(err)
	m.megabytes(name("pss proxy"), rss)
	rss, err = pss(d.stacks[0].pid)
	d.must(err)
	m.megabytes(name("pss ours"), rss)

	// The same without daemons: objects to rules.
	var svcs corev1.ServiceList
	var eps discoveryv1.EndpointSliceList
	d.must(d.api.List(ctx, &svcs, client.InNamespace(p.namespace)))
	d.must(d.api.List(ctx, &eps, client.InNamespace(p.namespace)))
	of := map[string][]*discoveryv1.EndpointSlice{}
	for i := range eps.Items {
		e := &eps.Items[i]
		of[e.Labels[discoveryv1.LabelServiceName]] = append(of[e.Labels[discoveryv1.LabelServiceName]], e)
	}
	selected := func() []service.Service {
		var out []service.Service
		for i := range svcs.Items {
			s := &svcs.Items[i]
			if got, ok := (service.Select{Node: "node-1"}).From(s, of[s.Name]); ok {
				out = append(out, got)
			}
		}
		return out
	}
	options := service.Options{Gateways: []netip.Addr{netip.MustParseAddr("10.0.0.1")}, Inside: []netip.Prefix{netip.MustParsePrefix("10.0.0.0/16")}}
	for i := range 3 {
		ns := d.rig.Namespace(fmt.Sprintf("load-%d-%d", n, i))
		runtime.GC()
		began := time.Now()
		t, err := service.Open(ns, options)
		d.must(err)
		_, err = t.Sync(ctx, selected())
		d.must(err)
		m.seconds(name("load ours"), time.Since(began))
		if i == 2 {
			d.must(t.Close())
			before := d.slab()
			d.dropTable(ns, nftables.TableFamilyINet, "h8s_svc")
			m.megabytes(name("slab ours"), before-d.slab())
			continue
		}
		if i == 1 {
			for j := range changesEach {
				change(of["change"][0], j)
				began := time.Now()
				_, err := t.Sync(ctx, selected())
				d.must(err)
				m.seconds(name("change table"), time.Since(began))
			}
		}
		d.must(t.Close())
	}

	// One endpoint of one Service, by the daemons.
	for _, side := range []struct {
		name, url, figure string
		p                 *program
		ns                *netns.NS
		slice             *discoveryv1.EndpointSlice
	}{
		{"ours", "http://127.0.0.1:9645/metrics", stackSync, d.stacks[0], d.open(p.edge), p.ours},
		{"proxy", "http://127.0.0.1:10249/metrics", proxyPartial, d.proxy, d.upstream[0], p.theirs},
	} {
		seen := d.changes(side.ns)
		for j := range changesEach {
			change(side.slice, n+j)
			count, sum, err := side.p.figure(side.url, side.figure)
			d.must(err)
			seen.forget()
			began := time.Now()
			d.must(d.api.Update(ctx, side.slice))
			m.seconds(name("api"), time.Since(began))
			seen.wait()
			m.seconds(name("seen "+side.name), time.Since(began))
			d.eventually("the sync is over", func() error {
				c, s, err := side.p.figure(side.url, side.figure)
				if err == nil && c == count {
					err = fmt.Errorf("still %v syncs", c)
				}
				if err == nil {
					m.seconds(name("change "+side.name), time.Duration((s-sum)/(c-count)*float64(time.Second)))
				}
				return err
			})
		}
		seen.close()
	}
}

// change gives the first endpoint another address.
func change(s *discoveryv1.EndpointSlice, i int) {
	s.Endpoints[0].Addresses = []string{netip.AddrFrom4([4]byte{10, 0, byte(251 + i>>8%4), byte(i)}).String()}
}

func (d *bed) open(path string) *netns.NS {
	d.b.Helper()
	ns, err := netns.Open(path)
	d.must(err)
	d.b.Cleanup(func() { _ = ns.Close() })
	return ns
}

// elements counts those of a set.
func (d *bed) elements(ns *netns.NS, family nftables.TableFamily, table, set string) int {
	d.b.Helper()
	c, err := ns.NFTables()
	d.must(err)
	s, err := c.GetSetByName(&nftables.Table{Name: table, Family: family}, set)
	d.must(err)
	e, err := c.GetSetElements(s)
	d.must(err)
	return len(e)
}

const (
	connectionsEach = 400
	streamTime      = 500 * time.Millisecond
)

// benchmarkTraffic measures TCP between Pods, with all Services programmed.
func (d *bed) benchmarkTraffic(m samples, p *plane, rounds int) {
	d.b.Helper()
	ctx := context.Background()
	a, b := d.rig.Namespace("plain-a"), d.rig.Namespace("plain-b")
	d.must(veth(a, b, "10.250.0.1/30", "10.250.0.2/30"))
	plain := netip.MustParseAddr("10.250.0.2")
	if p.moved {
		// Claimed anew, it may have another address.
		s := &discoveryv1.EndpointSlice{}
		d.must(d.api.Get(ctx, client.ObjectKey{Namespace: p.namespace, Name: "far"}, s))
		s.Endpoints[0].Addresses = []string{p.far.Address.String()}
		d.must(d.api.Update(ctx, s))
	}
	for _, s := range []struct {
		ns *netns.NS
		at netip.Addr
	}{{b, plain}, {p.near.ns, p.near.Address}, {p.far.ns, p.far.Address}, {p.upNear.ns, p.upNear.Address}, {p.upFar.ns, p.upFar.Address}} {
		stop, err := serve(ctx, s.ns, netip.AddrPortFrom(s.at, 8000))
		d.must(err)
		d.b.Cleanup(stop)
	}
	paths := []struct {
		name string
		from *netns.NS
		to   string
	}{
		{"plain", a, "10.250.0.2:8000"},
		{"ptp", p.upFrom.ns, p.upNear.Address.String() + ":8000"},
		{"edge", p.from.ns, p.near.Address.String() + ":8000"},
		{"ptp clusterip", p.upFrom.ns, "10.98.2.1:80"},
		{"edge clusterip", p.from.ns, "10.98.1.1:80"},
		{"ptp far", p.upFrom.ns, p.upFar.Address.String() + ":8000"},
		{"edge far", p.from.ns, p.far.Address.String() + ":8000"},
		{"ptp far clusterip", p.upFrom.ns, "10.98.2.2:80"},
		{"edge far clusterip", p.from.ns, "10.98.1.2:80"},
	}
	for _, path := range paths { // the first connection may have to wait for rules
		d.eventually(path.name, func() error {
			_, err := connections(path.from, netip.MustParseAddrPort(path.to), 1, 1)
			return err
		})
	}
	for range rounds {
		for _, path := range paths {
			to := netip.MustParseAddrPort(path.to)
			n, err := connections(path.from, to, connectionsEach, 4)
			d.must(err)
			m["conn/s "+path.name] = append(m["conn/s "+path.name], n)
			bytes, err := throughput(ctx, path.from, to, streamTime)
			d.must(err)
			m["MB/s "+path.name] = append(m["MB/s "+path.name], bytes/1e6)
		}
	}
}

const (
	questions = 2000
	// forwardedEach keeps all rounds together within what a Network's resolver passes on at
	// once.
	forwardedEach = 150
)

// benchmarkNames asks a Network's resolver, and CoreDNS as clusters have it: in a Pod on
// the same node, behind a ClusterIP.
func (d *bed) benchmarkNames(m samples, p *plane, rounds int) {
	d.b.Helper()
	ctx := context.Background()
	stop, err := upstream(ctx, d.upstream[1], "172.31.0.2:53")
	d.must(err)
	d.b.Cleanup(stop)
	d.reach(p.upNear.ns)
	corefile := filepath.Join(d.home, "Corefile")
	d.must(writeFile(corefile, fmt.Appendf(nil, `.:53 {
    errors
    kubernetes cluster.local in-addr.arpa ip6.arpa {
        kubeconfig %s
        pods insecure
        fallthrough in-addr.arpa ip6.arpa
        ttl 30
    }
    forward . 172.31.0.2
    cache 30
    loadbalance
}
`, d.kubeconfig)))
	coredns := d.run(p.upNear.ns, d.home, "coredns", "coredns", "-conf", corefile)
	const server = "10.96.0.10:53"
	sides := []struct {
		name, namespace string
		ns              *netns.NS
	}{{"ours", p.namespace, p.from.ns}, {"coredns", "up", p.upFrom.ns}}
	asked := 0
	for _, s := range sides {
		d.eventually(s.name+" answers", func() error {
			_, err := ask(ctx, s.ns, server, 1, 1, func(int) string { return "near." + s.namespace + ".svc.cluster.local." })
			if err != nil && s.name == "coredns" {
				err = fmt.Errorf("%w\n%s", err, coredns.tail())
			}
			return err
		})
	}
	for range rounds {
		for _, s := range sides {
			for _, kind := range []struct {
				name       string
				clients, n int
				ask        func(i int) string
			}{
				{"cluster", 8, questions, func(int) string { return "near." + s.namespace + ".svc.cluster.local." }},
				{"cached", 8, questions, func(int) string { return "www.example.com." }},
				{"forwarded", 1, forwardedEach, func(i int) string { return fmt.Sprintf("n%d.example.com.", asked+i) }},
			} {
				got, err := ask(ctx, s.ns, server, kind.clients, kind.n, kind.ask)
				d.must(err)
				key := kind.name + " " + s.name
				m["q/s "+key] = append(m["q/s "+key], got.PerSecond)
				m["p50 "+key] = append(m["p50 "+key], got.P50.Seconds()*1e3)
				m["p99 "+key] = append(m["p99 "+key], got.P99.Seconds()*1e3)
			}
		}
		asked += forwardedEach
	}
}
