// Package network is the room of tenant networks. It owns nothing itself; its packages:
//
//	netns       runs code in a network namespace
//	edge        edge namespaces: links, routes, overlay, anti-spoofing, egress
//	service     Services as nftables maps in an edge namespace
//	policy      NetworkPolicy as nftables sets in an edge namespace
//	dns         one resolver per Network, inside its edge
//	probe       probes and hooks, dialled from the edge
//	ipam        which address a Port gets, and the claim of it
//	kubestack   the node daemon that drives all of these from the API
//	cni         the CNI plugin in front of it
//	controller  the cluster's reconcilers: Network, Port, FloatingIP, AddressPool, VIPs
//	provider    what carries a Network
//
// It must not know how VMs start.
package network
