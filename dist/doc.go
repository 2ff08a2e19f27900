// Package dist is the parent of the upstream components a node runs: Kubernetes with
// etcd and metrics-server, containerd with the CNI plugins, CoreDNS, the CSI sidecars. Each is a module of
// its own, because their version graphs cannot be one: a main.go that says which commands
// the binary has, and a go.mod that pins the versions.
//
// They are unmodified. Nothing below may import this project's code, nor it theirs.
package dist
