package v1alpha1

import metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

// FloatingIP is an external address of one Pod: what arrives for it goes to the Pod, and
// the Pod goes out under it.
//
// +kubebuilder:object:root=true
// +kubebuilder:resource:shortName=fip,categories=h8s
// +kubebuilder:subresource:status
// +kubebuilder:printcolumn:name="Address",type=string,JSONPath=`.status.address`
// +kubebuilder:printcolumn:name="Target",type=string,JSONPath=`.status.target`
// +kubebuilder:printcolumn:name="Node",type=string,JSONPath=`.status.node`
// +kubebuilder:printcolumn:name="Phase",type=string,JSONPath=`.status.phase`
// +kubebuilder:printcolumn:name="Age",type=date,JSONPath=`.metadata.creationTimestamp`
type FloatingIP struct {
	metav1.TypeMeta   `json:",inline"`
	metav1.ObjectMeta `json:"metadata,omitempty"`

	Spec   FloatingIPSpec   `json:"spec"`
	Status FloatingIPStatus `json:"status,omitempty"`
}

// FloatingIPSpec is what the tenant asks for.
//
// +kubebuilder:validation:XValidation:rule="!has(oldSelf.pool) || self.pool == oldSelf.pool",message="pool is immutable"
// +kubebuilder:validation:XValidation:rule="!has(oldSelf.address) || oldSelf.address.size() == 0 || self.address == oldSelf.address",message="address is immutable"
// +kubebuilder:validation:XValidation:rule="!(has(self.port) && has(self.pod))",message="give port or pod, not both"
type FloatingIPSpec struct {
	// Pool is an AddressPool the tenant may use; the only or default one if empty.
	Pool string `json:"pool,omitempty"`
	// Address asked for; any free one if empty.
	// +kubebuilder:validation:MaxLength=45
	// +kubebuilder:validation:XValidation:rule="self == '' || isIP(self)",message="address: want an IP address"
	Address string `json:"address,omitempty"`
	// Port, by name, that it belongs to. With neither Port nor Pod it is held unused.
	Port string `json:"port,omitempty"`
	// Pod that it belongs to: its first NIC.
	Pod *PodName `json:"pod,omitempty"`
}

// PodName names a Pod of the tenant.
type PodName struct {
	Namespace string `json:"namespace"`
	Name      string `json:"name"`
}

// FloatingIPStatus is what the controller saw.
type FloatingIPStatus struct {
	ObservedGeneration int64 `json:"observedGeneration,omitempty"`
	// Phase: Pending (no address, see conditions), Held (an address without a target),
	// Active, Terminating (an address is kept back for a while before others may have it).
	// +kubebuilder:validation:Enum=Pending;Held;Active;Terminating
	Phase string `json:"phase,omitempty"`
	Pool  string `json:"pool,omitempty"`
	// Provider that the address is of, if it is of no AddressPool, and its ID there.
	Provider   string `json:"provider,omitempty"`
	ProviderID string `json:"providerID,omitempty"`
	Address    string `json:"address,omitempty"`
	// Network, PortName and Target (its address) are where it leads, Node where that is.
	Network  string `json:"network,omitempty"`
	PortName string `json:"portName,omitempty"`
	Target   string `json:"target,omitempty"`
	Node     string `json:"node,omitempty"`
	// +listType=map
	// +listMapKey=type
	Conditions []metav1.Condition `json:"conditions,omitempty"`
}

// FloatingIPList is a list of FloatingIPs.
//
// +kubebuilder:object:root=true
type FloatingIPList struct {
	metav1.TypeMeta `json:",inline"`
	metav1.ListMeta `json:"metadata,omitempty"`
	Items           []FloatingIP `json:"items"`
}

// AddressPool holds external addresses that the fabric brings to the nodes.
//
// +kubebuilder:object:root=true
// +kubebuilder:resource:scope=Cluster,shortName=pool,categories=h8s
// +kubebuilder:subresource:status
// +kubebuilder:printcolumn:name="Addresses",type=string,JSONPath=`.spec.addresses`
// +kubebuilder:printcolumn:name="Free",type=integer,JSONPath=`.status.free`
// +kubebuilder:printcolumn:name="Tenants",type=string,JSONPath=`.spec.tenants`
// +kubebuilder:printcolumn:name="Age",type=date,JSONPath=`.metadata.creationTimestamp`
type AddressPool struct {
	metav1.TypeMeta   `json:",inline"`
	metav1.ObjectMeta `json:"metadata,omitempty"`

	Spec   AddressPoolSpec   `json:"spec"`
	Status AddressPoolStatus `json:"status,omitempty"`
}

// AddressPoolSpec is what the operator gives away.
type AddressPoolSpec struct {
	// Addresses: CIDRs and ranges ("192.0.2.10-192.0.2.20").
	// +kubebuilder:validation:MinItems=1
	// +kubebuilder:validation:MaxItems=64
	// +kubebuilder:validation:items:MaxLength=96
	// +kubebuilder:validation:XValidation:rule="self.all(a, isCIDR(a) || isIP(a) || (a.split('-').size() == 2 && isIP(a.split('-')[0]) && isIP(a.split('-')[1])))",message="addresses: want CIDRs, addresses, or ranges like 192.0.2.10-192.0.2.20"
	Addresses []string `json:"addresses"`
	// Tenants that may use it; all if empty.
	// +kubebuilder:validation:MaxItems=1024
	Tenants []string `json:"tenants,omitempty"`
	// Default makes it the pool of who names none.
	Default bool `json:"default,omitempty"`
	// QuarantineSeconds an address is kept back after its release; DefaultQuarantine if nil.
	// +kubebuilder:validation:Minimum=0
	// +kubebuilder:default=60
	QuarantineSeconds *int32 `json:"quarantineSeconds,omitempty"`
}

// DefaultQuarantine is AddressPoolSpec.QuarantineSeconds of who says nothing.
const DefaultQuarantine int32 = 60

// AddressPoolStatus is what the controller saw.
type AddressPoolStatus struct {
	Total int32 `json:"total,omitempty"`
	Free  int32 `json:"free,omitempty"`
	// +listType=map
	// +listMapKey=type
	Conditions []metav1.Condition `json:"conditions,omitempty"`
}

// AddressPoolList is a list of AddressPools.
//
// +kubebuilder:object:root=true
type AddressPoolList struct {
	metav1.TypeMeta `json:",inline"`
	metav1.ListMeta `json:"metadata,omitempty"`
	Items           []AddressPool `json:"items"`
}
