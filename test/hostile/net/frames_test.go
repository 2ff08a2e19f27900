package net

import (
	"encoding/binary"
	"net"
	"net/netip"
)

// Frames as a hostile guest makes them.

func mac(s string) net.HardwareAddr {
	m, err := net.ParseMAC(s)
	if err != nil {
		panic(err) // a constant
	}
	return m
}

func eth(dst, src []byte, kind uint16, payload []byte) []byte {
	b := append(append([]byte(nil), dst...), src...)
	return append(binary.BigEndian.AppendUint16(b, kind), payload...)
}

func sum(b []byte) uint16 {
	var s uint32
	for i := 0; i+1 < len(b); i += 2 {
		s += uint32(b[i])<<8 | uint32(b[i+1])
	}
	if len(b)%2 == 1 {
		s += uint32(b[len(b)-1]) << 8
	}
	for s > 0xffff {
		s = s>>16 + s&0xffff
	}
	return ^uint16(s)
}

// ip4 is a packet; flags holds flags and fragment offset.
func ip4(src, dst netip.Addr, proto byte, flags uint16, payload []byte) []byte {
	b := []byte{0x45, 0, 0, 0, 0x12, 0x34, 0, 0, 64, proto, 0, 0}
	binary.BigEndian.PutUint16(b[2:], uint16(20+len(payload)))
	binary.BigEndian.PutUint16(b[6:], flags)
	b = append(append(b, src.AsSlice()...), dst.AsSlice()...)
	binary.BigEndian.PutUint16(b[10:], sum(b))
	return append(b, payload...)
}

func ip6(src, dst netip.Addr, next, hops byte, payload []byte) []byte {
	b := []byte{0x60, 0, 0, 0, 0, 0, next, hops}
	binary.BigEndian.PutUint16(b[4:], uint16(len(payload)))
	b = append(append(b, src.AsSlice()...), dst.AsSlice()...)
	return append(b, payload...)
}

func udpHeader(from, to uint16, payload []byte) []byte {
	b := binary.BigEndian.AppendUint16(nil, from)
	b = binary.BigEndian.AppendUint16(b, to)
	b = binary.BigEndian.AppendUint16(b, uint16(8+len(payload)))
	return append(append(b, 0, 0), payload...)
}

// udp is a UDP packet without a checksum in IPv4, with one in IPv6.
func udp(from, to netip.AddrPort, payload []byte) []byte {
	h := udpHeader(from.Port(), to.Port(), payload)
	if from.Addr().Is4() {
		return ip4(from.Addr(), to.Addr(), 17, 0, h)
	}
	binary.BigEndian.PutUint16(h[6:], sum6(from.Addr(), to.Addr(), 17, h))
	return ip6(from.Addr(), to.Addr(), 17, 64, h)
}

func sum6(src, dst netip.Addr, proto byte, payload []byte) uint16 {
	p := append(append([]byte(nil), src.AsSlice()...), dst.AsSlice()...)
	p = binary.BigEndian.AppendUint32(p, uint32(len(payload)))
	p = append(p, 0, 0, 0, proto)
	return sum(append(p, payload...))
}

func icmp6(src, dst netip.Addr, body []byte) []byte {
	b := append([]byte(nil), body...)
	binary.BigEndian.PutUint16(b[2:], sum6(src, dst, 58, b))
	return ip6(src, dst, 58, 255, b)
}

func arp(smac []byte, sip, tip netip.Addr) []byte {
	b := []byte{0, 1, 8, 0, 6, 4, 0, 1}
	b = append(append(b, smac...), sip.AsSlice()...)
	return append(append(b, 0, 0, 0, 0, 0, 0), tip.AsSlice()...)
}
