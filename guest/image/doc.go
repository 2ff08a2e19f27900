// Package image makes what a Pod's VM boots from: the guest kernel, the initramfs
// (hyperstart, crun, mkfs and e2fsck, modules where the kernel has any) and the template of
// the scratch disk, all from Debian packages of the build machine.
//
// It owns the contents and formats of those files and the cache of what is expensive
// to make. It must not know how VMs are started, nor anything about Pods.
//
// Two kernels are made. "stock" is Debian's own cloud kernel with its modules: nothing
// is compiled, so every machine has it within seconds. "hyper" is HyperKernel, compiled
// from Debian's linux-source with guest/kernel's configuration: it boots in a third of
// the time and has no modules.
package image
