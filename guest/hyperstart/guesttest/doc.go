// Package guesttest boots hyperstart in a virtual machine and drives it as the shim
// does, over the channel. It has tests only; they need QEMU and the built guest image
// ($H8S_OUT/share) and say so when they are skipped.
package guesttest
