// Package cluster runs one Hypernetes node with its control plane: it wires the
// packages below it into the daemon behind `h8s up` and `h8s server`.
//
// It owns the order in which things come and go (doctor, certificates, namespaces,
// components, bootstrap objects, images), the daemon's life, and what survives it.
// It must not know the inside of any component: those are unmodified upstream
// programs described by package component and kept alive by package supervisor.
//
// Processes of one node:
//
//	h8s supervise        host namespaces; gateway, supervisor, status socket
//	 └ h8s anchor        holds the node's mount, net, UTS and IPC namespaces
//	etcd, kube-*, containerd, kubelet, metrics-server
//	                     inside those namespaces, each in its own cgroup
//
// Killing `h8s supervise` leaves everything else running, headless: the API is not
// published on the host and nothing is respawned until the next `h8s up`, which
// finds the anchor and adopts every component whose process and command line are
// still the ones it would start itself. A Pod's virtual machine has a cgroup of its own
// below the kubelet's, its shim is left in containerd's; components are ended by process,
// never by cgroup, so Pods outlive containerd, the kubelet and h8s.
package cluster
