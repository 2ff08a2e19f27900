package nic

import (
	"context"
	"net"
)

// Dialer opens a connection to a TCP port of the guest's loopback, of IPv4 or IPv6.
// The connection should have CloseWrite() error, to pass a client's end of file on,
// and must obey deadlines.
type Dialer func(ctx context.Context, port uint16, ipv6 bool) (net.Conn, error)

// PortForwarder answers every TCP connection made inside the namespace to a loopback
// address (what a CRI runtime does for port-forward) and joins it to a connection of
// its Dialer. Its methods may be called concurrently.
type PortForwarder struct{ forwarder }

// NewPortForwarder listens in the namespace at netnsPath until Close; dial is called
// from several goroutines. A port is tried in the family it was dialled in, then in
// the other, because the caller takes the first family that connects, which here is
// always IPv4. If the guest refuses both, the connection is reset.
//
// At most 128 connections are carried at once; more wait in the listener's backlog.
// Ends of file are passed on one way at a time; after the first, the other way may
// pause for five minutes at most. ctx bounds nothing but the start.
func NewPortForwarder(ctx context.Context, netnsPath string, dial Dialer) (*PortForwarder, error) {
	return newPortForwarder(ctx, netnsPath, dial)
}

// Close stops listening, ends the connections, removes the redirection and waits for
// every goroutine. It is idempotent.
func (p *PortForwarder) Close() error { return p.forwarder.close() }
