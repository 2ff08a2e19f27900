// Package provider owns the words between the controller of Networks and what carries
// them: what is asked for and what came of it. Who carries Networks is in the packages
// below; what a carrier must do is tested by providertest. It must not know any of them.
package provider

import v1alpha1 "github.com/hypernetes/hypernetes/api/hypernetes/v1alpha1"

// Names of the providers.
const (
	Builtin = "builtin"
	Neutron = "neutron"
)

// State is what a provider made of a Network.
type State struct {
	// NetworkID names it at the provider; empty where it has no name of its own.
	NetworkID string
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
