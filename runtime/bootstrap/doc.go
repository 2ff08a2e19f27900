// Package bootstrap is how containerd starts and ends a shim: `start` answers with the
// address of a process it leaves behind, that process serves, and `delete` collects what
// a dead one left.
//
// It owns command line, standard input and output, the socket, the log and the daemon's
// process. It must not know what is served. Nothing but answers appears on standard
// output and error: containerd reads both together.
package bootstrap
