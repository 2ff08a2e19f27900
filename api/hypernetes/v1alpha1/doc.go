// Package v1alpha1 owns the Hypernetes API objects, group hypernetes.io: Tenant,
// TenantNamespace, Network, Port, FloatingIP and AddressPool, with the validation the
// API server itself can do (OpenAPI and CEL). It must not know who acts on them.
//
// Scope. Tenant and AddressPool are the operator's and cluster-scoped. The others live
// in their tenant's home namespace, tenant-<name>, so that plain RBAC lets a tenant list
// its own and nobody else's. A tenant has no verb on core Namespaces.
//
// Claims. A Port is the claim of its first address: its name is
// <network>.<address with . and : as ->, so that two nodes cannot take one address. Other
// numbers (VNIs, external addresses) are claimed by coordination.k8s.io Leases in the
// namespace h8s-system, see ClaimNamespace.
//
// +kubebuilder:object:generate=true
// +groupName=hypernetes.io
package v1alpha1
