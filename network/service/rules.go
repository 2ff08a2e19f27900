package service

import (
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"net/netip"

	"github.com/google/nftables"
	"github.com/google/nftables/binaryutil"
	"github.com/google/nftables/expr"
	"github.com/google/nftables/userdata"
	"golang.org/x/sys/unix"
)

const tableName = "h8s_svc"

// setID names a set; there is one of each for each family.
type setID uint8

const (
	// setServices: address . protocol . port : class.
	setServices setID = iota
	// setInsideServices: the same for clients inside where it differs.
	setInsideServices
	// setEndpoints: address . protocol . port . index : address . port.
	setEndpoints
	// setRanges: address . protocol . port . source range.
	setRanges
	// setAddrs, setExternal, setLocal: address. setHairpins: address . address.
	setAddrs
	setExternal
	setLocal
	setHairpins
	// setInside: the Network's subnets.
	setInside
	// setAffinity: client . address . protocol . port : address . port; the rules fill it.
	setAffinity
	// setClasses: class : goto its chain.
	setClasses
	setCount
)

var setNames = [setCount]string{
	"svc", "svcin", "ep", "range", "addr", "external", "local", "hairpin", "inside", "affinity", "class",
}

// affinitySize bounds what clients can make the kernel remember.
const affinitySize = 1 << 16

func (s setID) name(v6 bool) string { return setNames[s] + suffix(v6) }

func suffix(v6 bool) string {
	if v6 {
		return "6"
	}
	return "4"
}

func table() *nftables.Table {
	return &nftables.Table{Name: tableName, Family: nftables.TableFamilyINet}
}

// definition is the set as nf_tables is to make it.
func (s setID) definition(v6 bool) *nftables.Set {
	ip := nftables.TypeIPAddr
	if v6 {
		ip = nftables.TypeIP6Addr
	}
	concat := nftables.MustConcatSetType
	front := []nftables.SetDatatype{ip, nftables.TypeInetProto, nftables.TypeInetService}
	d := &nftables.Set{Table: table(), Name: s.name(v6), ID: uint32(s)*2 + 1, KeyByteOrder: binaryutil.BigEndian}
	if v6 {
		d.ID++
	}
	switch s {
	case setServices, setInsideServices:
		d.IsMap, d.Concatenation, d.KeyType, d.DataType = true, true, concat(front...), nftables.TypeMark
	case setEndpoints:
		d.IsMap, d.Concatenation = true, true
		d.KeyType, d.DataType = concat(append(front, nftables.TypeMark)...), concat(ip, nftables.TypeInetService)
	case setRanges:
		d.Interval, d.Concatenation, d.KeyType = true, true, concat(append(front, ip)...)
	case setAddrs, setExternal, setLocal:
		d.KeyType = ip
	case setHairpins:
		d.Concatenation, d.KeyType = true, concat(ip, ip)
	case setInside:
		d.Interval, d.KeyType = true, ip
	case setAffinity:
		d.IsMap, d.Concatenation, d.HasTimeout, d.Dynamic, d.Size = true, true, true, true, affinitySize
		d.KeyType, d.DataType = concat(append([]nftables.SetDatatype{ip}, front...)...), concat(ip, nftables.TypeInetService)
	case setClasses:
		d.IsMap, d.KeyType, d.DataType, d.KeyByteOrder = true, nftables.TypeMark, nftables.TypeVerdict, binaryutil.NativeEndian
	}
	return d
}

// chain is a chain and its rules.
type chain struct {
	nftables.Chain
	rules [][]expr.Any
}

// tag names the content of a rule; it is kept with it, so that a rule of others or of
// another version is told from ours.
func tag(exprs []expr.Any) ([]byte, error) {
	h := sha256.New()
	for _, e := range exprs {
		b, err := expr.Marshal(unix.NFPROTO_INET, e)
		if err != nil {
			return nil, fmt.Errorf("rule: %w", err)
		}
		h.Write(b)
	}
	return userdata.AppendString(nil, userdata.TypeComment, "h8s "+hex.EncodeToString(h.Sum(nil)[:8])), nil
}

// Registers: keys are put together from keyReg on, data of maps goes to dataReg.
const (
	keyReg  = unix.NFT_REG32_00
	dataReg = unix.NFT_REG32_00 + 10
)

// family makes expressions for one family.
type family struct{ v6 bool }

// words is the number of registers of an address.
func (f family) words() uint32 { return uint32(addrLen(f.v6) / 4) }

func (f family) proto() byte {
	if f.v6 {
		return unix.NFPROTO_IPV6
	}
	return unix.NFPROTO_IPV4
}

// only matches packets of the family.
func (f family) only() []expr.Any {
	return []expr.Any{
		&expr.Meta{Key: expr.MetaKeyNFPROTO, Register: keyReg},
		&expr.Cmp{Op: expr.CmpOpEq, Register: keyReg, Data: []byte{f.proto()}},
	}
}

func (f family) addr(src bool, reg uint32) expr.Any {
	offset := uint32(16)
	if f.v6 {
		offset = 24
	}
	if src {
		offset -= uint32(addrLen(f.v6))
	}
	return &expr.Payload{DestRegister: reg, Base: expr.PayloadBaseNetworkHeader, Offset: offset, Len: uint32(addrLen(f.v6))}
}

// front loads destination, protocol and port into reg and following.
func (f family) front(reg uint32) []expr.Any {
	return []expr.Any{
		f.addr(false, reg),
		&expr.Meta{Key: expr.MetaKeyL4PROTO, Register: reg + f.words()},
		&expr.Payload{DestRegister: reg + f.words() + 1, Base: expr.PayloadBaseTransportHeader, Offset: 2, Len: 2},
	}
}

func (f family) in(s setID) expr.Any {
	return &expr.Lookup{SourceRegister: keyReg, SetName: s.name(f.v6)}
}

func (f family) notIn(s setID) expr.Any {
	return &expr.Lookup{SourceRegister: keyReg, SetName: s.name(f.v6), Invert: true}
}

// data looks the key up in a map.
func (f family) data(s setID) expr.Any {
	return &expr.Lookup{SourceRegister: keyReg, DestRegister: dataReg, IsDestRegSet: true, SetName: s.name(f.v6)}
}

// dispatch goes to the chain of the class the front has in s.
func (f family) dispatch(s setID) []expr.Any {
	return append(f.front(keyReg), f.data(s),
		&expr.Lookup{SourceRegister: dataReg, DestRegister: unix.NFT_REG_VERDICT, IsDestRegSet: true, SetName: setClasses.name(f.v6)})
}

func (f family) dnat() expr.Any {
	return &expr.NAT{Type: expr.NATTypeDestNAT, Family: uint32(f.proto()), RegAddrMin: dataReg, RegProtoMin: dataReg + f.words(), Specified: true}
}

func (f family) snat(a netip.Addr) []expr.Any {
	return []expr.Any{
		&expr.Immediate{Register: dataReg, Data: a.AsSlice()},
		&expr.NAT{Type: expr.NATTypeSourceNAT, Family: uint32(f.proto()), RegAddrMin: dataReg},
	}
}

func rule(parts ...[]expr.Any) []expr.Any {
	var out []expr.Any
	for _, p := range parts {
		out = append(out, p...)
	}
	return out
}

func one(e ...expr.Any) []expr.Any { return e }

const rejectChain = "refuse"

// static are the chains there are whatever the Services.
func static(o Options) []chain {
	base := func(name string, hook *nftables.ChainHook, priority nftables.ChainPriority) chain {
		accept := nftables.ChainPolicyAccept
		return chain{Chain: nftables.Chain{Table: table(), Name: name, Type: nftables.ChainTypeNAT,
			Hooknum: hook, Priority: nftables.ChainPriorityRef(priority), Policy: &accept}}
	}
	refuseChain := chain{Chain: nftables.Chain{Table: table(), Name: rejectChain}, rules: [][]expr.Any{
		one(&expr.Meta{Key: expr.MetaKeyL4PROTO, Register: keyReg},
			&expr.Cmp{Op: expr.CmpOpEq, Register: keyReg, Data: []byte{unix.IPPROTO_TCP}},
			&expr.Reject{Type: unix.NFT_REJECT_TCP_RST}),
		one(&expr.Reject{Type: unix.NFT_REJECT_ICMPX_UNREACH, Code: unix.NFT_REJECT_ICMPX_PORT_UNREACH}),
	}}
	pre := base("prerouting", nftables.ChainHookPrerouting, *nftables.ChainPriorityNATDest)
	out := base("output", nftables.ChainHookOutput, *nftables.ChainPriorityNATDest)
	// Before the edge's own source NAT: the first to decide decides.
	post := base("postrouting", nftables.ChainHookPostrouting, *nftables.ChainPriorityNATSource-5)
	translated := one(
		&expr.Ct{Key: expr.CtKeySTATUS, Register: keyReg},
		&expr.Bitwise{SourceRegister: keyReg, DestRegister: keyReg, Len: 4,
			Mask: binaryutil.NativeEndian.PutUint32(1 << 5 /* IPS_DST_NAT */), Xor: make([]byte, 4)},
		&expr.Cmp{Op: expr.CmpOpNeq, Register: keyReg, Data: make([]byte, 4)})
	toRefuse := &expr.Verdict{Kind: expr.VerdictGoto, Chain: rejectChain}
	for _, f := range []family{{false}, {true}} {
		pre.rules = append(pre.rules,
			rule(f.only(), one(f.addr(true, keyReg), f.in(setInside)), f.dispatch(setInsideServices)),
			rule(f.only(), f.dispatch(setServices)),
			rule(f.only(), one(f.addr(false, keyReg), f.in(setAddrs), toRefuse)))
		out.rules = append(out.rules,
			rule(f.only(), f.dispatch(setInsideServices)),
			rule(f.only(), f.dispatch(setServices)),
			rule(f.only(), one(f.addr(false, keyReg), f.in(setAddrs), toRefuse)))
		if gw := ofFamily(o.Gateways, f.v6); gw.IsValid() {
			post.rules = append(post.rules, rule(f.only(), translated,
				one(f.addr(true, keyReg), f.addr(false, keyReg+f.words()), f.in(setHairpins)), f.snat(gw)))
		}
		if ov := ofFamily(o.Overlay, f.v6); ov.IsValid() {
			original, outside := setExternal, []expr.Any(nil)
			if len(insideElements(o.Inside, f.v6)) > 0 {
				original, outside = setAddrs, one(f.addr(true, keyReg), f.notIn(setInside))
			}
			abroad := rule(one(f.addr(false, keyReg), f.notIn(setLocal)), f.snat(ov))
			ours := func(s setID) []expr.Any { return one(&expr.Ct{Key: expr.CtKeyDST, Register: keyReg}, f.in(s)) }
			post.rules = append(post.rules, rule(f.only(), translated, ours(original), outside, abroad))
			// Gateways are in every edge: an answer to one would not come back here.
			if gw := ofFamily(o.Gateways, f.v6); gw.IsValid() {
				post.rules = append(post.rules, rule(f.only(), translated, ours(setAddrs),
					one(f.addr(true, keyReg), &expr.Cmp{Op: expr.CmpOpEq, Register: keyReg, Data: gw.AsSlice()}), abroad))
			}
		}
	}
	return []chain{refuseChain, pre, out, post}
}

func ofFamily(addrs []netip.Addr, v6 bool) netip.Addr {
	for _, a := range addrs {
		if a = a.Unmap(); a.IsValid() && a.Is6() == v6 {
			return a
		}
	}
	return netip.Addr{}
}

// insideElements are the elements of setInside.
func insideElements(inside []netip.Prefix, v6 bool) []nftables.SetElement {
	var out []nftables.SetElement
	for _, p := range reduce(inside, !v6) {
		out = append(out, nftables.SetElement{Key: p.Addr().AsSlice()})
		if end := last(p).Next(); end.IsValid() {
			out = append(out, nftables.SetElement{Key: end.AsSlice(), IntervalEnd: true})
		}
	}
	return out
}

// chain makes the class's chain.
func (k classKey) chain() chain {
	f, c := family{k.v6}, k.class
	ch := chain{Chain: nftables.Chain{Table: table(), Name: k.name()}}
	silence := one(&expr.Verdict{Kind: expr.VerdictDrop})
	switch {
	case c == silent:
		ch.rules = append(ch.rules, silence)
		return ch
	case c.endpoints() == 0:
		ch.rules = append(ch.rules, one(&expr.Verdict{Kind: expr.VerdictGoto, Chain: rejectChain}))
		return ch
	}
	var offset uint32
	if c&inside != 0 {
		offset = uint32(front{inside: true}.base())
	}
	if c&ranged != 0 {
		ch.rules = append(ch.rules, rule(f.front(keyReg), one(f.addr(true, keyReg+f.words()+2), f.notIn(setRanges)), silence))
	}
	choose := rule(f.front(keyReg), one(
		&expr.Numgen{Register: keyReg + f.words() + 2, Modulus: uint32(c.endpoints()), Type: unix.NFT_NG_RANDOM, Offset: offset},
		f.data(setEndpoints)))
	if a := c.affinity(); a > 0 {
		client := append(one(f.addr(true, keyReg)), f.front(keyReg+f.words())...)
		remember := one(&expr.Dynset{SrcRegKey: keyReg, SrcRegData: dataReg, SetName: setAffinity.name(k.v6),
			Operation: unix.NFT_DYNSET_OP_UPDATE, Timeout: a})
		ch.rules = append(ch.rules,
			rule(client, one(f.data(setAffinity)), remember, one(f.dnat())),
			rule(choose, client, remember, one(f.dnat())))
	}
	// What misses here came while its Service changed: without an answer it is sent
	// again, and translated then.
	ch.rules = append(ch.rules, rule(choose, one(f.dnat())), silence)
	return ch
}

func (k classKey) name() string {
	return fmt.Sprintf("n%d-%08x-%s", k.class.endpoints(), uint32(k.class), suffix(k.v6))
}
