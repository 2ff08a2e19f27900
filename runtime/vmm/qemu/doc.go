// Package qemu implements package vmm with QEMU (7.2 or later), one confined process a
// VM. It owns QEMU's command line, its QMP conversation, the confinement of its process
// and the classification of its end.
//
// It must not know what the channel carries, nor where disks and taps come from: all of
// them are descriptors. QEMU gets no path but its own program, firmware, kernel and
// initramfs, no network but inherited taps, and dies with the process that started it.
//
// A program that uses this package calls MaybeLaunch first in main (and in TestMain):
// QEMU is started through the program's own executable, which confines itself and then
// becomes QEMU.
package qemu
