package edge

import (
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/google/nftables"
	"github.com/google/nftables/binaryutil"
	"github.com/google/nftables/expr"
	"github.com/google/nftables/userdata"
	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"

	"github.com/hypernetes/hypernetes/network/netns"
)

// ruleset is a table as it should be: chains are compared rule by rule through a
// fingerprint in the rules' comments, sets element by element, and only differences are
// sent, in one transaction.
type ruleset struct {
	table  string
	sets   []set
	chains []chain
}

type set struct {
	name string
	key  []nftables.SetDatatype
	data *nftables.SetDatatype
	// dynamic sets are filled by rules.
	dynamic bool
	size    uint32
	// timeout, if any, is how long an element stays.
	timeout time.Duration
}

type chain struct {
	name     string
	kind     nftables.ChainType
	hook     *nftables.ChainHook
	priority int32
	drop     bool
	rules    [][]expr.Any
}

// elements are a set's keys, with values for maps.
type elements map[string]string

// maxElements go into one message: an attribute has 64 KiB.
const maxElements = 500

func openNFT(ns *netns.NS) (*nftables.Conn, error) {
	const buffer = 8 << 20 // one acknowledgement per message, and messages wait in one batch
	return ns.NFTables(nftables.AsLasting(), nftables.WithSockOptions(func(c *netlink.Conn) error {
		return errors.Join(c.SetReadBuffer(buffer), c.SetWriteBuffer(buffer))
	}))
}

// sync makes the table so. Elements of sets that are not in want are left alone; want is
// called with what there is.
func (r ruleset) sync(ns *netns.NS, want func(have map[string]elements) map[string]elements) error {
	c, err := openNFT(ns)
	if err != nil {
		return fmt.Errorf("table %s: %w", r.table, err)
	}
	defer func() { _ = c.CloseLasting() }()
	have, err := r.read(ns, c)
	if err != nil {
		return fmt.Errorf("table %s: %w", r.table, err)
	}
	target := want(have.elements)
	r.change(c, have, target)
	err = c.Flush()
	if err == nil {
		return nil
	}
	// A definition that cannot be changed in place, by another version of us or somebody
	// else: anew, still in one transaction.
	first := err
	t := r.tableRef()
	c.AddTable(t)
	c.DelTable(t)
	r.change(c, actual{}, target)
	if err := c.Flush(); err != nil {
		return fmt.Errorf("table %s: %w (and before: %v)", r.table, err, first)
	}
	return nil
}

func (r ruleset) tableRef() *nftables.Table {
	return &nftables.Table{Family: nftables.TableFamilyINet, Name: r.table}
}

func (r ruleset) setRef(t *nftables.Table, i int) *nftables.Set {
	s := r.sets[i]
	key := s.key[0]
	if len(s.key) > 1 {
		key = nftables.MustConcatSetType(s.key...)
	}
	out := &nftables.Set{Table: t, ID: uint32(i + 1), Name: s.name, KeyType: key, Concatenation: len(s.key) > 1, Dynamic: s.dynamic, Size: s.size, HasTimeout: s.timeout != 0, Timeout: s.timeout}
	if s.key[0].Name == nftables.TypeIFName.Name && len(s.key) == 1 {
		out.KeyByteOrder = binaryutil.NativeEndian // for nft's listing
	}
	if s.data != nil {
		out.IsMap, out.DataType = true, *s.data
	}
	return out
}

// actual is what the kernel has.
type actual struct {
	table    bool
	chains   map[string]*nftables.Chain
	rules    map[string][]string
	sets     map[string]bool
	elements map[string]elements
}

func (r ruleset) read(ns *netns.NS, c *nftables.Conn) (actual, error) {
	a := actual{chains: map[string]*nftables.Chain{}, rules: map[string][]string{}, sets: map[string]bool{}, elements: map[string]elements{}}
	tables, err := c.ListTablesOfFamily(nftables.TableFamilyINet)
	if err != nil {
		return a, err
	}
	for _, t := range tables {
		a.table = a.table || t.Name == r.table
	}
	if !a.table {
		return a, nil
	}
	t := r.tableRef()
	chains, err := c.ListChainsOfTableFamily(nftables.TableFamilyINet)
	if err != nil {
		return a, err
	}
	for _, ch := range chains {
		if ch.Table.Name != r.table {
			continue
		}
		a.chains[ch.Name] = ch
	}
	if len(r.chains) > 0 {
		if a.rules, err = comments(ns, r.table); err != nil {
			return a, err
		}
	}
	sets, err := c.GetSets(t)
	if err != nil {
		return a, err
	}
	for _, s := range sets {
		a.sets[s.Name] = true
	}
	for i, s := range r.sets {
		if s.dynamic || !a.sets[s.name] {
			continue
		}
		got, err := c.GetSetElements(r.setRef(t, i))
		if err != nil {
			return a, err
		}
		e := elements{}
		for _, x := range got {
			e[string(x.Key)] = string(x.Val)
		}
		a.elements[s.name] = e
	}
	return a, nil
}

// comments are those of a table's rules, by chain, in order. The library would decode the
// rules, and does not know all kinds of expressions.
func comments(ns *netns.NS, table string) (map[string][]string, error) {
	c, err := netlink.Dial(unix.NETLINK_NETFILTER, &netlink.Config{NetNS: ns.FD()})
	if err != nil {
		return nil, err
	}
	defer func() { _ = c.Close() }()
	filter, err := netlink.MarshalAttributes([]netlink.Attribute{{Type: unix.NFTA_RULE_TABLE, Data: []byte(table + "\x00")}})
	if err != nil {
		return nil, err
	}
	msgs, err := c.Execute(netlink.Message{
		Header: netlink.Header{Type: unix.NFNL_SUBSYS_NFTABLES<<8 | unix.NFT_MSG_GETRULE, Flags: netlink.Request | netlink.Dump},
		Data:   append([]byte{unix.NFPROTO_INET, unix.NFNETLINK_V0, 0, 0}, filter...),
	})
	if err != nil {
		return nil, fmt.Errorf("rules: %w", err)
	}
	out := map[string][]string{}
	for _, m := range msgs {
		if len(m.Data) < 4 {
			continue
		}
		attrs, err := netlink.UnmarshalAttributes(m.Data[4:])
		if err != nil {
			return nil, fmt.Errorf("rules: %w", err)
		}
		var in, comment string
		for _, a := range attrs {
			switch a.Type {
			case unix.NFTA_RULE_CHAIN:
				in = strings.TrimRight(string(a.Data), "\x00")
			case unix.NFTA_RULE_USERDATA:
				comment, _ = userdata.GetString(a.Data, userdata.TypeComment)
			}
		}
		out[in] = append(out[in], comment)
	}
	return out, nil
}

// change adds to c what leads from have to r with want's elements.
func (r ruleset) change(c *nftables.Conn, have actual, want map[string]elements) {
	t := r.tableRef()
	if !have.table {
		c.AddTable(t)
	}
	for i, s := range r.sets {
		ref := r.setRef(t, i)
		if !have.sets[s.name] {
			_ = c.AddSet(ref, nil) // encoding errors come out of Flush
		}
		target, managed := want[s.name]
		if !managed {
			continue
		}
		var add, del []nftables.SetElement
		for k, v := range have.elements[s.name] {
			if w, ok := target[k]; !ok || w != v {
				del = append(del, element(k, v))
			}
		}
		for k, v := range target {
			if w, ok := have.elements[s.name][k]; !ok || w != v {
				add = append(add, element(k, v))
			}
		}
		for ; len(del) > 0; del = del[min(maxElements, len(del)):] {
			_ = c.SetDeleteElements(ref, del[:min(maxElements, len(del))])
		}
		for ; len(add) > 0; add = add[min(maxElements, len(add)):] {
			_ = c.SetAddElements(ref, add[:min(maxElements, len(add))])
		}
	}
	for _, ch := range r.chains {
		r.changeChain(c, t, ch, have)
	}
}

func element(k, v string) nftables.SetElement {
	e := nftables.SetElement{Key: []byte(k)}
	if v != "" {
		e.Val = []byte(v)
	}
	return e
}

func (r ruleset) changeChain(c *nftables.Conn, t *nftables.Table, ch chain, have actual) {
	policy := nftables.ChainPolicyAccept
	if ch.drop {
		policy = nftables.ChainPolicyDrop
	}
	ref := &nftables.Chain{Table: t, Name: ch.name}
	if ch.hook != nil {
		ref.Type, ref.Hooknum, ref.Priority, ref.Policy = ch.kind, ch.hook, nftables.ChainPriorityRef(nftables.ChainPriority(ch.priority)), &policy
	}
	prints := make([]string, len(ch.rules))
	for i, rule := range ch.rules {
		prints[i] = fingerprint(rule)
	}
	old, ok := have.chains[ch.name]
	if !ok || ch.hook != nil && !sameBase(old, ref) {
		c.AddChain(ref)
	}
	if ok && equal(have.rules[ch.name], prints) {
		return
	}
	if ok {
		c.FlushChain(ref)
	}
	for i, rule := range ch.rules {
		c.AddRule(&nftables.Rule{Table: t, Chain: ref, Exprs: rule, UserData: userdata.AppendString(nil, userdata.TypeComment, prints[i])})
	}
}

func sameBase(a, b *nftables.Chain) bool {
	return a.Type == b.Type && a.Hooknum != nil && *a.Hooknum == *b.Hooknum && a.Priority != nil && *a.Priority == *b.Priority &&
		a.Policy != nil && *a.Policy == *b.Policy
}

func equal(a, b []string) bool {
	if len(a) != len(b) {
		return false
	}
	for i := range a {
		if a[i] != b[i] {
			return false
		}
	}
	return true
}

// fingerprint tells rules apart.
func fingerprint(rule []expr.Any) string {
	h := sha256.New()
	for _, e := range rule {
		b, err := expr.Marshal(unix.NFPROTO_INET, e)
		if err != nil {
			panic(err) // our own rules, each of which a test marshals
		}
		_, _ = h.Write(b)
	}
	return hex.EncodeToString(h.Sum(nil)[:8])
}

// removeTable deletes it, if there.
func removeTable(ns *netns.NS, name string) error {
	c, err := openNFT(ns)
	if err != nil {
		return err
	}
	defer func() { _ = c.CloseLasting() }()
	t := &nftables.Table{Family: nftables.TableFamilyINet, Name: name}
	c.AddTable(t)
	c.DelTable(t)
	return c.Flush()
}
