package service

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"time"

	"github.com/containerd/errdefs"
	"github.com/containerd/log"
	"github.com/google/nftables"
	"github.com/google/nftables/expr"
	"github.com/mdlayher/netlink"
	nlink "github.com/vishvananda/netlink"
	vnetns "github.com/vishvananda/netns"
	"golang.org/x/sys/unix"

	"github.com/hypernetes/hypernetes/network/netns"
)

const (
	// A transaction goes to the kernel in one piece, and the socket must take it.
	batchOps   = 60000
	sendBuffer = 16 << 20
	recvBuffer = 8 << 20
	// messageElements keeps the attribute that holds them below 64 KiB.
	messageElements = 500
	// keptClasses may lie unused: numbers of endpoints come and go.
	keptClasses = 16
	// resyncEvery is how long a Sync believes that nobody else changed the table.
	resyncEvery = 5 * time.Minute
)

// Table is the table of one edge. Sync calls must not overlap.
type Table struct {
	ns   *netns.NS
	opts Options
	// cur is what the kernel has; nil if it has to be read.
	cur  *state
	read time.Time
	// suspect are chains whose rules are to be written again, build is set if all is.
	suspect []chain
	inside  [2]bool
	build   bool
	// unsure is set by reading: a former process may have died between its transaction
	// and what has to follow.
	unsure bool
	// forget are flows a former Sync could not delete.
	forget map[front]entry
	// clients may be remembered, as there are or were Services with affinity.
	clients bool
	// Sockets are kept: closing one waits until the kernel has freed all that the last
	// transaction deleted.
	nft *nftables.Conn
	ct  *nlink.Handle
	// batch is batchOps, except in tests, as is committed.
	batch     int
	committed func()
}

// Open prepares a table; what a former process left there is adopted, not flushed.
func Open(ns *netns.NS, o Options) (*Table, error) {
	for name, addrs := range map[string][]netip.Addr{"Gateways": o.Gateways, "Overlay": o.Overlay} {
		var n [2]int
		for _, a := range addrs {
			if !a.IsValid() {
				return nil, fmt.Errorf("option %s: invalid address: %w", name, errdefs.ErrInvalidArgument)
			}
			n[a.Unmap().BitLen()/128]++
		}
		if n[0] > 1 || n[1] > 1 {
			return nil, fmt.Errorf("option %s: %v: at most one address of each family: %w", name, addrs, errdefs.ErrInvalidArgument)
		}
	}
	t := &Table{ns: ns, opts: o, batch: batchOps, forget: map[front]entry{}, committed: func() {}}
	if err := t.load(); err != nil {
		t.failed()
		return nil, err
	}
	if t.build {
		if err := t.apply(context.Background(), &change{}, new(Stats)); err != nil {
			t.failed()
			return nil, err
		}
	}
	return t, nil
}

// Resync makes the next Sync read what is in the kernel and repair what others changed.
func (t *Table) Resync() { t.cur = nil }

// Sync makes the table hold just these Services: element by element, in one
// transaction, without touching what stays. More than fits in a transaction goes in
// several, between which each Service is as it was or as it will be.
func (t *Table) Sync(ctx context.Context, services []Service) (Stats, error) {
	var stats Stats
	err := t.sync(ctx, services, &stats)
	if err != nil {
		t.failed()
	}
	return stats, err
}

func (t *Table) sync(ctx context.Context, services []Service, stats *Stats) error {
	want, err := desired(services)
	if err != nil {
		return err
	}
	fresh := false
	if t.cur == nil || time.Since(t.read) > resyncEvery {
		if err := t.load(); err != nil {
			return err
		}
		fresh = true
	}
	c := plan(t.cur, want)
	maps.Copy(t.forget, c.moved) // whatever comes of it
	if err := t.apply(ctx, c, stats); err != nil {
		if fresh || ctx.Err() != nil {
			return err
		}
		// Something is not as we left it: look, and try once more.
		t.failed()
		log.G(ctx).WithError(err).Warn("service table differs from what was written, reading it again")
		if err := t.load(); err != nil {
			return err
		}
		if want, err = desired(services); err != nil {
			return err
		}
		c = plan(t.cur, want)
		maps.Copy(t.forget, c.moved)
		if err := t.apply(ctx, c, stats); err != nil {
			return err
		}
	}
	unused := c.unused
	for _, k := range unused {
		want.classes[k] = struct{}{}
	}
	t.cur = want
	if t.unsure {
		maps.Copy(t.forget, want.fronts)
	}
	if len(unused) > keptClasses {
		if err := t.dropClasses(unused); err != nil {
			return err
		}
		for _, k := range unused {
			delete(want.classes, k)
		}
	}
	if len(t.forget) == 0 {
		t.unsure = false
		return nil
	}
	affine := false
	for k := range want.classes {
		affine = affine || k.class.affinity() > 0
	}
	if t.clients || affine || t.unsure {
		if err := t.forgetClients(stats); err != nil {
			return err
		}
		t.clients = affine
	}
	h, err := t.conntrack()
	if err != nil {
		return err
	}
	n, err := newStale(t.forget, want.fronts).forget(h)
	stats.Flows += n
	if err == nil {
		t.forget, t.unsure = map[front]entry{}, false
	}
	return err
}

// Close lets go of the kernel; the table stays as it is.
func (t *Table) Close() error {
	var err error
	if t.nft != nil {
		err = t.nft.CloseLasting()
	}
	if t.ct != nil {
		t.ct.Close()
	}
	t.nft, t.ct, t.cur = nil, nil, nil
	return err
}

// failed makes sure that nobody reads what is left of an exchange that went wrong.
func (t *Table) failed() {
	_ = t.Close()
}

func (t *Table) conn() (*nftables.Conn, error) {
	if t.nft != nil {
		return t.nft, nil
	}
	c, err := t.ns.NFTables(nftables.AsLasting(), nftables.WithSockOptions(func(c *netlink.Conn) error {
		if err := c.SetWriteBuffer(sendBuffer); err != nil {
			return err
		}
		return c.SetReadBuffer(recvBuffer)
	}))
	if err != nil {
		return nil, fmt.Errorf("open nf_tables: %w", err)
	}
	t.nft = c
	return c, nil
}

func (t *Table) conntrack() (*nlink.Handle, error) {
	if t.ct != nil {
		return t.ct, nil
	}
	h, err := nlink.NewHandleAt(vnetns.NsHandle(t.ns.FD()), unix.NETLINK_NETFILTER)
	if err != nil {
		return nil, fmt.Errorf("open conntrack: %w", err)
	}
	t.ct = h
	return h, nil
}

// apply brings a plan to the kernel.
func (t *Table) apply(ctx context.Context, c *change, stats *Stats) error {
	if c.empty() && !t.build && len(t.suspect) == 0 && t.inside == [2]bool{} {
		return nil
	}
	conn, err := t.conn()
	if err != nil {
		return err
	}
	if err := t.frame(conn); err != nil {
		return err
	}
	for _, k := range c.classes {
		ch := k.chain()
		conn.AddChain(&ch.Chain)
		conn.FlushChain(&ch.Chain)
		if err := addRules(conn, ch); err != nil {
			return err
		}
		err := conn.SetAddElements(setClasses.definition(k.v6), []nftables.SetElement{{
			Key: []byte(hostVal(uint32(k.class))), VerdictData: &expr.Verdict{Kind: expr.VerdictGoto, Chain: ch.Name}}})
		if err != nil {
			return err
		}
		stats.Added++
	}
	pending := make([]op, 0, 1024)
	flush := func() error {
		if err := ctx.Err(); err != nil {
			return err
		}
		if err := encode(conn, pending); err != nil {
			return err
		}
		if err := conn.Flush(); err != nil {
			return fmt.Errorf("nftables transaction: %w", classify(err))
		}
		for _, o := range pending {
			if o.del {
				stats.Deleted++
			} else {
				stats.Added++
			}
		}
		pending = pending[:0]
		t.committed()
		return nil
	}
	for _, unit := range slices.Concat([][]op{c.prelude}, c.units, [][]op{c.epilogue}) {
		if len(pending) > 0 && len(pending)+len(unit) > t.batch {
			if err := flush(); err != nil {
				return err
			}
		}
		pending = append(pending, unit...)
	}
	if err := flush(); err != nil {
		return err
	}
	t.build, t.suspect, t.inside = false, nil, [2]bool{}
	return nil
}

func classify(err error) error {
	switch {
	case errors.Is(err, unix.ENOENT), errors.Is(err, unix.EEXIST), errors.Is(err, unix.EBUSY):
		return fmt.Errorf("%w: %w", errdefs.ErrConflict, err)
	case errors.Is(err, unix.ENOBUFS), errors.Is(err, unix.EMSGSIZE), errors.Is(err, unix.ENOMEM):
		return fmt.Errorf("%w: %w", errdefs.ErrResourceExhausted, err)
	case errors.Is(err, unix.EPERM):
		return fmt.Errorf("%w: %w", errdefs.ErrPermissionDenied, err)
	}
	return err
}

// encode puts operations into messages: deletions first, so that a key can get another
// value, and those for one set together.
func encode(conn *nftables.Conn, ops []op) error {
	type group struct {
		del bool
		set setID
		v6  bool
	}
	groups := map[group][]nftables.SetElement{}
	for _, o := range ops {
		e := nftables.SetElement{Key: []byte(o.key)}
		if o.end != "" {
			e.KeyEnd = []byte(o.end)
		}
		if !o.del && o.val != "" {
			e.Val = []byte(o.val)
		}
		g := group{o.del, o.set, o.v6}
		groups[g] = append(groups[g], e)
	}
	for _, del := range []bool{true, false} {
		for s := range setCount {
			for _, v6 := range []bool{false, true} {
				for part := range slices.Chunk(groups[group{del, s, v6}], messageElements) {
					f := conn.SetAddElements
					if del {
						f = conn.SetDeleteElements
					}
					if err := f(s.definition(v6), part); err != nil {
						return err
					}
				}
			}
		}
	}
	return nil
}

// frame makes what all Services share, as far as load found it missing.
func (t *Table) frame(conn *nftables.Conn) error {
	chains := t.suspect
	if t.build {
		conn.AddTable(table()) // or there would be nothing to delete
		conn.DelTable(table())
		conn.AddTable(table())
		for s := range setCount {
			for _, v6 := range []bool{false, true} {
				if err := conn.AddSet(s.definition(v6), nil); err != nil {
					return err
				}
			}
		}
		chains = static(t.opts)
	}
	for _, ch := range chains {
		conn.AddChain(&ch.Chain)
		conn.FlushChain(&ch.Chain)
	}
	for _, ch := range chains {
		if err := addRules(conn, ch); err != nil {
			return err
		}
	}
	for i, v6 := range []bool{false, true} {
		if !t.build && !t.inside[i] {
			continue
		}
		set := setInside.definition(v6)
		conn.FlushSet(set)
		if e := insideElements(t.opts.Inside, v6); len(e) > 0 {
			if err := conn.SetAddElements(set, e); err != nil {
				return err
			}
		}
	}
	return nil
}

func addRules(conn *nftables.Conn, ch chain) error {
	for _, r := range ch.rules {
		data, err := tag(r)
		if err != nil {
			return err
		}
		conn.AddRule(&nftables.Rule{Table: ch.Table, Chain: &ch.Chain, Exprs: r, UserData: data})
	}
	return nil
}

// dropClasses removes chains that have no front. It is a transaction of its own: a packet
// that found its class before the last one can still go there.
func (t *Table) dropClasses(unused []classKey) error {
	conn, err := t.conn()
	if err != nil {
		return err
	}
	for _, k := range unused {
		if err := conn.SetDeleteElements(setClasses.definition(k.v6), []nftables.SetElement{{Key: []byte(hostVal(uint32(k.class)))}}); err != nil {
			return err
		}
	}
	for _, k := range unused {
		ch := &nftables.Chain{Table: table(), Name: k.name()}
		conn.FlushChain(ch)
		conn.DelChain(ch)
	}
	if err := conn.Flush(); err != nil {
		return fmt.Errorf("remove unused chains: %w", classify(err))
	}
	return nil
}

// forgetClients removes the affinity of clients to endpoints that are gone.
func (t *Table) forgetClients(stats *Stats) error {
	conn, err := t.conn()
	if err != nil {
		return err
	}
	fronts := newStale(t.forget, t.cur.fronts).fronts
	for _, v6 := range []bool{false, true} {
		set := setAffinity.definition(v6)
		elements, err := conn.GetSetElements(set)
		if err != nil {
			return fmt.Errorf("read affinity of clients: %w", err)
		}
		for _, e := range elements {
			if len(e.Key) < addrLen(v6) {
				continue
			}
			f, ok := parseFront(e.Key[addrLen(v6):], v6)
			if !ok {
				continue
			}
			eps, moved := fronts[f]
			if !moved {
				if _, known := t.cur.fronts[f]; known {
					continue
				}
			}
			ep, ok := parseAddrPort(e.Val, v6)
			affine := t.cur.fronts[f].class.affinity() > 0
			g := f
			g.inside = true
			affine = affine || t.cur.fronts[g].class.affinity() > 0
			if ok && affine && slices.Contains(eps, ep) {
				continue
			}
			// One by one: it may have run out meanwhile, and that is as good.
			if err := conn.SetDeleteElements(set, []nftables.SetElement{{Key: e.Key}}); err != nil {
				return err
			}
			switch err := conn.Flush(); {
			case err == nil:
				stats.Deleted++
			case !errors.Is(err, unix.ENOENT):
				return fmt.Errorf("forget affinity of a client: %w", err)
			}
		}
	}
	return nil
}

// load reads the table, and finds what of the frame has to be made again.
func (t *Table) load() error {
	t.cur, t.suspect, t.inside, t.build, t.unsure = nil, nil, [2]bool{}, false, true
	conn, err := t.conn()
	if err != nil {
		return err
	}
	tables, err := conn.ListTablesOfFamily(nftables.TableFamilyINet)
	if err != nil {
		return fmt.Errorf("list tables: %w", err)
	}
	t.read = time.Now()
	if !slices.ContainsFunc(tables, func(n *nftables.Table) bool { return n.Name == tableName }) {
		t.build, t.cur = true, newState()
		return nil
	}
	sets, err := conn.GetSets(table())
	if err != nil {
		return fmt.Errorf("list sets: %w", err)
	}
	found := map[string]*nftables.Set{}
	for _, s := range sets {
		found[s.Name] = s
	}
	for s := range setCount {
		for _, v6 := range []bool{false, true} {
			d, have := s.definition(v6), found[s.name(v6)]
			if have == nil || have.IsMap != d.IsMap || have.Interval != d.Interval || have.Dynamic != d.Dynamic ||
				have.HasTimeout != d.HasTimeout || have.KeyType.Bytes != d.KeyType.Bytes && s != setClasses {
				// Another version's, or not ours at all.
				t.build, t.cur = true, newState()
				return nil
			}
		}
	}
	chains, err := conn.ListChainsOfTableFamily(nftables.TableFamilyINet)
	if err != nil {
		return fmt.Errorf("list chains: %w", err)
	}
	byName := map[string]*nftables.Chain{}
	for _, ch := range chains {
		if ch.Table != nil && ch.Table.Name == tableName {
			byName[ch.Name] = ch
		}
	}
	for _, ch := range static(t.opts) {
		have := byName[ch.Name]
		if have != nil && ch.Hooknum != nil && (have.Hooknum == nil || *have.Hooknum != *ch.Hooknum ||
			have.Priority == nil || *have.Priority != *ch.Priority || have.Type != ch.Type) {
			t.build, t.cur = true, newState()
			return nil
		}
		if have == nil || !same(conn, ch) {
			t.suspect = append(t.suspect, ch)
		}
	}
	cur := newState()
	if err := t.elements(conn, cur, byName); err != nil {
		return err
	}
	t.cur = cur
	return nil
}

// same tells whether a chain has its rules.
func same(conn *nftables.Conn, ch chain) bool {
	rules, err := conn.GetRules(ch.Table, &ch.Chain)
	if err != nil || len(rules) != len(ch.rules) {
		return false
	}
	for i, r := range rules {
		if want, err := tag(ch.rules[i]); err != nil || !bytes.Equal(want, r.UserData) {
			return false
		}
	}
	return true
}

func (t *Table) elements(conn *nftables.Conn, cur *state, chains map[string]*nftables.Chain) error {
	for i, v6 := range []bool{false, true} {
		n := addrLen(v6)
		get := func(s setID, f func(nftables.SetElement) bool) error {
			elements, err := conn.GetSetElements(s.definition(v6))
			if err != nil {
				return fmt.Errorf("read %s: %w", s.name(v6), err)
			}
			for _, e := range elements {
				if !f(e) {
					cur.strays = append(cur.strays, op{del: true, set: s, v6: v6, key: string(e.Key), end: string(e.KeyEnd)})
				}
			}
			return nil
		}
		services := func(in bool) func(nftables.SetElement) bool {
			return func(e nftables.SetElement) bool {
				f, ok := parseFront(e.Key, v6)
				if !ok || len(e.Key) != n+8 || len(e.Val) < 4 {
					return false
				}
				f.inside = in
				cur.fronts[f] = entry{class: class(binary.NativeEndian.Uint32(e.Val))}
				return true
			}
		}
		addrs := func(m map[netip.Addr]struct{}) func(nftables.SetElement) bool {
			return func(e nftables.SetElement) bool {
				a, ok := netip.AddrFromSlice(e.Key)
				m[a] = struct{}{}
				return ok
			}
		}
		err := errors.Join(
			get(setServices, services(false)),
			get(setInsideServices, services(true)),
			get(setEndpoints, func(e nftables.SetElement) bool {
				f, ok := parseFront(e.Key, v6)
				ep, ok2 := parseAddrPort(e.Val, v6)
				if !ok || !ok2 || len(e.Key) != n+12 {
					return false
				}
				index := int(binary.NativeEndian.Uint32(e.Key[n+8:]))
				if f.inside = index >= (front{inside: true}).base(); f.inside {
					index -= f.base()
				}
				if index < 0 || index >= maxEndpoints {
					return false
				}
				en, ok := cur.fronts[f]
				if !ok {
					en.class = absent
				}
				for len(en.eps) <= index {
					en.eps = append(en.eps, netip.AddrPort{})
				}
				en.eps[index] = ep
				cur.fronts[f] = en
				return true
			}),
			get(setRanges, func(e nftables.SetElement) bool {
				f, ok := parseFront(e.Key, v6)
				if !ok || len(e.Key) != 2*n+8 || len(e.KeyEnd) != len(e.Key) {
					return false
				}
				from, _ := netip.AddrFromSlice(e.Key[n+8:])
				to, _ := netip.AddrFromSlice(e.KeyEnd[n+8:])
				p, ok := prefix(from, to)
				if !ok || !bytes.Equal(e.Key[:n+8], e.KeyEnd[:n+8]) {
					return false
				}
				en, ok := cur.fronts[f]
				if !ok {
					en.class = absent
				}
				en.ranges = append(en.ranges, p)
				cur.fronts[f] = en
				return true
			}),
			get(setAddrs, addrs(cur.addrs)), get(setExternal, addrs(cur.external)), get(setLocal, addrs(cur.local)),
			get(setHairpins, func(e nftables.SetElement) bool {
				if len(e.Key) != 2*n || !bytes.Equal(e.Key[:n], e.Key[n:]) {
					return false
				}
				a, _ := netip.AddrFromSlice(e.Key[:n])
				cur.hairpins[a] = struct{}{}
				return true
			}),
			get(setClasses, func(e nftables.SetElement) bool {
				if len(e.Key) != 4 {
					return false
				}
				k := classKey{v6, class(binary.NativeEndian.Uint32(e.Key))}
				if chains[k.name()] != nil && same(conn, k.chain()) {
					cur.classes[k] = struct{}{}
				}
				return true
			}))
		if err != nil {
			return err
		}
		have, err := conn.GetSetElements(setInside.definition(v6))
		if err != nil {
			return fmt.Errorf("read %s: %w", setInside.name(v6), err)
		}
		if !slices.Equal(intervals(have), intervals(insideElements(t.opts.Inside, v6))) {
			t.inside[i] = true
		}
	}
	for f, e := range cur.fronts {
		slices.SortFunc(e.ranges, func(a, b netip.Prefix) int {
			if a.Bits() != b.Bits() {
				return a.Bits() - b.Bits()
			}
			return a.Addr().Compare(b.Addr())
		})
		cur.fronts[f] = e
	}
	return nil
}

// intervals are the ends of intervals, sorted.
func intervals(elements []nftables.SetElement) []string {
	var out []string
	for _, e := range elements {
		out = append(out, fmt.Sprintf("%x %t", e.Key, e.IntervalEnd))
	}
	slices.Sort(out)
	return out
}
