// Package provider owns the words between the controller of Networks and what carries
// them: what is asked for and what came of it. Who carries Networks is in the packages
// below; what a carrier must do is tested by providertest. It must not know any of them.
package provider

import (
	"errors"
	"fmt"
	"time"

	"k8s.io/apimachinery/pkg/types"

	v1alpha1 "github.com/hypernetes/hypernetes/api/hypernetes/v1alpha1"
)

// Names of the providers.
const (
	Builtin = "builtin"
	Neutron = "neutron"
)

// State is what a provider made of a Network.
type State struct {
	// NetworkID names it at the provider; empty where it has no name of its own. RouterID
	// and GroupID are what belongs to it, of providers that have such.
	NetworkID, RouterID, GroupID string
	// VNI of the overlay, of providers that leave the overlay to the nodes.
	VNI int32
	// MTU that Pods' NICs may have.
	MTU int32
	// Subnets as the provider has them: those asked for, IDs filled in; those of an adopted
	// network.
	Subnets []v1alpha1.SubnetStatus
	// Repaired says what differed at the provider and was put right, for an event; empty if
	// nothing did.
	Repaired string
}

// PortState is what a provider made of a Port.
type PortState struct {
	// ID names it at the provider.
	ID  string
	MAC string
	// VIFType says how it wants to be plugged; empty while it belongs to no node.
	VIFType string
	// Wired says that packets pass, Why what is missing if not.
	Wired bool
	Why   string
	// Repaired as in State.
	Repaired string
}

// AddressState is what a provider made of a FloatingIP.
type AddressState struct {
	// ID names it at the provider, Pool where the address is of.
	ID, Pool, Address string
	// Repaired as in State.
	Repaired string
}

// Resource is one that a provider made, and the object that it made it for.
type Resource struct {
	// Kind, ID and Project as the provider has them.
	Kind, ID, Project string
	// Owner is the object's UID.
	Owner types.UID
}

// Fault is an error with a reason in one word, for conditions and events. Its class is the
// wrapped error's.
type Fault struct {
	Reason string
	Err    error
}

var _ error = (*Fault)(nil)

// Faultf makes a Fault; format should wrap a class of package errdefs.
func Faultf(reason, format string, args ...any) error {
	return &Fault{reason, fmt.Errorf(format, args...)}
}

// Error implements error.
func (f *Fault) Error() string { return f.Err.Error() }

// Unwrap is the error itself.
func (f *Fault) Unwrap() error { return f.Err }

// Reason is an error's, or otherwise if it has none.
func Reason(err error, otherwise string) string {
	var f *Fault
	if errors.As(err, &f) {
		return f.Reason
	}
	return otherwise
}

// RetryAfter is how long who answered with err wants to be left alone; 0 if it did not say.
func RetryAfter(err error) time.Duration {
	var e interface {
		error
		RetryAfter() time.Duration
	}
	if errors.As(err, &e) {
		return e.RetryAfter()
	}
	return 0
}
