// Package runtime is the parent of everything that runs Pods as virtual machines on a
// node: the containerd shim (bootstrap, service, sandbox, agent, stdio, events), what it
// decides (config, podspec, ocispec, volume), the host resources it takes (cgroup,
// vmuser, nic, disk, vmm) and what collects them after a crash (janitor).
//
// It holds no code. Nothing below it may import a command, the cluster or Kubernetes:
// one such process lives per Pod.
package runtime
