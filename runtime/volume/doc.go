// Package volume decides what each mount of a container becomes in the Pod's VM: the
// kubelet prepares volumes as host directories, and a VM shares none of them.
//
// It owns the knowledge of the kubelet's directory layout, the packing of small
// trees into messages and the watching of those that change. It must not know the
// channel, the VMM or the Kubernetes API. Everything it reads below the kubelet's
// directory may have been named by a tenant, so paths are resolved beneath the
// volume and never through symbolic links a tenant could have made.
package volume
