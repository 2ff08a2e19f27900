package edge

import (
	"encoding/binary"
	"net"
	"net/netip"
	"strings"

	"github.com/google/nftables"
	"github.com/google/nftables/binaryutil"
	"github.com/google/nftables/expr"
	"golang.org/x/sys/unix"
)

// Rules are written as sequences of these matches; values go through registers from reg
// on, 4 bytes each.
const reg = unix.NFT_REG32_00

// Set keys' types.
var (
	tIf    = nftables.TypeIFName
	tEther = nftables.TypeEtherAddr
	t4     = nftables.TypeIPAddr
	t6     = nftables.TypeIP6Addr
)

const (
	ctEstablished = 2
	ctRelated     = 4
	ctNew         = 8
	ctInvalid     = 1
	ctUntracked   = 64
	// statusDNAT is the connection-tracking status of what had its destination changed.
	statusDNAT = 1 << 5
)

func rule(parts ...[]expr.Any) []expr.Any {
	var out []expr.Any
	for _, p := range parts {
		out = append(out, p...)
	}
	return out
}

func meta(k expr.MetaKey, op expr.CmpOp, v []byte) []expr.Any {
	return []expr.Any{&expr.Meta{Key: k, Register: reg}, &expr.Cmp{Op: op, Register: reg, Data: v}}
}

// ifname is a link's name as a register holds it; a star at the end matches any rest.
func ifname(name string) []byte {
	if p, ok := strings.CutSuffix(name, "*"); ok {
		return []byte(p)
	}
	b := make([]byte, unix.IFNAMSIZ)
	copy(b, name)
	return b
}

func iif(name string) []expr.Any    { return meta(expr.MetaKeyIIFNAME, expr.CmpOpEq, ifname(name)) }
func iifNot(name string) []expr.Any { return meta(expr.MetaKeyIIFNAME, expr.CmpOpNeq, ifname(name)) }
func oif(name string) []expr.Any    { return meta(expr.MetaKeyOIFNAME, expr.CmpOpEq, ifname(name)) }
func oifNot(name string) []expr.Any { return meta(expr.MetaKeyOIFNAME, expr.CmpOpNeq, ifname(name)) }
func v4() []expr.Any                { return meta(expr.MetaKeyNFPROTO, expr.CmpOpEq, []byte{unix.NFPROTO_IPV4}) }
func v6() []expr.Any                { return meta(expr.MetaKeyNFPROTO, expr.CmpOpEq, []byte{unix.NFPROTO_IPV6}) }
func l4(proto byte) []expr.Any      { return meta(expr.MetaKeyL4PROTO, expr.CmpOpEq, []byte{proto}) }

func dport(p uint16) []expr.Any { return transport(2, binary.BigEndian.AppendUint16(nil, p)) }
func icmpType(t byte) []expr.Any {
	return transport(0, []byte{t})
}

func transport(offset uint32, v []byte) []expr.Any {
	return []expr.Any{
		&expr.Payload{DestRegister: reg, Base: expr.PayloadBaseTransportHeader, Offset: offset, Len: uint32(len(v))},
		&expr.Cmp{Op: expr.CmpOpEq, Register: reg, Data: v},
	}
}

func state(bits uint32) []expr.Any { return ctBits(expr.CtKeySTATE, bits) }
func status(bits uint32) []expr.Any {
	return ctBits(expr.CtKeySTATUS, bits)
}

func ctBits(k expr.CtKey, bits uint32) []expr.Any {
	return []expr.Any{
		&expr.Ct{Key: k, Register: reg},
		&expr.Bitwise{SourceRegister: reg, DestRegister: reg, Len: 4, Mask: binaryutil.NativeEndian.PutUint32(bits), Xor: make([]byte, 4)},
		&expr.Cmp{Op: expr.CmpOpNeq, Register: reg, Data: make([]byte, 4)},
	}
}

// in compares an address, source or destination, with a prefix, its family included.
func in(destination bool, p netip.Prefix) []expr.Any {
	l, family := source4, v4()
	if p.Addr().Is6() {
		l, family = source6, v6()
	}
	if destination {
		l = l.destination()
	}
	mask := net.CIDRMask(p.Bits(), p.Addr().BitLen())
	e := append(family, l.expr(reg))
	if p.Bits() < p.Addr().BitLen() {
		e = append(e, &expr.Bitwise{SourceRegister: reg, DestRegister: reg, Len: l.size, Mask: mask, Xor: make([]byte, l.size)})
	}
	return append(e, &expr.Cmp{Op: expr.CmpOpEq, Register: reg, Data: p.Masked().Addr().AsSlice()})
}

func from(p netip.Prefix) []expr.Any { return in(false, p) }
func to(p netip.Prefix) []expr.Any   { return in(true, p) }

func host(a netip.Addr) netip.Prefix { return netip.PrefixFrom(a, a.BitLen()) }

// load is a value to look up.
type load struct {
	base         expr.PayloadBase
	offset, size uint32
	meta         expr.MetaKey
}

var (
	inLink  = load{meta: expr.MetaKeyIIFNAME, size: 16}
	outLink = load{meta: expr.MetaKeyOIFNAME, size: 16}
	ether   = load{base: expr.PayloadBaseLLHeader, offset: 6, size: 6}
	source4 = load{base: expr.PayloadBaseNetworkHeader, offset: 12, size: 4}
	source6 = load{base: expr.PayloadBaseNetworkHeader, offset: 8, size: 16}
	dest4   = source4.destination()
	dest6   = source6.destination()
)

func (l load) destination() load { l.offset += l.size; return l }

func (l load) expr(r uint32) expr.Any {
	switch {
	case l.meta != 0:
		return &expr.Meta{Key: l.meta, Register: r}
	default:
		return &expr.Payload{DestRegister: r, Base: l.base, Offset: l.offset, Len: l.size}
	}
}

func loads(ls []load) []expr.Any {
	var out []expr.Any
	r := uint32(reg)
	for _, l := range ls {
		out = append(out, l.expr(r))
		r += (l.size + 3) / 4
	}
	return out
}

func inSet(name string, ls ...load) []expr.Any {
	return append(loads(ls), &expr.Lookup{SourceRegister: reg, SetName: name})
}

func notInSet(name string, ls ...load) []expr.Any {
	return append(loads(ls), &expr.Lookup{SourceRegister: reg, SetName: name, Invert: true})
}

// local matches destinations that are the namespace's own.
func local() []expr.Any {
	return []expr.Any{
		&expr.Fib{Register: reg, ResultADDRTYPE: true, FlagDADDR: true},
		&expr.Cmp{Op: expr.CmpOpEq, Register: reg, Data: binaryutil.NativeEndian.PutUint32(unix.RTN_LOCAL)},
	}
}

func accept() []expr.Any { return []expr.Any{&expr.Verdict{Kind: expr.VerdictAccept}} }
func drop() []expr.Any   { return []expr.Any{&expr.Counter{}, &expr.Verdict{Kind: expr.VerdictDrop}} }

func reject() []expr.Any {
	return []expr.Any{&expr.Counter{}, &expr.Reject{Type: unix.NFT_REJECT_ICMPX_UNREACH, Code: unix.NFT_REJECT_ICMPX_ADMIN_PROHIBITED}}
}

func nat(kind expr.NATType, a netip.AddrPort) []expr.Any {
	family := uint32(unix.NFPROTO_IPV4)
	if a.Addr().Is6() {
		family = unix.NFPROTO_IPV6
	}
	n := &expr.NAT{Type: kind, Family: family, RegAddrMin: reg}
	out := []expr.Any{&expr.Immediate{Register: reg, Data: a.Addr().AsSlice()}}
	if a.Port() != 0 {
		out = append(out, &expr.Immediate{Register: reg + 4, Data: binary.BigEndian.AppendUint16(nil, a.Port())})
		n.RegProtoMin, n.Specified = reg+4, true
	}
	return append(out, n)
}

// natByMap translates to what the map has for a value; its name ends in its family.
func natByMap(kind expr.NATType, name string, l load) []expr.Any {
	family := uint32(unix.NFPROTO_IPV4)
	if strings.HasSuffix(name, "6") {
		family = unix.NFPROTO_IPV6
	}
	return []expr.Any{
		l.expr(reg),
		&expr.Lookup{SourceRegister: reg, DestRegister: reg, IsDestRegSet: true, SetName: name},
		&expr.NAT{Type: kind, Family: family, RegAddrMin: reg},
	}
}

// clamp lowers the MSS a SYN asks for.
func clamp(mss uint16) []expr.Any {
	v := binary.BigEndian.AppendUint16(nil, mss)
	const syn, rst, optionMSS = 2, 4, 2
	return rule(l4(unix.IPPROTO_TCP), []expr.Any{
		&expr.Payload{DestRegister: reg, Base: expr.PayloadBaseTransportHeader, Offset: 13, Len: 1},
		&expr.Bitwise{SourceRegister: reg, DestRegister: reg, Len: 1, Mask: []byte{syn | rst}, Xor: []byte{0}},
		&expr.Cmp{Op: expr.CmpOpEq, Register: reg, Data: []byte{syn}},
		&expr.Exthdr{DestRegister: reg, Type: optionMSS, Offset: 2, Len: 2, Op: expr.ExthdrOpTcpopt},
		&expr.Cmp{Op: expr.CmpOpGt, Register: reg, Data: v},
		&expr.Immediate{Register: reg, Data: v},
		&expr.Exthdr{SourceRegister: reg, Type: optionMSS, Offset: 2, Len: 2, Op: expr.ExthdrOpTcpopt},
	})
}

// midway matches TCP of a connection that began where nobody here saw it.
func midway() []expr.Any {
	const fin, syn, rst, ack = 1, 2, 4, 16
	return rule(l4(unix.IPPROTO_TCP), state(ctNew), []expr.Any{
		&expr.Payload{DestRegister: reg, Base: expr.PayloadBaseTransportHeader, Offset: 13, Len: 1},
		&expr.Bitwise{SourceRegister: reg, DestRegister: reg, Len: 1, Mask: []byte{fin | syn | rst | ack}, Xor: []byte{0}},
		&expr.Cmp{Op: expr.CmpOpNeq, Register: reg, Data: []byte{syn}},
	})
}

// reply matches TCP that does not begin a connection.
func reply() []expr.Any {
	const syn, ack = 2, 16
	return rule(l4(unix.IPPROTO_TCP), []expr.Any{
		&expr.Payload{DestRegister: reg, Base: expr.PayloadBaseTransportHeader, Offset: 13, Len: 1},
		&expr.Bitwise{SourceRegister: reg, DestRegister: reg, Len: 1, Mask: []byte{syn | ack}, Xor: []byte{0}},
		&expr.Cmp{Op: expr.CmpOpNeq, Register: reg, Data: []byte{syn}},
	})
}

// untrack keeps connection tracking, and who asks it, from a packet.
func untrack() []expr.Any { return []expr.Any{&expr.Notrack{}} }

func reset() []expr.Any {
	return []expr.Any{&expr.Counter{}, &expr.Reject{Type: unix.NFT_REJECT_TCP_RST}}
}

// flows lets a link have so many connections at once; more match.
func flows(setName string, limit uint32) []expr.Any {
	return append(loads([]load{inLink}), &expr.Dynset{
		SrcRegKey: reg, SetName: setName, Operation: unix.NFT_DYNSET_OP_ADD,
		Exprs: []expr.Any{&expr.Connlimit{Count: limit, Flags: expr.NFT_CONNLIMIT_F_INV}},
	})
}

// marked matches what belongs to a connection that has a mark.
func marked(mark uint32) []expr.Any { return ctBits(expr.CtKeyMARK, mark) }

// markConnection gives a connection a mark and leaves it others.
func markConnection(mark uint32) []expr.Any {
	return []expr.Any{
		&expr.Ct{Key: expr.CtKeyMARK, Register: reg},
		orMark(mark),
		&expr.Ct{Key: expr.CtKeyMARK, Register: reg, SourceRegister: true},
	}
}

// markPacket does that to a packet.
func markPacket(mark uint32) []expr.Any {
	return []expr.Any{
		&expr.Meta{Key: expr.MetaKeyMARK, Register: reg},
		orMark(mark),
		&expr.Meta{Key: expr.MetaKeyMARK, Register: reg, SourceRegister: true},
	}
}

func orMark(mark uint32) expr.Any {
	return &expr.Bitwise{SourceRegister: reg, DestRegister: reg, Len: 4, Mask: binaryutil.NativeEndian.PutUint32(^mark), Xor: binaryutil.NativeEndian.PutUint32(mark)}
}

// oneOf matches one in n at random.
func oneOf(n uint32) []expr.Any {
	if n < 2 {
		return nil
	}
	return []expr.Any{
		&expr.Numgen{Register: reg, Type: unix.NFT_NG_RANDOM, Modulus: n},
		&expr.Cmp{Op: expr.CmpOpEq, Register: reg, Data: make([]byte, 4)},
	}
}

// key makes a set element's key; every part is filled up to 4 bytes.
func key(parts ...[]byte) string {
	var b []byte
	for _, p := range parts {
		b = append(b, p...)
		for len(b)%4 != 0 {
			b = append(b, 0)
		}
	}
	return string(b)
}
