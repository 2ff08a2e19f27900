package v1alpha1

import (
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// Tenant is a customer of the cluster: users who may touch a set of namespaces and
// networks, and nothing else.
//
// +kubebuilder:object:root=true
// +kubebuilder:resource:scope=Cluster,categories=h8s
// +kubebuilder:subresource:status
// +kubebuilder:printcolumn:name="Phase",type=string,JSONPath=`.status.phase`
// +kubebuilder:printcolumn:name="Networks",type=integer,JSONPath=`.status.networks`
// +kubebuilder:printcolumn:name="Namespaces",type=integer,JSONPath=`.status.namespaces`
// +kubebuilder:printcolumn:name="Project",type=string,JSONPath=`.spec.keystone.projectID`,priority=1
// +kubebuilder:printcolumn:name="Age",type=date,JSONPath=`.metadata.creationTimestamp`
// +kubebuilder:validation:XValidation:rule="self.metadata.name.size() <= 40 && self.metadata.name.matches('^[a-z0-9]([-a-z0-9]*[a-z0-9])?$')",message="metadata.name must be a DNS label of at most 40 characters: it becomes part of a namespace and of group names"
// +kubebuilder:validation:XValidation:rule="!(self.metadata.name in ['system', 'h8s', 'kubeadm', 'keystone'])",message="metadata.name: system, h8s, kubeadm and keystone begin names of users who are no tenant's: choose another"
type Tenant struct {
	metav1.TypeMeta   `json:",inline"`
	metav1.ObjectMeta `json:"metadata,omitempty"`

	// +kubebuilder:default={}
	Spec   TenantSpec   `json:"spec,omitempty"`
	Status TenantStatus `json:"status,omitempty"`
}

// TenantSpec is what the operator grants.
type TenantSpec struct {
	// Description is for people.
	// +kubebuilder:validation:MaxLength=256
	Description string `json:"description,omitempty"`
	// Owners are user names that have the role manager beside its group's members.
	// +kubebuilder:validation:MaxItems=64
	// +kubebuilder:validation:items:MaxLength=256
	// +kubebuilder:validation:XValidation:rule="self.all(o, !o.startsWith('system:') && o != '')",message="owners: an empty name or one that begins with system: is not a tenant's user"
	Owners []string `json:"owners,omitempty"`
	// Keystone ties the tenant to an OpenStack project.
	Keystone *KeystoneProject `json:"keystone,omitempty"`
	// Quota bounds what the tenant may have.
	Quota TenantQuota `json:"quota,omitempty"`
	// RuntimeClasses its Pods may use; the first is the default.
	// +kubebuilder:default={"hyper"}
	// +kubebuilder:validation:MinItems=1
	// +kubebuilder:validation:MaxItems=16
	RuntimeClasses []string `json:"runtimeClasses,omitempty"`
	// PodSecurity is the Pod Security Standard enforced in its namespaces. "privileged"
	// lets containers be privileged inside their VM only: host namespaces and hostPath
	// stay refused.
	// +kubebuilder:validation:Enum=privileged;baseline;restricted
	// +kubebuilder:default=baseline
	PodSecurity string `json:"podSecurity,omitempty"`
	// DefaultNetwork is the Network made with the tenant; none if its subnets are empty.
	// +kubebuilder:default={subnets:{default:{cidr:"10.0.0.0/16"}}}
	DefaultNetwork *NetworkSpec `json:"defaultNetwork,omitempty"`
}

// KeystoneProject names an OpenStack project.
type KeystoneProject struct {
	// ProjectID is its ID, not its name: names are not unique and change.
	// +kubebuilder:validation:Pattern=`^[0-9a-f]{32}$`
	ProjectID string `json:"projectID"`
}

// TenantQuota bounds a tenant. Nil means the default in parentheses.
type TenantQuota struct {
	// Namespaces (10).
	// +kubebuilder:validation:Minimum=0
	Namespaces *int32 `json:"namespaces,omitempty"`
	// Networks (5).
	// +kubebuilder:validation:Minimum=0
	Networks *int32 `json:"networks,omitempty"`
	// Ports (500): NICs of Pods and addresses claimed beforehand.
	// +kubebuilder:validation:Minimum=0
	Ports *int32 `json:"ports,omitempty"`
	// FloatingIPs (10).
	// +kubebuilder:validation:Minimum=0
	FloatingIPs *int32 `json:"floatingIPs,omitempty"`
	// LoadBalancers (10): external addresses of Services.
	// +kubebuilder:validation:Minimum=0
	LoadBalancers *int32 `json:"loadBalancers,omitempty"`
	// PerNamespace is the ResourceQuota of each of its namespaces.
	PerNamespace corev1.ResourceList `json:"perNamespace,omitempty"`
	// ContainerDefaults and ContainerRequests are the LimitRange of each namespace: limits
	// and requests of containers that state none.
	ContainerDefaults corev1.ResourceList `json:"containerDefaults,omitempty"`
	ContainerRequests corev1.ResourceList `json:"containerRequests,omitempty"`
}

// Defaults of TenantQuota.
const (
	DefaultQuotaNamespaces    = 10
	DefaultQuotaNetworks      = 5
	DefaultQuotaPorts         = 500
	DefaultQuotaFloatingIPs   = 10
	DefaultQuotaLoadBalancers = 10
)

// TenantStatus is what the controller saw.
type TenantStatus struct {
	ObservedGeneration int64 `json:"observedGeneration,omitempty"`
	// Phase sums up the conditions.
	// +kubebuilder:validation:Enum=Pending;Active;Degraded;Failed;Terminating
	Phase string `json:"phase,omitempty"`
	// HomeNamespace is where its Networks and other objects are.
	HomeNamespace string `json:"homeNamespace,omitempty"`
	Networks      int32  `json:"networks,omitempty"`
	Namespaces    int32  `json:"namespaces,omitempty"`
	// +listType=map
	// +listMapKey=type
	Conditions []metav1.Condition `json:"conditions,omitempty"`
}

// TenantList is a list of Tenants.
//
// +kubebuilder:object:root=true
type TenantList struct {
	metav1.TypeMeta `json:",inline"`
	metav1.ListMeta `json:"metadata,omitempty"`
	Items           []Tenant `json:"items"`
}

// TenantNamespace asks for a core Namespace of the same name, bound to a Network. The
// object itself, once Bound, is the truth about the binding; nothing on the Namespace is.
//
// +kubebuilder:object:root=true
// +kubebuilder:resource:shortName=tns,categories=h8s
// +kubebuilder:subresource:status
// +kubebuilder:printcolumn:name="Network",type=string,JSONPath=`.spec.network`
// +kubebuilder:printcolumn:name="Phase",type=string,JSONPath=`.status.phase`
// +kubebuilder:printcolumn:name="Reason",type=string,JSONPath=`.status.conditions[?(@.type=="Ready")].message`,priority=1
// +kubebuilder:printcolumn:name="Age",type=date,JSONPath=`.metadata.creationTimestamp`
// +kubebuilder:validation:XValidation:rule="self.metadata.name.size() <= 63 && !self.metadata.name.startsWith('kube-') && !self.metadata.name.startsWith('tenant-') && !self.metadata.name.startsWith('h8s-') && self.metadata.name != 'default'",message="metadata.name: want at most 63 characters that do not begin with kube-, tenant- or h8s-, and not default",messageExpression="'metadata.name: ' + self.metadata.name + ': want at most 63 characters that do not begin with kube-, tenant- or h8s-, and not default'"
type TenantNamespace struct {
	metav1.TypeMeta   `json:",inline"`
	metav1.ObjectMeta `json:"metadata,omitempty"`

	// +kubebuilder:default={}
	Spec   TenantNamespaceSpec   `json:"spec,omitempty"`
	Status TenantNamespaceStatus `json:"status,omitempty"`
}

// TenantNamespaceSpec is what is asked for.
type TenantNamespaceSpec struct {
	// Network of the same home namespace. Immutable: Pods live on it.
	// +kubebuilder:default=default
	// +kubebuilder:validation:MaxLength=63
	// +kubebuilder:validation:XValidation:rule="self == oldSelf",message="spec.network is immutable: delete the TenantNamespace and make it anew"
	Network string `json:"network,omitempty"`
}

// TenantNamespaceStatus is what the controller saw.
type TenantNamespaceStatus struct {
	ObservedGeneration int64 `json:"observedGeneration,omitempty"`
	// Phase: Pending (its Network is not Active yet), Bound, Failed (see conditions; it is
	// tried again), Terminating.
	// +kubebuilder:validation:Enum=Pending;Bound;Failed;Terminating
	Phase string `json:"phase,omitempty"`
	// NamespaceUID and NetworkUID are what it is bound to.
	NamespaceUID string `json:"namespaceUID,omitempty"`
	NetworkUID   string `json:"networkUID,omitempty"`
	// +listType=map
	// +listMapKey=type
	Conditions []metav1.Condition `json:"conditions,omitempty"`
}

// Phases of a TenantNamespace.
const (
	NamespacePending     = "Pending"
	NamespaceBound       = "Bound"
	NamespaceFailed      = "Failed"
	NamespaceTerminating = "Terminating"
)

// TenantNamespaceList is a list of TenantNamespaces.
//
// +kubebuilder:object:root=true
type TenantNamespaceList struct {
	metav1.TypeMeta `json:",inline"`
	metav1.ListMeta `json:"metadata,omitempty"`
	Items           []TenantNamespace `json:"items"`
}
