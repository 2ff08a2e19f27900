// Package guest is the room of everything that runs inside, or is made for the inside
// of, a Pod's virtual machine: the channel, hyperstart (PID 1) and the guest image.
//
// It must not know the host's file system, Kubernetes or tenants: a guest sees disks
// by serial, interfaces by MAC and what hyperstart.v1 messages say.
package guest
