package service

import (
	"context"
	"fmt"
	"net/netip"
	"os"
	"runtime"
	"strings"
	"testing"
	"time"

	"github.com/google/nftables"
	"github.com/google/nftables/binaryutil"
	"github.com/google/nftables/expr"
	"golang.org/x/sys/unix"

	"github.com/hypernetes/hypernetes/network/netns"
)

const endpointsEach = 5

// fleet are n Services with five endpoints each.
func fleet(n int) []Service {
	out := make([]Service, n)
	for i := range out {
		var list []Endpoint
		for j := range endpointsEach {
			list = append(list, Endpoint{Address: netip.AddrPortFrom(netip.AddrFrom4([4]byte{192, 168, byte((i*endpointsEach + j) >> 8), byte(i*endpointsEach + j)}), uint16(8000+i%1000)), Local: j == 0})
		}
		out[i] = Service{Key: fmt.Sprintf("ns/s%05d", i), ClusterIPs: []netip.Addr{netip.AddrFrom4([4]byte{10, 96, byte(i >> 8), byte(i)})},
			Ports: []Port{{Protocol: unix.IPPROTO_TCP, Port: 80, Internal: list}}}
	}
	return out
}

// kubeProxy makes what kube-proxy's nftables mode would: a chain per Service and one per
// endpoint, from a map of all Services.
type kubeProxy struct {
	ns    *netns.NS
	table *nftables.Table
	c     *nftables.Conn
}

func (k *kubeProxy) conn(b testing.TB) *nftables.Conn {
	if k.c == nil {
		k.c = must((&Table{ns: k.ns}).conn())(b)
	}
	return k.c
}

func (k *kubeProxy) flush(b testing.TB, c *nftables.Conn) { b.Helper(); check(b, c.Flush()) }

func (k *kubeProxy) services() *nftables.Set {
	return &nftables.Set{Table: k.table, Name: "service-ips", ID: 1, IsMap: true, Concatenation: true, DataType: nftables.TypeVerdict,
		KeyType: nftables.MustConcatSetType(nftables.TypeIPAddr, nftables.TypeInetProto, nftables.TypeInetService)}
}

func (k *kubeProxy) endpoint(c *nftables.Conn, svc *Service, ep netip.AddrPort) string {
	name := fmt.Sprintf("endpoint-%s-%s", strings.ReplaceAll(svc.Key, "/", "-"), strings.ReplaceAll(ep.String(), ":", "-"))
	ch := c.AddChain(&nftables.Chain{Table: k.table, Name: name})
	f := family{}
	c.AddRule(&nftables.Rule{Table: k.table, Chain: ch, Exprs: []expr.Any{
		f.addr(true, keyReg), &expr.Cmp{Op: expr.CmpOpEq, Register: keyReg, Data: ep.Addr().AsSlice()},
		&expr.Verdict{Kind: expr.VerdictJump, Chain: "mark-for-masquerade"}}})
	c.AddRule(&nftables.Rule{Table: k.table, Chain: ch, Exprs: []expr.Any{
		&expr.Immediate{Register: dataReg, Data: ep.Addr().AsSlice()},
		&expr.Immediate{Register: dataReg + 1, Data: binaryutil.BigEndian.PutUint16(ep.Port())}, f.dnat()}})
	return name
}

// choice is the rule that picks an endpoint.
func (k *kubeProxy) choice(b testing.TB, c *nftables.Conn, ch *nftables.Chain, id uint32, chains []string) {
	set := &nftables.Set{Table: k.table, ID: id, Name: "__map%d", Anonymous: true, Constant: true, IsMap: true,
		KeyType: nftables.TypeInteger, DataType: nftables.TypeVerdict}
	var elements []nftables.SetElement
	for i, n := range chains {
		elements = append(elements, nftables.SetElement{Key: []byte(hostVal(uint32(i))), VerdictData: &expr.Verdict{Kind: expr.VerdictGoto, Chain: n}})
	}
	check(b, c.AddSet(set, elements))
	c.AddRule(&nftables.Rule{Table: k.table, Chain: ch, Exprs: []expr.Any{
		&expr.Numgen{Register: keyReg, Modulus: uint32(len(chains)), Type: unix.NFT_NG_RANDOM},
		&expr.Lookup{SourceRegister: keyReg, DestRegister: 0, IsDestRegSet: true, SetName: set.Name, SetID: id}}})
}

func (k *kubeProxy) load(b testing.TB, services []Service) {
	c := k.conn(b)
	k.table = c.AddTable(&nftables.Table{Name: "kube-proxy", Family: nftables.TableFamilyIPv4})
	check(b, c.AddSet(k.services(), nil))
	c.AddChain(&nftables.Chain{Table: k.table, Name: "mark-for-masquerade"})
	pre := c.AddChain(&nftables.Chain{Table: k.table, Name: "nat-prerouting", Type: nftables.ChainTypeNAT, Hooknum: nftables.ChainHookPrerouting, Priority: nftables.ChainPriorityNATDest})
	c.AddRule(&nftables.Rule{Table: k.table, Chain: pre, Exprs: append(family{}.front(keyReg),
		&expr.Lookup{SourceRegister: keyReg, DestRegister: 0, IsDestRegSet: true, SetName: "service-ips", SetID: 1})})
	k.flush(b, c)
	// Some hundred at a time: each chain and rule is a message with an answer.
	for start := 0; start < len(services); start += 500 {
		part := services[start:min(start+500, len(services))]
		var elements []nftables.SetElement
		for i := range part {
			s := &part[i]
			name := "service-" + strings.ReplaceAll(s.Key, "/", "-")
			ch := c.AddChain(&nftables.Chain{Table: k.table, Name: name})
			var chains []string
			for _, ep := range s.Ports[0].Internal {
				chains = append(chains, k.endpoint(c, s, ep.Address))
			}
			k.choice(b, c, ch, uint32(i+2), chains)
			elements = append(elements, nftables.SetElement{Key: []byte(front{addr: s.ClusterIPs[0], proto: 6, port: 80}.key()),
				VerdictData: &expr.Verdict{Kind: expr.VerdictGoto, Chain: name}})
		}
		check(b, c.SetAddElements(k.services(), elements))
		k.flush(b, c)
	}
}

// change replaces the endpoints of one Service by others, one of them new.
func (k *kubeProxy) change(b testing.TB, s *Service, old, now netip.AddrPort) {
	c := k.conn(b)
	ch := &nftables.Chain{Table: k.table, Name: "service-" + strings.ReplaceAll(s.Key, "/", "-")}
	c.FlushChain(ch)
	chains := []string{k.endpoint(c, s, now)}
	for _, ep := range s.Ports[0].Internal[1:] {
		chains = append(chains, fmt.Sprintf("endpoint-%s-%s", strings.ReplaceAll(s.Key, "/", "-"), strings.ReplaceAll(ep.Address.String(), ":", "-")))
	}
	k.choice(b, c, ch, 2, chains)
	gone := &nftables.Chain{Table: k.table, Name: fmt.Sprintf("endpoint-%s-%s", strings.ReplaceAll(s.Key, "/", "-"), strings.ReplaceAll(old.String(), ":", "-"))}
	c.FlushChain(gone)
	c.DelChain(gone)
	k.flush(b, c)
}

func benchmarkSizes(b *testing.B, f func(b *testing.B, n int)) {
	needRoot(b)
	for _, n := range []int{100, 1000, 5000} {
		b.Run(fmt.Sprintf("services=%d", n), func(b *testing.B) { f(b, n) })
	}
}

func slab() float64 {
	text, _ := os.ReadFile("/proc/meminfo")
	for line := range strings.Lines(string(text)) {
		var kb float64
		if n, _ := fmt.Sscanf(line, "SUnreclaim: %f kB", &kb); n == 1 {
			return kb * 1024
		}
	}
	return 0
}

// BenchmarkLoad fills an empty table, beside the same Services in chains. The slab
// figures are the machine's: take them on a quiet one.
func BenchmarkLoad(b *testing.B) {
	benchmarkSizes(b, func(b *testing.B, n int) {
		services := fleet(n)
		var ours, theirs time.Duration
		var heap, slabOurs, slabTheirs float64
		for b.Loop() {
			a, k := namespace(b, "ours"), &kubeProxy{ns: namespace(b, "theirs")}
			table := must(Open(a, options))(b)
			var before, after runtime.MemStats
			runtime.GC()
			runtime.ReadMemStats(&before)
			s0, start := slab(), time.Now()
			must(table.Sync(context.Background(), services))(b)
			ours += time.Since(start)
			slabOurs += slab() - s0
			runtime.GC()
			runtime.ReadMemStats(&after)
			heap += float64(after.HeapAlloc) - float64(before.HeapAlloc)
			s0, start = slab(), time.Now()
			k.load(b, services)
			theirs += time.Since(start)
			slabTheirs += slab() - s0
			runtime.KeepAlive(table)
		}
		per := float64(b.N)
		b.ReportMetric(0, "ns/op")
		b.ReportMetric(float64(ours.Milliseconds())/per, "ours-ms")
		b.ReportMetric(float64(theirs.Milliseconds())/per, "chains-ms")
		b.ReportMetric(float64(theirs)/float64(ours), "chains/ours")
		b.ReportMetric(heap/per/float64(n), "heap-B/service")
		b.ReportMetric(slabOurs/per/float64(n), "slab-B/service")
		b.ReportMetric(slabTheirs/per/float64(n), "chains-slab-B/service")
	})
}

// BenchmarkChange replaces one endpoint of one Service, beside the same in chains.
func BenchmarkChange(b *testing.B) {
	benchmarkSizes(b, func(b *testing.B, n int) {
		services := fleet(n)
		table := must(Open(namespace(b, "ours"), options))(b)
		must(table.Sync(context.Background(), services))(b)
		k := &kubeProxy{ns: namespace(b, "theirs")}
		k.load(b, services)
		var ours, theirs, worst time.Duration
		i := 0
		for b.Loop() {
			s := &services[i%n]
			eps := s.Ports[0].Internal
			old := eps[0].Address
			now := netip.AddrPortFrom(netip.AddrFrom4([4]byte{172, 16, byte(i >> 8), byte(i)}), 80)
			start := time.Now()
			k.change(b, s, old, now)
			theirs += time.Since(start)
			eps[0].Address = now
			start = time.Now()
			st := must(table.Sync(context.Background(), services))(b)
			d := time.Since(start)
			ours, worst = ours+d, max(worst, d)
			if st.Added+st.Deleted > 6 {
				b.Fatalf("%+v for one endpoint", st)
			}
			i++
		}
		b.ReportMetric(0, "ns/op")
		b.ReportMetric(float64(ours.Microseconds())/float64(b.N)/1000, "ours-ms")
		b.ReportMetric(float64(worst.Microseconds())/1000, "ours-worst-ms")
		b.ReportMetric(float64(theirs.Microseconds())/float64(b.N)/1000, "chains-ms")
		b.ReportMetric(float64(theirs)/float64(ours), "chains/ours")
	})
}

// BenchmarkAdopt reads a table as a new process does.
func BenchmarkAdopt(b *testing.B) {
	benchmarkSizes(b, func(b *testing.B, n int) {
		services, ns := fleet(n), namespace(b, "ours")
		must(must(Open(ns, options))(b).Sync(context.Background(), services))(b)
		for b.Loop() {
			if st := must(must(Open(ns, options))(b).Sync(context.Background(), services))(b); st != (Stats{}) {
				b.Fatalf("%+v", st)
			}
		}
	})
}
