// Package node owns the world a node lives in: its mount, network, UTS and IPC
// namespaces, the mounts and links inside them, and starting and dialling in there.
// It must not know which programs run in that world.
//
// The namespaces are held by a process of their own, the anchor, which does nothing
// but set them up and wait. Nothing is bind-mounted or otherwise pinned on the host:
// when the anchor and the node's processes are gone, so are the namespaces, every
// mount and every link, and the host's mount table was never touched.
package node
