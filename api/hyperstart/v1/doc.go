// Package hyperstart is the generated form of hyperstart.proto, the contract
// between the shim and PID 1 of a Pod's VM. `make generate` writes it anew.
package hyperstart
