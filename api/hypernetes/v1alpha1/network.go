package v1alpha1

import (
	"strings"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// Network is an isolated layer 3 network of a tenant. CIDRs of different Networks may
// overlap entirely.
//
// +kubebuilder:object:root=true
// +kubebuilder:resource:shortName=net,categories=h8s
// +kubebuilder:subresource:status
// +kubebuilder:printcolumn:name="Subnets",type=string,JSONPath=`.status.subnets[*].cidr`
// +kubebuilder:printcolumn:name="ProviderNetworkID",type=string,JSONPath=`.status.providerNetworkID`
// +kubebuilder:printcolumn:name="Tenant",type=string,JSONPath=`.status.tenant`
// +kubebuilder:printcolumn:name="Status",type=string,JSONPath=`.status.phase`
// +kubebuilder:printcolumn:name="Ports",type=integer,JSONPath=`.status.ports`
// +kubebuilder:printcolumn:name="VNI",type=integer,JSONPath=`.status.vni`,priority=1
// +kubebuilder:printcolumn:name="Age",type=date,JSONPath=`.metadata.creationTimestamp`
// +kubebuilder:validation:XValidation:rule="self.metadata.name.size() <= 63 && self.metadata.name.matches('^[a-z0-9]([-a-z0-9]*[a-z0-9])?$')",message="metadata.name must be a DNS label of at most 63 characters: it becomes part of Port names"
type Network struct {
	metav1.TypeMeta   `json:",inline"`
	metav1.ObjectMeta `json:"metadata,omitempty"`

	Spec   NetworkSpec   `json:"spec"`
	Status NetworkStatus `json:"status,omitempty"`
}

// NetworkSpec is what the tenant asks for.
//
// +kubebuilder:validation:XValidation:rule="has(self.providerNetworkID) && self.providerNetworkID.size() != 0 ? !has(self.subnets) || size(self.subnets) == 0 : has(self.subnets) && size(self.subnets) > 0",message="give subnets, or providerNetworkID to adopt a provider's network, not both"
// +kubebuilder:validation:XValidation:rule="!has(oldSelf.providerNetworkID) || oldSelf.providerNetworkID.size() == 0 || (has(self.providerNetworkID) && self.providerNetworkID == oldSelf.providerNetworkID)",message="providerNetworkID is immutable"
// +kubebuilder:validation:XValidation:rule="!has(oldSelf.subnets) || oldSelf.subnets.all(n, has(self.subnets) && n in self.subnets && self.subnets[n].cidr == oldSelf.subnets[n].cidr)",message="subnets: a subnet's cidr is immutable and a subnet cannot be removed: add another one, or make a new Network"
type NetworkSpec struct {
	// TenantID, if set, must be the owning tenant's name or Keystone project ID: a check
	// that a manifest meant for another tenant is not applied to this one.
	// +kubebuilder:validation:MaxLength=64
	TenantID string `json:"tenantID,omitempty"`
	// Subnets by name. A Pod gets one address of each family there is, from the first
	// subnet, in order of names, that has one left. Subnets may be added to a live Network.
	// +kubebuilder:validation:MaxProperties=16
	Subnets map[string]Subnet `json:"subnets,omitempty"`
	// ProviderNetworkID adopts a network that exists at the provider.
	// +kubebuilder:validation:MaxLength=64
	ProviderNetworkID string `json:"providerNetworkID,omitempty"`
	// Provider that carries it; the cluster's default if empty.
	// +kubebuilder:validation:Enum="";builtin;neutron
	Provider string `json:"provider,omitempty"`
	// HostAccess Routed gives nodes a route to its Pods, which needs CIDRs nobody else in
	// the cluster has and the operator's leave.
	// +kubebuilder:validation:Enum=Isolated;Routed
	// +kubebuilder:default=Isolated
	HostAccess string `json:"hostAccess,omitempty"`
	// Egress SNAT lets Pods out under their node's address; None keeps them in.
	// +kubebuilder:validation:Enum=SNAT;None
	// +kubebuilder:default=SNAT
	Egress string `json:"egress,omitempty"`
	// DNSServers answer names outside the cluster, asked from inside the Network; the
	// node's own resolvers if empty.
	// +kubebuilder:validation:MaxItems=4
	// +kubebuilder:validation:items:MaxLength=45
	// +kubebuilder:validation:XValidation:rule="self.all(a, isIP(a))",message="dnsServers: want IP addresses"
	DNSServers []string `json:"dnsServers,omitempty"`
	// MTU of its Pods' NICs, at most what the fabric carries (also the default).
	// +kubebuilder:validation:Minimum=576
	// +kubebuilder:validation:Maximum=9000
	MTU int32 `json:"mtu,omitempty"`
}

// Subnet is a range of addresses.
//
// +kubebuilder:validation:XValidation:rule="isCIDR(self.cidr) && cidr(self.cidr) == cidr(self.cidr).masked()",message="cidr: want a network like 192.168.0.0/24 without host bits",messageExpression="'cidr: ' + self.cidr + ': want a network like 192.168.0.0/24 without host bits'"
// +kubebuilder:validation:XValidation:rule="!has(self.gateway) || self.gateway.size() == 0 || (isIP(self.gateway) && isCIDR(self.cidr) && cidr(self.cidr).containsIP(self.gateway))",message="gateway must be an address inside cidr",messageExpression="'gateway: ' + self.gateway + ': want an address inside cidr ' + self.cidr + ', or nothing for its first'"
// +kubebuilder:validation:XValidation:rule="!isCIDR(self.cidr) || (cidr(self.cidr).ip().family() == 4 ? cidr(self.cidr).prefixLength() >= 8 && cidr(self.cidr).prefixLength() <= 29 : cidr(self.cidr).prefixLength() >= 48 && cidr(self.cidr).prefixLength() <= 112)",message="cidr: want a prefix length from /8 to /29 for IPv4, from /48 to /112 for IPv6",messageExpression="'cidr: ' + self.cidr + ': want a prefix length from /8 to /29 for IPv4, from /48 to /112 for IPv6'"
type Subnet struct {
	// +kubebuilder:validation:MaxLength=49
	CIDR string `json:"cidr"`
	// Gateway is the address of the Network's router; the first of cidr by default.
	// +kubebuilder:validation:MaxLength=45
	Gateway string `json:"gateway,omitempty"`
}

// NetworkStatus is what the controller saw.
type NetworkStatus struct {
	ObservedGeneration int64 `json:"observedGeneration,omitempty"`
	// Phase: Initializing, Active, Pending (waits for something), Failed (see conditions;
	// it is tried again), Terminating.
	// +kubebuilder:validation:Enum=Initializing;Active;Pending;Failed;Terminating
	Phase string `json:"phase,omitempty"`
	// Tenant is the owner's name.
	Tenant string `json:"tenant,omitempty"`
	// Provider and ProviderNetworkID are what carries it.
	Provider          string `json:"provider,omitempty"`
	ProviderNetworkID string `json:"providerNetworkID,omitempty"`
	// ProviderRouterID and ProviderGroupID are its router and its Ports' security group at a
	// provider that has such.
	ProviderRouterID string `json:"providerRouterID,omitempty"`
	ProviderGroupID  string `json:"providerGroupID,omitempty"`
	// VNI is its VXLAN network identifier (built-in provider).
	VNI int32 `json:"vni,omitempty"`
	// MTU of its Pods' NICs.
	MTU int32 `json:"mtu,omitempty"`
	// Subnets as accepted, gateways filled in, in the order addresses are taken from. Index
	// is stable for the Network's life.
	Subnets []SubnetStatus `json:"subnets,omitempty"`
	// HostAccess is what nodes do: with Routed they have routes to subnets. It stays Routed
	// whatever others ask for later.
	// +kubebuilder:validation:Enum=Isolated;Routed
	HostAccess string `json:"hostAccess,omitempty"`
	// Ports is how many there are, FreeAddresses how many more there can be in the smallest
	// family (at most 2^31-1).
	Ports         int32 `json:"ports,omitempty"`
	FreeAddresses int32 `json:"freeAddresses,omitempty"`
	// +listType=map
	// +listMapKey=type
	Conditions []metav1.Condition `json:"conditions,omitempty"`
}

// SubnetStatus is an accepted subnet.
type SubnetStatus struct {
	Name    string `json:"name"`
	Index   int32  `json:"index"`
	CIDR    string `json:"cidr"`
	Gateway string `json:"gateway"`
	// ProviderSubnetID at the provider.
	ProviderSubnetID string `json:"providerSubnetID,omitempty"`
}

// Phases of a Port.
const (
	PortPending = "Pending"
	PortActive  = "Active"
	PortFailed  = "Failed"
)

// Reasons of a Port's condition Ready while its phase is Failed that who plugs it acts on.
const (
	// ReasonAddressInUse: somebody else has the address at the provider: take another.
	ReasonAddressInUse = "AddressInUse"
	// ReasonBindingFailed: the provider cannot plug it on that node.
	ReasonBindingFailed = "BindingFailed"
)

// Phases of a Network.
const (
	NetworkInitializing = "Initializing"
	NetworkActive       = "Active"
	NetworkPending      = "Pending"
	NetworkFailed       = "Failed"
	NetworkTerminating  = "Terminating"
)

// Values of NetworkSpec.HostAccess and NetworkSpec.Egress.
const (
	HostIsolated = "Isolated"
	HostRouted   = "Routed"
	EgressSNAT   = "SNAT"
	EgressNone   = "None"
)

// Condition types.
const (
	// ConditionReady sums up an object.
	ConditionReady = "Ready"
	// ConditionAddresses is false when a Network has no address left.
	ConditionAddresses = "AddressesAvailable"
	// ConditionInSync is false while the provider's objects differ from ours.
	ConditionInSync = "ProviderInSync"
	// ConditionWired is true while the provider carries a Port's packets.
	ConditionWired = "Wired"
	// ConditionBlocked says what keeps a deleted object from going.
	ConditionBlocked = "DeletionBlocked"
)

// NetworkList is a list of Networks.
//
// +kubebuilder:object:root=true
type NetworkList struct {
	metav1.TypeMeta `json:",inline"`
	metav1.ListMeta `json:"metadata,omitempty"`
	Items           []Network `json:"items"`
}

// Port is an address of a Network: a Pod's NIC, or one claimed beforehand.
//
// +kubebuilder:object:root=true
// +kubebuilder:resource:categories=h8s
// +kubebuilder:subresource:status
// +kubebuilder:selectablefield:JSONPath=`.spec.node`
// +kubebuilder:printcolumn:name="Network",type=string,JSONPath=`.spec.network`
// +kubebuilder:printcolumn:name="Addresses",type=string,JSONPath=`.spec.addresses`
// +kubebuilder:printcolumn:name="Pod",type=string,JSONPath=`.spec.pod.name`
// +kubebuilder:printcolumn:name="Node",type=string,JSONPath=`.spec.node`
// +kubebuilder:printcolumn:name="Phase",type=string,JSONPath=`.status.phase`
// +kubebuilder:printcolumn:name="MAC",type=string,JSONPath=`.spec.mac`,priority=1
// +kubebuilder:validation:XValidation:rule="size(self.spec.addresses) == 0 || self.metadata.name == self.spec.network + '.' + self.spec.addresses[0].replace('.', '-').replace(':', '-')",message="metadata.name must be <network>.<first address, with - for . and :>: the name is the claim",messageExpression="'metadata.name: ' + self.metadata.name + ': want ' + self.spec.network + '.' + self.spec.addresses[0].replace('.', '-').replace(':', '-') + ': the name is the claim of the address'"
type Port struct {
	metav1.TypeMeta   `json:",inline"`
	metav1.ObjectMeta `json:"metadata,omitempty"`

	Spec   PortSpec   `json:"spec"`
	Status PortStatus `json:"status,omitempty"`
}

// PortSpec is the claim and who uses it.
//
// +kubebuilder:validation:XValidation:rule="self.network == oldSelf.network && self.addresses == oldSelf.addresses",message="network and addresses are immutable"
type PortSpec struct {
	// Network of the same home namespace.
	// +kubebuilder:validation:MaxLength=63
	Network string `json:"network"`
	// NetworkUID is that Network's, so that one of the same name made later is another.
	NetworkUID string `json:"networkUID,omitempty"`
	// Addresses, the first of which is the claim; the second family's is derived from it
	// (see package network/ipam).
	// +kubebuilder:validation:MinItems=1
	// +kubebuilder:validation:MaxItems=2
	// +kubebuilder:validation:items:MaxLength=45
	// +kubebuilder:validation:XValidation:rule="self.all(a, isIP(a) && ip.isCanonical(a))",message="addresses: want canonical IP addresses"
	Addresses []string `json:"addresses"`
	// MAC of the NIC; derived from the first address if empty.
	// +kubebuilder:validation:Pattern=`^([0-9a-f]{2}(:[0-9a-f]{2}){5})?$`
	MAC string `json:"mac,omitempty"`
	// Retain keeps the Port when its Pod goes: an address claimed beforehand.
	Retain bool `json:"retain,omitempty"`
	// Node where it is plugged; empty while it is claimed only.
	Node string `json:"node,omitempty"`
	// Pod that has it.
	Pod *PodRef `json:"pod,omitempty"`
	// Service whose clients come in by it, at the node: a load balancer's address in a Network
	// of a provider with ports of its own. It has no Pod then.
	Service *ServiceRef `json:"service,omitempty"`
}

// ServiceRef names a Service.
type ServiceRef struct {
	Namespace string `json:"namespace"`
	Name      string `json:"name"`
	UID       string `json:"uid"`
}

// PodRef names a Pod's NIC.
type PodRef struct {
	Namespace string `json:"namespace"`
	Name      string `json:"name"`
	UID       string `json:"uid"`
	// Sandbox is the CNI container ID: a Pod whose sandbox is made anew has another.
	Sandbox string `json:"sandbox"`
	// Interface in the Pod.
	Interface string `json:"interface"`
}

// PortStatus is what the provider made of it.
type PortStatus struct {
	// Phase: Pending, Active, Failed.
	// +kubebuilder:validation:Enum=Pending;Active;Failed
	Phase string `json:"phase,omitempty"`
	// ProviderPortID at the provider.
	ProviderPortID string `json:"providerPortID,omitempty"`
	// MAC of the NIC, where the provider decides; spec.mac says what was asked for.
	MAC string `json:"mac,omitempty"`
	// VIFType says how the provider wants the NIC plugged (Neutron's binding:vif_type:
	// bridge, ovs); empty while it is bound to no node.
	VIFType string `json:"vifType,omitempty"`
	// +listType=map
	// +listMapKey=type
	Conditions []metav1.Condition `json:"conditions,omitempty"`
}

// PortName is the name that claims an address in a network.
func PortName(network, address string) string {
	return network + "." + strings.NewReplacer(".", "-", ":", "-").Replace(address)
}

// PortList is a list of Ports.
//
// +kubebuilder:object:root=true
type PortList struct {
	metav1.TypeMeta `json:",inline"`
	metav1.ListMeta `json:"metadata,omitempty"`
	Items           []Port `json:"items"`
}
