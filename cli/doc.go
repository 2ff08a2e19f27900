// Package cli owns what people type and read: the h8s commands, their progress and
// output, and the table of reasons with exit codes and advice. It must not know how
// a node works, only package cluster's and status's view of it.
package cli
