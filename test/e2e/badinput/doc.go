// Package badinput gives the product what it cannot use: images that are not there or
// damaged, impossible memory limits, a machine without QEMU or kernel, a taken port, a
// full disk, a broken component configuration, malformed command lines. Each must end
// in one clear error with its remedy, in the Pod's events or on the command line, and
// leave everything as it was.
package badinput
