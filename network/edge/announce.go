package edge

import (
	"encoding/binary"
	"net"
	"net/netip"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/hypernetes/hypernetes/network/netns"
)

// gratuitous tells those on a link that an address is at this end of it now.
func gratuitous(ns *netns.NS, link netlink.Link, a netip.Addr) error {
	mac := link.Attrs().HardwareAddr
	if len(mac) != 6 {
		return nil // not Ethernet: nobody resolves addresses there
	}
	var frame []byte
	if a.Is4() {
		frame = gratuitousARP(mac, a)
	} else {
		frame = unsolicitedNA(mac, a)
	}
	return ns.Do(func() error {
		fd, err := unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, 0)
		if err != nil {
			return err
		}
		defer func() { _ = unix.Close(fd) }()
		return unix.Sendto(fd, frame, 0, &unix.SockaddrLinklayer{Ifindex: link.Attrs().Index, Halen: 6})
	})
}

func ethernet(dst, src net.HardwareAddr, kind uint16) []byte {
	b := append(append([]byte(nil), dst...), src...)
	return binary.BigEndian.AppendUint16(b, kind)
}

// gratuitousARP is an announcement as of RFC 5227 §3.
func gratuitousARP(mac net.HardwareAddr, a netip.Addr) []byte {
	b := ethernet(net.HardwareAddr{255, 255, 255, 255, 255, 255}, mac, unix.ETH_P_ARP)
	b = append(b, 0, 1, 8, 0, 6, 4, 0, 1) // Ethernet, IPv4, request
	b = append(append(b, mac...), a.AsSlice()...)
	return append(append(b, 0, 0, 0, 0, 0, 0), a.AsSlice()...)
}

// unsolicitedNA is an unsolicited neighbour advertisement to all nodes, RFC 4861 §7.2.6.
func unsolicitedNA(mac net.HardwareAddr, a netip.Addr) []byte {
	all := netip.MustParseAddr("ff02::1").As16()
	src := a.As16()
	icmp := []byte{136, 0, 0, 0, 0x20, 0, 0, 0} // override
	icmp = append(icmp, src[:]...)
	icmp = append(append(icmp, 2, 1), mac...) // target link-layer address
	pseudo := append(append([]byte(nil), src[:]...), all[:]...)
	pseudo = binary.BigEndian.AppendUint32(pseudo, uint32(len(icmp)))
	pseudo = append(pseudo, 0, 0, 0, unix.IPPROTO_ICMPV6)
	binary.BigEndian.PutUint16(icmp[2:], checksum(append(pseudo, icmp...)))
	b := ethernet(net.HardwareAddr{0x33, 0x33, 0, 0, 0, 1}, mac, unix.ETH_P_IPV6)
	b = append(b, 0x60, 0, 0, 0)
	b = binary.BigEndian.AppendUint16(b, uint16(len(icmp)))
	b = append(b, unix.IPPROTO_ICMPV6, 255)
	b = append(append(b, src[:]...), all[:]...)
	return append(b, icmp...)
}

func checksum(b []byte) uint16 {
	var sum uint32
	for i := 0; i+1 < len(b); i += 2 {
		sum += uint32(b[i])<<8 | uint32(b[i+1])
	}
	if len(b)%2 == 1 {
		sum += uint32(b[len(b)-1]) << 8
	}
	for sum > 0xffff {
		sum = sum>>16 + sum&0xffff
	}
	return ^uint16(sum)
}
