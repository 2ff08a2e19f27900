package edge

import (
	"context"
	"crypto/sha256"
	"encoding/binary"
	"fmt"
	"slices"

	"github.com/containerd/errdefs"
	"github.com/google/nftables"
	"github.com/google/nftables/binaryutil"
	"github.com/google/nftables/expr"
)

// A front is an uplink without a Pod: the port by which clients from outside come to a
// Service (an address on the carrier's layer 2, to which a floating IP may lead).
//
//	client ── n<x> ▸ package service translates ▸ p<y>            to a Pod here, as the client
//	                                            ▸ n<x> ── Pod     elsewhere, as the front
//
// Answers of Pods here come in by p<y>, whose own rule leads out by the Pod's port, which
// the front's address must not leave by. The connection's mark says that it came by a
// front, its original destination which, and the packet's mark leads to the table of that.
// What the edge itself says as the front (refusals) is led there by its source.

// tMark is a packet's mark as a value of a map.
var tMark = nftables.TypeMark

// fronts are the sets that say which there are: link : address. What follows from them is in
// carried's sets, which change with every attachment.
func fronts() []set {
	return []set{
		{name: "fronts4", key: []nftables.SetDatatype{tIf}, data: &t4},
		{name: "fronts6", key: []nftables.SetDatatype{tIf}, data: &t6},
	}
}

// addFronts adds a Spec's fronts, and what follows from them.
func addFronts(want map[string]elements, s Spec) {
	slots := s.slots()
	for _, x := range s.Fronts {
		for _, a := range x.Addresses {
			f := family(a)
			want["fronts"+f][key(ifname(uplinkOf(x.Link)))] = key(a.AsSlice())
		}
		want["marks"][key(ifname(uplinkOf(x.Link)))] = string(binaryutil.NativeEndian.PutUint32(slots[x.Link]))
	}
	followFronts(want, want)
}

// keepFronts adds those there are.
func keepFronts(want, have map[string]elements) {
	for _, f := range []string{"fronts4", "fronts6"} {
		for k, v := range have[f] {
			want[f][k] = v
		}
	}
	followFronts(want, want)
}

func followFronts(want, from map[string]elements) {
	for _, f := range []string{"4", "6"} {
		for link, a := range from["fronts"+f] {
			want["pairs"][link+link] = ""
			want["ports"+f][link+a] = ""
			want["own"+f][a] = ""
			want["owner"+f][link] = a
		}
	}
}

// front is the one of a link, nil if there is none.
func (s Spec) front(link string) *Front {
	if i := slices.IndexFunc(s.Fronts, func(f Front) bool { return f.Link == link }); i >= 0 {
		return &s.Fronts[i]
	}
	return nil
}

// slots are the marks of fronts, by link. One keeps its mark when others come and go, but
// for a collision, as connections know theirs by it.
func (s Spec) slots() map[string]uint32 {
	const size = 1<<(32-frontShift) - 2 // neither none nor the mask itself
	var all []string
	for _, f := range s.Fronts {
		all = append(all, f.Link)
	}
	slices.Sort(all)
	out, taken := map[string]uint32{}, map[uint32]bool{}
	for _, l := range all {
		sum := sha256.Sum256([]byte(l))
		n := binary.BigEndian.Uint32(sum[:]) % size
		for taken[n] {
			n = (n + 1) % size
		}
		taken[n] = true
		out[l] = (n + 1) << frontShift
	}
	return out
}

// markFront gives a connection the mark of the front it came in by; one that came by
// another uplink ends the rule.
func markFront() []expr.Any {
	return []expr.Any{
		inLink.expr(reg),
		&expr.Lookup{SourceRegister: reg, DestRegister: reg, IsDestRegSet: true, SetName: "marks"},
		&expr.Ct{Key: expr.CtKeyMARK, Register: reg, SourceRegister: true},
	}
}

// markAsFront gives a packet its connection's.
func markAsFront() []expr.Any {
	return append(ctBits(expr.CtKeyMARK, frontMask),
		&expr.Ct{Key: expr.CtKeyMARK, Register: reg},
		&expr.Bitwise{SourceRegister: reg, DestRegister: reg, Len: 4, Mask: binaryutil.NativeEndian.PutUint32(frontMask), Xor: make([]byte, 4)},
		&expr.Meta{Key: expr.MetaKeyMARK, Register: reg, SourceRegister: true})
}

// AnnounceFront tells the carrier's layer 2 where a front's addresses are. Call it once its
// uplink is wired.
func (e *Edge) AnnounceFront(ctx context.Context, link string) error {
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.gone || e.spec == nil {
		return fmt.Errorf("edge %s is not ensured: %w", e.id, errdefs.ErrUnavailable)
	}
	f := e.spec.front(link)
	if f == nil {
		return fmt.Errorf("edge %s has no front %s: %w", e.id, link, errdefs.ErrNotFound)
	}
	l, err := linkByName(e.nl, uplinkOf(link))
	if err != nil {
		return err
	}
	if l == nil {
		return fmt.Errorf("edge %s: front %s has no uplink: %w", e.id, link, errdefs.ErrNotFound)
	}
	for _, a := range f.Addresses {
		if a.Is6() && !e.m.ipv6 {
			continue
		}
		if err := gratuitous(e.ns, l, a); err != nil {
			return fmt.Errorf("announce %s: %w", a, err)
		}
	}
	return nil
}
