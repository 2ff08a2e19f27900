package policy

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"strings"
	"sync"

	"github.com/containerd/log"
	"github.com/google/nftables"
	"github.com/google/nftables/binaryutil"
	"github.com/google/nftables/expr"
	"github.com/google/nftables/userdata"
	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"

	"github.com/hypernetes/hypernetes/network/netns"
)

// TableName is the nftables table (family inet) of this package.
const TableName = "h8s_policy"

// Names of what is there whatever the policies are.
const (
	chainEgress  = "egress"  // hook forward, by iifname
	chainIngress = "ingress" // hook forward, by oifname
	chainInput   = "input"   // hook input, by iifname
	mapEgress    = "isolated_egress"
	mapIngress   = "isolated_ingress"
	setSelf      = "self"
	setHosts4    = "hosts4"
	setHosts6    = "hosts6"
)

// priority of the egress and input chains; ingress follows egress, so that a packet
// between two Pods of this node has to pass both.
const priority = 10

// Bounds of one netlink exchange. All acknowledgements of a batch are in the socket's
// buffer before the first is read.
const (
	socketBuffer   = 64 << 20
	elementsAtOnce = 256 // an attribute is below 64 KiB
	attempts       = 3
)

// Table is the table of one edge. Sync calls must not overlap.
type Table struct {
	ns *netns.NS

	mu       sync.Mutex // guards problems
	problems []Problem
}

// Open prepares a table, adopting what a former process left: that stays in force until
// the first Sync, which changes what differs.
func Open(ns *netns.NS) (*Table, error) {
	t := &Table{ns: ns}
	conn, err := t.connect()
	if err != nil {
		return nil, fmt.Errorf("nf_tables in %s: %w", ns.Path(), err)
	}
	defer conn.CloseLasting()
	if _, err := conn.ListTablesOfFamily(nftables.TableFamilyINet); err != nil {
		return nil, fmt.Errorf("nf_tables in %s: %w", ns.Path(), err)
	}
	return t, nil
}

func (t *Table) connect() (*nftables.Conn, error) {
	return t.ns.NFTables(nftables.AsLasting(), nftables.WithSockOptions(func(c *netlink.Conn) error {
		return errors.Join(c.SetReadBuffer(socketBuffer), c.SetWriteBuffer(socketBuffer))
	}))
}

// Problems are the mistakes in the policies of the last Sync.
func (t *Table) Problems() []Problem {
	t.mu.Lock()
	defer t.mu.Unlock()
	return slices.Clone(t.problems)
}

// Sync enforces the state, in one transaction. After it returns, a Pod in it may be let up.
// It looks at what the kernel has each time, so it also repairs what others changed.
func (t *Table) Sync(ctx context.Context, s State) error {
	p, err := compile(s)
	if err != nil {
		return err
	}
	t.mu.Lock()
	news := !slices.Equal(t.problems, p.problems)
	t.problems = p.problems
	t.mu.Unlock()
	if news {
		for _, problem := range p.problems {
			log.G(ctx).WithField("policy", problem.Policy).Warn(problem.Message)
		}
	}
	want := render(p, s)
	for attempt := 1; ; attempt++ {
		if err := ctx.Err(); err != nil {
			return err
		}
		// A listing may be torn by another writer in this namespace; the transaction then fails whole.
		if err = t.apply(want); err == nil || attempt == attempts {
			return err
		}
	}
}

func (t *Table) apply(want *ruleset) error {
	conn, err := t.connect()
	if err != nil {
		return fmt.Errorf("nf_tables in %s: %w", t.ns.Path(), err)
	}
	defer conn.CloseLasting()
	have, err := list(conn)
	if err != nil {
		return fmt.Errorf("list nftables table %s: %w", TableName, err)
	}
	if err := change(conn, have, want); err != nil {
		return err
	}
	if err := conn.Flush(); err != nil {
		return fmt.Errorf("change nftables table %s: %w", TableName, err)
	}
	return nil
}

// ruleset is a table, as wanted or as the kernel has it.
type ruleset struct {
	exists bool
	// alien is true if something is of another make than ours and can only be replaced.
	alien  bool
	sets   map[string]*kernelSet
	chains map[string]*kernelChain
}

type kernelSet struct {
	spec     nftables.Set
	elements map[string]nftables.SetElement // by elementKey
}

type kernelChain struct {
	spec  nftables.Chain
	rules [][]expr.Any // wanted only
	// comments identify the rules: a chain of this name has them in this order.
	comments []string
}

func elementKey(e nftables.SetElement) string {
	k := string(e.Key) + "|" + string(e.KeyEnd)
	if e.IntervalEnd {
		k += "|end"
	}
	return k
}

func (k *kernelSet) add(elements ...nftables.SetElement) {
	for _, e := range elements {
		k.elements[elementKey(e)] = e
	}
}

func (k *kernelChain) add(comment string, exprs ...expr.Any) {
	k.rules = append(k.rules, exprs)
	k.comments = append(k.comments, comment)
}

// linksOf are the sets of links isolated in a direction, by its map. A link's element stays
// as long as any policy isolates it, whatever else of its policies changes.
var linksOf = map[string]string{mapEgress: "links_egress", mapIngress: "links_ingress"}

var table = &nftables.Table{Name: TableName, Family: nftables.TableFamilyINet}

// render makes the table of a program.
func render(p *program, s State) *ruleset {
	r := &ruleset{exists: true, sets: map[string]*kernelSet{}, chains: map[string]*kernelChain{}}
	r.base(s.Hosts)
	// Only what a link here needs is given to the kernel.
	used := map[string]bool{}
	attach := func(pod *Pod, d direction, verdicts *kernelSet) bool {
		chains := p.selecting(pod, d)
		if len(chains) == 0 {
			return false
		}
		name := r.isolation(chains, d, used)
		for _, link := range pod.Links {
			verdicts.add(nftables.SetElement{Key: ifname(link), VerdictData: &expr.Verdict{Kind: expr.VerdictJump, Chain: name}})
			r.sets[linksOf[verdicts.spec.Name]].add(nftables.SetElement{Key: ifname(link)})
		}
		return true
	}
	for _, pod := range p.all {
		if len(pod.Links) == 0 {
			continue
		}
		out := attach(pod, egress, r.sets[mapEgress])
		in := attach(pod, ingress, r.sets[mapIngress])
		if !out && !in {
			continue
		}
		for _, link := range pod.Links {
			r.sets[setSelf].add(nftables.SetElement{Key: append(ifname(link), ifname(link)...)})
		}
	}
	for name := range used {
		r.set(name, p.sets[name])
	}
	return r
}

func (r *ruleset) newSet(spec nftables.Set) *kernelSet {
	spec.Table = table
	k := &kernelSet{spec: spec, elements: map[string]nftables.SetElement{}}
	r.sets[spec.Name] = k
	return k
}

var (
	typeNamed4 = nftables.MustConcatSetType(nftables.TypeIPAddr, nftables.TypeInetProto, nftables.TypeInetService)
	typeNamed6 = nftables.MustConcatSetType(nftables.TypeIP6Addr, nftables.TypeInetProto, nftables.TypeInetService)
	typePort   = nftables.MustConcatSetType(nftables.TypeInetProto, nftables.TypeInetService)
	typeSelf   = nftables.MustConcatSetType(nftables.TypeIFName, nftables.TypeIFName)
)

// base is what is there for every State.
func (r *ruleset) base(hosts []netip.Addr) {
	native := binaryutil.NativeEndian
	r.newSet(nftables.Set{Name: mapEgress, IsMap: true, KeyType: nftables.TypeIFName, DataType: nftables.TypeVerdict, KeyByteOrder: native})
	r.newSet(nftables.Set{Name: mapIngress, IsMap: true, KeyType: nftables.TypeIFName, DataType: nftables.TypeVerdict, KeyByteOrder: native})
	for _, name := range linksOf {
		r.newSet(nftables.Set{Name: name, KeyType: nftables.TypeIFName, KeyByteOrder: native})
	}
	r.newSet(nftables.Set{Name: setSelf, Concatenation: true, KeyType: typeSelf, KeyByteOrder: native})
	h4 := r.newSet(nftables.Set{Name: setHosts4, KeyType: nftables.TypeIPAddr})
	h6 := r.newSet(nftables.Set{Name: setHosts6, KeyType: nftables.TypeIP6Addr})
	for _, h := range hosts {
		if h = h.Unmap().WithZone(""); h.Is4() {
			h4.add(nftables.SetElement{Key: h.AsSlice()})
		} else if h.Is6() {
			h6.add(nftables.SetElement{Key: h.AsSlice()})
		}
	}
	hook := func(name string, hook *nftables.ChainHook, prio int32) *kernelChain {
		accept := nftables.ChainPolicyAccept
		c := r.chain(name)
		c.spec.Type, c.spec.Hooknum, c.spec.Policy = nftables.ChainTypeFilter, hook, &accept
		c.spec.Priority = nftables.ChainPriorityRef(nftables.ChainPriority(prio))
		c.add("established v1", append(established(), accepts)...)
		return c
	}
	byLink := func(c *kernelChain, key expr.MetaKey, m string) {
		c.add("by link v1", &expr.Meta{Key: key, Register: 1},
			&expr.Lookup{SourceRegister: 1, SetName: m, IsDestRegSet: true})
		// The kernel looks elements up as they are now, for packets whose rules are those of
		// a moment ago: such a one may be sent to a chain that is empty to it, and comes back.
		c.add("isolated v1", &expr.Meta{Key: key, Register: 1},
			&expr.Lookup{SourceRegister: 1, SetName: linksOf[m]}, &expr.Verdict{Kind: expr.VerdictDrop})
	}
	self := func(c *kernelChain) {
		c.add("a Pod and itself v1", &expr.Meta{Key: expr.MetaKeyIIFNAME, Register: 1}, &expr.Meta{Key: expr.MetaKeyOIFNAME, Register: 2},
			&expr.Lookup{SourceRegister: 1, SetName: setSelf}, accepts)
	}

	out := hook(chainEgress, nftables.ChainHookForward, priority)
	self(out)
	byLink(out, expr.MetaKeyIIFNAME, mapEgress)

	in := hook(chainIngress, nftables.ChainHookForward, priority+1)
	self(in)
	in.add("the node v1", append(family(4), address(4, ingress, 1), &expr.Lookup{SourceRegister: 1, SetName: setHosts4}, accepts)...)
	in.add("the node, IPv6 v1", append(family(6), address(6, ingress, 1), &expr.Lookup{SourceRegister: 1, SetName: setHosts6}, accepts)...)
	byLink(in, expr.MetaKeyOIFNAME, mapIngress)

	// Neighbour discovery is how IPv6 finds its next hop, as ARP is for IPv4: no
	// connection of the Pod's that a policy could mean.
	input := hook(chainInput, nftables.ChainHookInput, priority)
	input.add("neighbour discovery v1", append(family(6),
		&expr.Meta{Key: expr.MetaKeyL4PROTO, Register: 1}, &expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: []byte{unix.IPPROTO_ICMPV6}},
		&expr.Payload{Base: expr.PayloadBaseTransportHeader, Offset: 0, Len: 1, DestRegister: 1},
		&expr.Range{Op: expr.CmpOpEq, Register: 1, FromData: []byte{133}, ToData: []byte{136}}, accepts)...)
	byLink(input, expr.MetaKeyIIFNAME, mapEgress)
}

func (r *ruleset) chain(name string) *kernelChain {
	c := &kernelChain{spec: nftables.Chain{Name: name, Table: table}}
	r.chains[name] = c
	return c
}

// isolation is the chain for Pods that just these policies select; they share it.
func (r *ruleset) isolation(chains []*chain, d direction, used map[string]bool) string {
	parts := []string{"isolation", string(d)}
	for _, c := range chains {
		parts = append(parts, c.name)
	}
	name := "isolated_" + string(d) + "/" + hash(parts...)
	if r.chains[name] != nil {
		return name
	}
	k := r.chain(name)
	for _, c := range chains {
		if r.chains[c.name] == nil {
			r.policy(c, d, used)
		}
		k.add("policy "+c.policy, &expr.Verdict{Kind: expr.VerdictJump, Chain: c.name})
	}
	k.add("no rule allows it", &expr.Counter{}, &expr.Verdict{Kind: expr.VerdictDrop})
	return name
}

// policy is the chain of a policy's rules.
func (r *ruleset) policy(c *chain, d direction, used map[string]bool) {
	k := r.chain(c.name)
	for i, x := range c.rules {
		var e []expr.Any
		if x.family != 0 {
			e = family(x.family)
		}
		if x.peer != "" {
			e = append(e, address(x.family, d, 1), &expr.Lookup{SourceRegister: 1, SetName: x.peer})
			used[x.peer] = true
		}
		if x.ports != "" {
			e = append(e, port(unix.NFT_REG32_00)...)
			e = append(e, &expr.Lookup{SourceRegister: 1, SetName: x.ports})
			used[x.ports] = true
		}
		if x.named != "" {
			e = append(e, address(x.family, egress, 1)) // the destination, whichever side this is
			e = append(e, port(unix.NFT_REG32_00+addressBytes(x.family)/4)...)
			e = append(e, &expr.Lookup{SourceRegister: 1, SetName: x.named})
			used[x.named] = true
		}
		k.add(fmt.Sprintf("%s rule %d (%d of %d)", d, x.number, i+1, len(c.rules)), append(e, accepts)...)
	}
}

// set gives a set of Pods, blocks or ports to the kernel.
func (r *ruleset) set(name string, s *set) {
	spec := nftables.Set{Name: name, Comment: s.comment[:min(len(s.comment), 100)]}
	switch s.kind {
	case addrs4:
		spec.KeyType = nftables.TypeIPAddr
	case addrs6:
		spec.KeyType = nftables.TypeIP6Addr
	case block4:
		spec.KeyType, spec.Interval = nftables.TypeIPAddr, true
	case block6:
		spec.KeyType, spec.Interval = nftables.TypeIP6Addr, true
	case ports:
		spec.KeyType, spec.Interval, spec.Concatenation = typePort, true, true
	case named4:
		spec.KeyType, spec.Concatenation = typeNamed4, true
	case named6:
		spec.KeyType, spec.Concatenation = typeNamed6, true
	}
	k := r.newSet(spec)
	for a := range s.addrs {
		k.add(nftables.SetElement{Key: a.AsSlice()})
	}
	for n := range s.named {
		k.add(nftables.SetElement{Key: append(n.addr.AsSlice(), portKey(n.protocol, n.port)...)})
	}
	for _, b := range s.blocks {
		k.add(nftables.SetElement{Key: b.from.AsSlice()})
		if end := b.to.Next(); end.IsValid() { // a range up to the last address has no end
			k.add(nftables.SetElement{Key: end.AsSlice(), IntervalEnd: true})
		}
	}
	for _, q := range s.ports {
		k.add(nftables.SetElement{Key: portKey(q.protocol, q.from), KeyEnd: portKey(q.protocol, q.to)})
	}
}

// portKey is protocol . port as sets have it, each padded to a register.
func portKey(protocol uint8, port uint16) []byte {
	k := make([]byte, 8)
	k[0] = protocol
	binary.BigEndian.PutUint16(k[4:], port)
	return k
}

func ifname(link string) []byte {
	b := make([]byte, unix.IFNAMSIZ)
	copy(b, link)
	return b
}

var accepts = &expr.Verdict{Kind: expr.VerdictAccept}

func established() []expr.Any {
	states := binaryutil.NativeEndian.PutUint32(expr.CtStateBitESTABLISHED | expr.CtStateBitRELATED)
	return []expr.Any{
		&expr.Ct{Key: expr.CtKeySTATE, Register: 1},
		&expr.Bitwise{SourceRegister: 1, DestRegister: 1, Len: 4, Mask: states, Xor: make([]byte, 4)},
		&expr.Cmp{Op: expr.CmpOpNeq, Register: 1, Data: make([]byte, 4)},
	}
}

func family(f uint8) []expr.Any {
	proto := byte(unix.NFPROTO_IPV4)
	if f == 6 {
		proto = unix.NFPROTO_IPV6
	}
	return []expr.Any{&expr.Meta{Key: expr.MetaKeyNFPROTO, Register: 1}, &expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: []byte{proto}}}
}

func addressBytes(f uint8) uint32 {
	if f == 6 {
		return 16
	}
	return 4
}

// address loads a packet's source for ingress, its destination for egress.
func address(f uint8, d direction, register uint32) expr.Any {
	offset := uint32(12)
	if f == 6 {
		offset = 8
	}
	if d == egress {
		offset += addressBytes(f)
	}
	return &expr.Payload{Base: expr.PayloadBaseNetworkHeader, Offset: offset, Len: addressBytes(f), DestRegister: register}
}

// port loads protocol and destination port. For protocols without ports the bytes are
// something else, which no set holds beside such a protocol.
func port(register uint32) []expr.Any {
	return []expr.Any{
		&expr.Meta{Key: expr.MetaKeyL4PROTO, Register: register},
		&expr.Payload{Base: expr.PayloadBaseTransportHeader, Offset: 2, Len: 2, DestRegister: register + 1},
	}
}

// list reads the table from the kernel.
func list(conn *nftables.Conn) (*ruleset, error) {
	r := &ruleset{sets: map[string]*kernelSet{}, chains: map[string]*kernelChain{}}
	tables, err := conn.ListTablesOfFamily(nftables.TableFamilyINet)
	if err != nil {
		return nil, err
	}
	for _, t := range tables {
		if t.Name == TableName {
			r.exists, r.alien = true, t.Flags != 0 // such as dormant
		}
	}
	if !r.exists {
		return r, nil
	}
	sets, err := conn.GetSets(table)
	if err != nil {
		return nil, fmt.Errorf("sets: %w", err)
	}
	for _, s := range sets {
		s.Table = table
		elements, err := conn.GetSetElements(s)
		if err != nil {
			return nil, fmt.Errorf("set %s: %w", s.Name, err)
		}
		r.newSet(*s).add(elements...)
	}
	chains, err := conn.ListChainsOfTableFamily(nftables.TableFamilyINet)
	if err != nil {
		return nil, fmt.Errorf("chains: %w", err)
	}
	for _, c := range chains {
		if c.Table == nil || c.Table.Name != TableName {
			continue
		}
		k := r.chain(c.Name)
		k.spec = *c
		k.spec.Table = table
		rules, err := conn.GetRules(table, &k.spec)
		if err != nil {
			return nil, fmt.Errorf("chain %s: %w", c.Name, err)
		}
		for _, rule := range rules {
			comment, _ := userdata.GetString(rule.UserData, userdata.TypeComment) // none is "", which is nobody's
			k.comments = append(k.comments, comment)
		}
	}
	return r, nil
}

// change queues what makes have into want. The order is that of references: what is
// referred to comes before, and goes after, what refers to it.
func change(conn *nftables.Conn, have, want *ruleset) error {
	if have.exists && differs(have, want) {
		conn.DelTable(table)
		have = &ruleset{sets: map[string]*kernelSet{}, chains: map[string]*kernelChain{}}
	}
	if !have.exists {
		conn.AddTable(table)
	}
	var id uint32
	for _, name := range slices.Sorted(maps.Keys(want.sets)) {
		if have.sets[name] != nil {
			continue
		}
		id++
		spec := want.sets[name].spec
		spec.ID = id // unique in the transaction is enough; the library's counter is shared without a lock
		if err := conn.AddSet(&spec, nil); err != nil {
			return fmt.Errorf("set %s: %w", name, err)
		}
	}
	for _, name := range slices.Sorted(maps.Keys(want.chains)) {
		if have.chains[name] == nil {
			conn.AddChain(&want.chains[name].spec)
		}
	}
	for _, name := range slices.Sorted(maps.Keys(want.chains)) {
		w, h := want.chains[name], have.chains[name]
		if h != nil && slices.Equal(h.comments, w.comments) {
			continue
		}
		if h != nil {
			conn.FlushChain(&w.spec)
		}
		for i, e := range w.rules {
			conn.AddRule(&nftables.Rule{Table: table, Chain: &w.spec, Exprs: e,
				UserData: userdata.AppendString(nil, userdata.TypeComment, w.comments[i])})
		}
	}
	for _, name := range slices.Sorted(maps.Keys(want.sets)) {
		var old map[string]nftables.SetElement
		if h := have.sets[name]; h != nil {
			old = h.elements
		}
		if err := elements(conn, want.sets[name], old); err != nil {
			return fmt.Errorf("set %s: %w", name, err)
		}
	}
	for _, name := range slices.Sorted(maps.Keys(have.chains)) {
		if want.chains[name] == nil {
			conn.FlushChain(&have.chains[name].spec)
		}
	}
	for _, name := range slices.Sorted(maps.Keys(have.chains)) {
		if want.chains[name] == nil {
			conn.DelChain(&have.chains[name].spec)
		}
	}
	for _, name := range slices.Sorted(maps.Keys(have.sets)) {
		if want.sets[name] == nil {
			conn.DelSet(&have.sets[name].spec)
		}
	}
	return nil
}

// differs tells whether something ours is there in a form that cannot be changed in place.
func differs(have, want *ruleset) bool {
	if have.alien {
		return true
	}
	for name, w := range want.sets {
		if h := have.sets[name]; h != nil && (h.spec.IsMap != w.spec.IsMap || h.spec.Interval != w.spec.Interval || h.spec.KeyType.Bytes != w.spec.KeyType.Bytes && !w.spec.IsMap) {
			return true
		}
	}
	for name, w := range want.chains {
		h := have.chains[name]
		if h == nil {
			continue
		}
		if (h.spec.Hooknum == nil) != (w.spec.Hooknum == nil) {
			return true
		}
		if w.spec.Hooknum != nil && (*h.spec.Hooknum != *w.spec.Hooknum || *h.spec.Priority != *w.spec.Priority ||
			h.spec.Policy == nil || *h.spec.Policy != *w.spec.Policy) {
			return true
		}
	}
	for name, h := range have.chains {
		if want.chains[name] == nil && h.spec.Hooknum != nil {
			return true
		}
	}
	return false
}

// elements queues the difference of one set's elements.
func elements(conn *nftables.Conn, want *kernelSet, old map[string]nftables.SetElement) error {
	var add, del []nftables.SetElement
	for _, key := range slices.Sorted(maps.Keys(old)) {
		w, ok := want.elements[key]
		if !ok || w.VerdictData != nil && verdictChain(old[key].Val) != w.VerdictData.Chain {
			del = append(del, nftables.SetElement{Key: old[key].Key, KeyEnd: old[key].KeyEnd, IntervalEnd: old[key].IntervalEnd})
		}
	}
	for _, key := range slices.Sorted(maps.Keys(want.elements)) {
		w := want.elements[key]
		o, ok := old[key]
		if !ok || w.VerdictData != nil && verdictChain(o.Val) != w.VerdictData.Chain {
			add = append(add, w)
		}
	}
	for part := range slices.Chunk(del, elementsAtOnce) {
		if err := conn.SetDeleteElements(&want.spec, part); err != nil {
			return err
		}
	}
	for part := range slices.Chunk(add, elementsAtOnce) {
		if err := conn.SetAddElements(&want.spec, part); err != nil {
			return err
		}
	}
	return nil
}

// verdictChain is the chain in a verdict as it is listed: netlink attributes, code and chain.
func verdictChain(b []byte) string {
	for len(b) >= unix.NLA_HDRLEN {
		n := int(binary.NativeEndian.Uint16(b))
		kind := binary.NativeEndian.Uint16(b[2:]) &^ (unix.NLA_F_NESTED | unix.NLA_F_NET_BYTEORDER)
		if n < unix.NLA_HDRLEN || n > len(b) {
			return ""
		}
		if kind == unix.NFTA_VERDICT_CHAIN {
			return strings.TrimRight(string(b[unix.NLA_HDRLEN:n]), "\x00")
		}
		b = b[min((n+3)&^3, len(b)):]
	}
	return ""
}
