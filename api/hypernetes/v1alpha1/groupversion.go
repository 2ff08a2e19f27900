package v1alpha1

import (
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
)

// GroupVersion of every object here.
var GroupVersion = schema.GroupVersion{Group: "hypernetes.io", Version: "v1alpha1"}

// AddToScheme registers the objects.
var AddToScheme = schemeBuilder.AddToScheme

var schemeBuilder = runtime.NewSchemeBuilder(func(s *runtime.Scheme) error {
	s.AddKnownTypes(GroupVersion,
		&Tenant{}, &TenantList{}, &TenantNamespace{}, &TenantNamespaceList{},
		&Network{}, &NetworkList{}, &Port{}, &PortList{},
		&FloatingIP{}, &FloatingIPList{}, &AddressPool{}, &AddressPoolList{},
		&LocalVolume{}, &LocalVolumeList{}, &LocalSnapshot{}, &LocalSnapshotList{}, &LocalStore{}, &LocalStoreList{})
	metav1.AddToGroupVersion(s, GroupVersion)
	return nil
})

// Names that several parts agree on.
const (
	// SystemNamespace holds what belongs to the cluster's own controllers.
	SystemNamespace = "h8s-system"
	// ClaimNamespace holds the Leases that claim VNIs ("vni-<n>") and external
	// addresses ("address-<address with . and : as ->"). holderIdentity names the owner:
	// "<kind>/<namespace>/<name>/<uid>".
	ClaimNamespace = SystemNamespace
	// HomePrefix and the tenant's name make its home namespace.
	HomePrefix = "tenant-"
	// DefaultNetwork is the Network every tenant begins with.
	DefaultNetwork = "default"

	// LabelTenant on a Namespace displays which tenant it belongs to and selects it for
	// admission; only controllers may write it. The binding itself is the TenantNamespace.
	LabelTenant = "hypernetes.io/tenant"
	// LabelNetwork on a Namespace displays its Network; on a Port it selects the Ports of one.
	LabelNetwork = "hypernetes.io/network"
	// LabelService on a Port that has spec.service is that Service's UID.
	LabelService = "hypernetes.io/service-uid"
	// LabelHome marks the tenant's home namespace.
	LabelHome = "hypernetes.io/home"

	// LabelServiceProxy on a Service keeps kube-proxy away; its value is ServiceProxy.
	LabelServiceProxy = "service.kubernetes.io/service-proxy-name"
	ServiceProxy      = "hypernetes.io"

	// AnnotationNetworks on a Pod asks, when it is created, for more NICs: a JSON list of
	// NetworkRequest. Frozen by admission afterwards.
	AnnotationNetworks = "hypernetes.io/networks"
	// AnnotationAddress on a Pod asks for addresses of its first NIC, comma-separated, or
	// names a Port claimed beforehand ("port/<name>"). Frozen by admission afterwards.
	AnnotationAddress = "hypernetes.io/address"
	// AnnotationProbes keeps the probes and hooks of a Pod as they were written.
	AnnotationProbes = "hypernetes.io/probes"

	// Finalizer is set by the controllers of this group.
	Finalizer = "hypernetes.io/cleanup"
	// FinalizerProvider keeps a Port until the provider's port of it is gone. Who makes a
	// Port of a Network whose provider has ports of its own sets it; the controller of Ports
	// does where it is missing.
	FinalizerProvider = "hypernetes.io/provider"

	// GroupPrefix begins the groups of a tenant's users: h8s:tenant:<tenant>:<role>.
	GroupPrefix = "h8s:tenant:"
)

// Role is what a tenant's user may do.
type Role string

// The roles of a tenant's users, each including the one before.
const (
	RoleReader  Role = "reader"
	RoleMember  Role = "member"
	RoleManager Role = "manager"
)

// Group is the group of a tenant's users who have a role.
func Group(tenant string, r Role) string { return GroupPrefix + tenant + ":" + string(r) }

// Home is a tenant's home namespace.
func Home(tenant string) string { return HomePrefix + tenant }

// NetworkRequest is one further NIC of a Pod (AnnotationNetworks).
type NetworkRequest struct {
	// Name of a Network in the home namespace of the Pod's tenant.
	Name string `json:"name"`
	// Interface in the Pod; net1, net2, … by default.
	Interface string `json:"interface,omitempty"`
	// Addresses asked for, at most one per family.
	Addresses []string `json:"addresses,omitempty"`
}
