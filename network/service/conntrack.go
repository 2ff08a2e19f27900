package service

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"slices"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// tcpSynSent is the conntrack state of a connection nobody answered yet.
const tcpSynSent = 1

// stale matches flows which are to choose again: UDP to an endpoint that is not the
// front's any more or to none at all, TCP to one only while it is not answered.
// Established connections end when their ends want it.
type stale struct {
	// fronts that changed, with the endpoints a flow may keep.
	fronts map[front][]netip.AddrPort
}

// newStale joins the two variants of fronts.
func newStale(moved map[front]entry, all map[front]entry) *stale {
	s := &stale{fronts: make(map[front][]netip.AddrPort, len(moved))}
	for f := range moved {
		f.inside = false
		g := f
		g.inside = true
		s.fronts[f] = slices.Concat(all[f].eps, all[g].eps)
	}
	return s
}

// needed says whether a protocol is concerned that has such flows.
func (s *stale) needed(v6 bool) bool {
	for f := range s.fronts {
		if f.addr.Is6() == v6 && f.proto != unix.IPPROTO_SCTP {
			return true
		}
	}
	return false
}

// MatchConntrackFlow implements netlink.CustomConntrackFilter.
func (s *stale) MatchConntrackFlow(flow *netlink.ConntrackFlow) bool {
	f := front{addr: address(flow.Forward.DstIP), proto: flow.Forward.Protocol, port: flow.Forward.DstPort}
	eps, ok := s.fronts[f]
	if !ok {
		return false
	}
	switch f.proto {
	case unix.IPPROTO_UDP:
	case unix.IPPROTO_TCP:
		if p, ok := flow.ProtoInfo.(*netlink.ProtoInfoTCP); !ok || p.State != tcpSynSent {
			return false
		}
	default:
		return false
	}
	return !slices.Contains(eps, netip.AddrPortFrom(address(flow.Reverse.SrcIP), flow.Reverse.SrcPort))
}

func address(ip net.IP) netip.Addr {
	a, _ := netip.AddrFromSlice(ip)
	return a.Unmap()
}

// forget deletes the flows.
func (s *stale) forget(h *netlink.Handle) (int, error) {
	if len(s.fronts) == 0 {
		return 0, nil
	}
	total := 0
	for _, fam := range []netlink.InetFamily{unix.AF_INET, unix.AF_INET6} {
		if !s.needed(fam == unix.AF_INET6) {
			continue
		}
		// An interrupted dump may have missed flows.
		for attempt := 0; ; attempt++ {
			n, err := h.ConntrackDeleteFilters(netlink.ConntrackTable, fam, s)
			total += int(n)
			if err == nil {
				break
			}
			if attempt == 4 || !errors.Is(err, netlink.ErrDumpInterrupted) {
				return total, fmt.Errorf("delete conntrack entries: %w", err)
			}
		}
	}
	return total, nil
}
