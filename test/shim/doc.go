// Package shim drives the real containerd-shim-hyper-v2 with real virtual machines over
// ttrpc, as containerd does and without it. It holds tests only.
package shim
