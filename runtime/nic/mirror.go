package nic

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"strings"

	"github.com/containerd/errdefs"
	"github.com/containerd/log"
	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"
)

const tapPrefix = "tap_"

func attach(ctx context.Context, path string) (*Attachment, error) {
	if path == "" {
		return &Attachment{}, nil
	}
	ns, err := openNS(path)
	if err != nil {
		return nil, err
	}
	defer ns.Close()
	h, err := netlink.NewHandleAt(ns, unix.NETLINK_ROUTE)
	if err != nil {
		return nil, fmt.Errorf("open netlink in %s: %w", path, err)
	}
	defer h.Close()

	links, err := survey(h)
	if err != nil {
		return nil, fmt.Errorf("read links of %s: %w", path, err)
	}
	d, err := describe(links)
	if err != nil {
		return nil, err
	}
	a := &Attachment{Interfaces: d.interfaces, Routes: d.routes, Neighbors: d.neighbors, state: State{NetNS: path}}
	for _, l := range links {
		a.state.Links = append(a.state.Links, l.name)
		a.state.Taps = append(a.state.Taps, tapName(l.name, l.index))
	}
	if err := a.join(ctx, ns, h, links); err != nil {
		// The caller's ctx may be what ended; cleaning up must happen all the same.
		cleanErr := errors.Join(a.Close(), detachIn(ns, h, a.state))
		return nil, errors.Join(err, cleanErr)
	}
	return a, nil
}

// join silences the namespace's stack and then mirrors link by link.
func (a *Attachment) join(ctx context.Context, ns netns.NsHandle, h *netlink.Handle, links []configured) error {
	if err := silence(ns, a.state.Links); err != nil {
		// Worth a Pod only on kernels without nftables: what leaks are the stack's own
		// neighbour and multicast solicitations, with the guest's address on them.
		log.G(ctx).WithError(err).WithField("network", a.state.NetNS).Warn("the namespace's own stack is not silenced")
	}
	for i, l := range links {
		if err := ctx.Err(); err != nil {
			return err
		}
		tap := a.state.Taps[i]
		f, err := mirror(ns, h, l, tap)
		if err != nil {
			return fmt.Errorf("mirror link %s of %s to %s: %w", l.name, a.state.NetNS, tap, err)
		}
		a.Links = append(a.Links, Link{Name: l.name, TapName: tap, MAC: l.mac.String(), MTU: l.mtu, Tap: f})
	}
	return nil
}

// survey lists the links to mirror in index order.
func survey(h *netlink.Handle) ([]configured, error) {
	all, err := h.LinkList()
	if err != nil {
		return nil, err
	}
	var out []configured
	for _, link := range all {
		at := link.Attrs()
		if at.Flags&net.FlagLoopback != 0 || at.Flags&net.FlagUp == 0 || strings.HasPrefix(at.Name, tapPrefix) {
			continue
		}
		l := configured{name: at.Name, index: at.Index, mac: at.HardwareAddr, mtu: at.MTU}
		if l.addrs, err = h.AddrList(link, netlink.FAMILY_ALL); err != nil {
			return nil, fmt.Errorf("addresses of %s: %w", at.Name, err)
		}
		for _, family := range []int{netlink.FAMILY_V4, netlink.FAMILY_V6} {
			routes, err := h.RouteList(link, family)
			if err != nil {
				return nil, fmt.Errorf("routes of %s: %w", at.Name, err)
			}
			l.routes = append(l.routes, routes...)
		}
		if l.neighs, err = h.NeighList(at.Index, netlink.FAMILY_ALL); err != nil {
			return nil, fmt.Errorf("neighbours of %s: %w", at.Name, err)
		}
		if hasConfig(l) {
			out = append(out, l)
		}
	}
	return out, nil
}

func hasConfig(l configured) bool {
	for _, a := range l.addrs {
		if usable(a) {
			return true
		}
	}
	for _, r := range l.routes {
		if !skipRoute(r, l.addrs) {
			return true
		}
	}
	return false
}

// mirror makes tap and the two redirections. The tap comes up last, so that no packet
// of the guest enters the namespace's stack through it.
func mirror(ns netns.NsHandle, h *netlink.Handle, l configured, tap string) (_ *os.File, err error) {
	if err := removeLink(h, tap); err != nil {
		return nil, err
	}
	var f *os.File
	if err := inNS(ns, func() (err error) {
		if f, err = openTap(tap); err != nil {
			return err
		}
		// Else the kernel gives the tap a link-local address and greets the guest with
		// router solicitations. Without IPv6 there is no such file.
		p := "/proc/sys/net/ipv6/conf/" + tap + "/disable_ipv6"
		if err := os.WriteFile(p, []byte("1"), 0); err != nil && !errors.Is(err, os.ErrNotExist) {
			return fmt.Errorf("switch IPv6 off on %s: %w", tap, err)
		}
		return nil
	}); err != nil {
		if f != nil {
			_ = f.Close()
		}
		return nil, err
	}
	defer func() {
		if err != nil {
			_ = f.Close()
		}
	}()
	t, err := h.LinkByName(tap)
	if err != nil {
		return nil, fmt.Errorf("find tap: %w", err)
	}
	link, err := h.LinkByIndex(l.index)
	if err != nil {
		return nil, fmt.Errorf("find link: %w", err)
	}
	if err := h.LinkSetMTU(t, l.mtu); err != nil {
		return nil, fmt.Errorf("set MTU %d: %w", l.mtu, err)
	}
	if err := redirect(h, t, link); err != nil {
		return nil, err
	}
	if err := redirect(h, link, t); err != nil {
		return nil, err
	}
	if err := h.LinkSetUp(t); err != nil {
		return nil, fmt.Errorf("set tap up: %w", err)
	}
	return f, nil
}

// redirect sends everything that arrives at from out of to, ahead of the IP stack.
func redirect(h *netlink.Handle, from, to netlink.Link) error {
	qdisc := &netlink.Ingress{QdiscAttrs: netlink.QdiscAttrs{
		LinkIndex: from.Attrs().Index, Handle: netlink.MakeHandle(0xffff, 0), Parent: netlink.HANDLE_INGRESS,
	}}
	if err := h.QdiscDel(qdisc); err != nil && !absent(err) {
		return fmt.Errorf("remove old ingress qdisc of %s: %w", from.Attrs().Name, err)
	}
	if err := h.QdiscAdd(qdisc); err != nil {
		return lacking("ingress qdisc (CONFIG_NET_SCH_INGRESS)", from, err)
	}
	attrs := netlink.FilterAttrs{
		LinkIndex: from.Attrs().Index, Parent: netlink.MakeHandle(0xffff, 0), Protocol: unix.ETH_P_ALL, Priority: 1,
	}
	actions := func() []netlink.Action {
		return []netlink.Action{&netlink.MirredAction{
			ActionAttrs:  netlink.ActionAttrs{Action: netlink.TC_ACT_STOLEN},
			MirredAction: netlink.TCA_EGRESS_REDIR,
			Ifindex:      to.Attrs().Index,
		}}
	}
	err := h.FilterAdd(&netlink.MatchAll{FilterAttrs: attrs, Actions: actions()})
	if errors.Is(err, unix.ENOENT) || errors.Is(err, unix.EOPNOTSUPP) {
		// Small kernels have u32 and not matchall; u32 without keys matches all.
		err = h.FilterAdd(&netlink.U32{FilterAttrs: attrs, Actions: actions()})
	}
	if err != nil {
		return lacking("classifier matchall or u32 with action mirred (CONFIG_NET_CLS_MATCHALL or _U32, CONFIG_NET_ACT_MIRRED)", from, err)
	}
	return nil
}

func lacking(what string, link netlink.Link, err error) error {
	if errors.Is(err, unix.ENOENT) || errors.Is(err, unix.EOPNOTSUPP) {
		return fmt.Errorf("kernel has no %s for link %s: %w: %w", what, link.Attrs().Name, err, errdefs.ErrFailedPrecondition)
	}
	return fmt.Errorf("add %s to link %s: %w", what, link.Attrs().Name, err)
}

func removeLink(h *netlink.Handle, name string) error {
	link, err := h.LinkByName(name)
	var missing netlink.LinkNotFoundError
	if errors.As(err, &missing) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("find link %s: %w", name, err)
	}
	if err := h.LinkDel(link); err != nil && !absent(err) {
		return fmt.Errorf("remove link %s: %w", name, err)
	}
	return nil
}

// absent are the kernel's ways to say that a qdisc or link is not there.
func absent(err error) bool {
	return errors.Is(err, unix.ENOENT) || errors.Is(err, unix.EINVAL) || errors.Is(err, unix.ENODEV)
}

func detach(ctx context.Context, s State) error {
	if s.NetNS == "" {
		return nil
	}
	ns, err := openNS(s.NetNS)
	if errors.Is(err, errdefs.ErrNotFound) {
		return nil
	}
	if err != nil {
		return err
	}
	defer ns.Close()
	h, err := netlink.NewHandleAt(ns, unix.NETLINK_ROUTE)
	if err != nil {
		return fmt.Errorf("open netlink in %s: %w", s.NetNS, err)
	}
	defer h.Close()
	if err := ctx.Err(); err != nil {
		return err
	}
	return detachIn(ns, h, s)
}

func detachIn(ns netns.NsHandle, h *netlink.Handle, s State) error {
	var errs []error
	for _, name := range s.Links {
		link, err := h.LinkByName(name)
		if err != nil {
			continue // the CNI plugin was faster
		}
		q := &netlink.Ingress{QdiscAttrs: netlink.QdiscAttrs{
			LinkIndex: link.Attrs().Index, Handle: netlink.MakeHandle(0xffff, 0), Parent: netlink.HANDLE_INGRESS,
		}}
		if err := h.QdiscDel(q); err != nil && !absent(err) {
			errs = append(errs, fmt.Errorf("remove ingress qdisc of %s: %w", name, err))
		}
	}
	for _, name := range s.Taps {
		errs = append(errs, removeLink(h, name))
	}
	errs = append(errs, removeTable(ns, silenceTable))
	return errors.Join(errs...)
}
