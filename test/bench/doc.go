// Package bench measures what a Pod costs when it is a virtual machine, side by side
// in one run, so that the machine's mood cancels out:
//
//   - bare: QEMU with our kernel on our machine, up to the first instruction of an
//     init that is 200 bytes of machine code; nobody with this VMM and kernel is faster;
//   - hyper: a Pod by CRI, RunPodSandbox to the first line of the first container;
//   - runc: the same Pod by the same containerd with the runc handler;
//   - memory of an idle Pod: Pss of its VMM and its shim, MemAvailable of its guest;
//   - TCP through the Pod's NIC.
//
// And what a tenant's Network costs (BenchmarkNetwork), beside what upstream does for the
// one network it has, on nodes and Pods that are namespaces, with a real API server:
//
//   - a Pod's network: our CNI plugin and kubestack beside the ptp plugin;
//   - Services: kubestack beside kube-proxy in nftables mode, all at once and one change;
//   - TCP: through edges and VXLAN beside a plain veth pair and ptp Pods, and through
//     ClusterIPs of either;
//   - names: a Network's resolver beside CoreDNS;
//   - memory, the daemons' and the kernel's.
//
// And what a Pod's volume costs (BenchmarkStorage), by the same program everywhere: of class
// local and on Ceph, beside the same guest on a plain virtio-blk disk, the host's file, and
// the ways in between.
//
// It owns the measuring and the report; it must not know how VMs start. Run it with
// `make bench`. It needs root, QEMU and the built programs in $H8S_OUT, starts a
// runtime-only node of its own named $H8S_BENCH_NODE ("bench") and removes it again.
// $H8S_BENCH_ROUNDS (5) is the number of rounds; out/bench/ receives report.md,
// samples.json, and network and storage likewise, out/share/overhead.json the overhead to
// give the RuntimeClass.
package bench
