package nic

import (
	"context"
	"errors"
	"os"

	hyperstart "github.com/hypernetes/hypernetes/api/hyperstart/v1"
)

// Attachment is a namespace joined to a VM. The zero value is a Pod without a
// network of its own (host network, or only a loopback). It is not safe for
// concurrent use.
type Attachment struct {
	// Links in the namespace's index order: the guest's NICs.
	Links []Link
	// Interfaces, Routes and Neighbors go into hyperstart's ConfigureRequest as
	// they are; routes are in an order in which they can be added.
	Interfaces []*hyperstart.Interface
	Routes     []*hyperstart.Route
	Neighbors  []*hyperstart.Neighbor

	state State
}

// Link is one link of the namespace and the tap that stands for it.
type Link struct {
	// Name in the namespace and in the guest; Tap is the tap's name.
	Name, TapName string
	// MAC is the link's and the guest's, in colon notation.
	MAC string
	MTU int
	// Tap is the open queue (IFF_TAP|IFF_NO_PI|IFF_VNET_HDR, one queue). The tap
	// exists as long as somebody has it open: hand it to the VMM, then Close.
	Tap *os.File
}

// State names what Attach made, for Detach by another process. It is small JSON.
type State struct {
	// NetNS is the namespace's path; "" when nothing was attached.
	NetNS string `json:"netns"`
	// Links are the mirrored links' names, Taps their taps', in the same order.
	Links []string `json:"links,omitempty"`
	Taps  []string `json:"taps,omitempty"`
}

// State returns what Detach needs.
func (a *Attachment) State() State { return a.state }

// Close closes the taps' descriptors; call it once the VMM has its own. It does not
// detach, but a tap nobody has open vanishes.
func (a *Attachment) Close() error {
	var errs []error
	for i := range a.Links {
		if a.Links[i].Tap != nil {
			errs = append(errs, a.Links[i].Tap.Close())
			a.Links[i].Tap = nil
		}
	}
	return errors.Join(errs...)
}

// Attach joins the namespace at netnsPath: every link except loopbacks that is up
// and has an address (other than IPv6 link-local) or a route. What an earlier Attach
// left there is replaced. With netnsPath "" nothing is attached.
//
// From then on the namespace's own stack is silent on these links: what arrives goes
// to the tap before it is looked at, and what the stack itself would send is dropped.
//
// Errors: errdefs.ErrNotFound if there is no such namespace,
// errdefs.ErrFailedPrecondition if the kernel lacks what is needed (named in the
// text), errdefs.ErrNotImplemented for routes a guest cannot be given. On error
// nothing is left behind.
func Attach(ctx context.Context, netnsPath string) (*Attachment, error) {
	return attach(ctx, netnsPath)
}

// Detach undoes Attach. It succeeds for a namespace that is gone and for things
// already removed.
func Detach(ctx context.Context, s State) error { return detach(ctx, s) }
