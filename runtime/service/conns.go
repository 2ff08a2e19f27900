package service

import (
	"context"
	"net"
	"sync"

	"github.com/containerd/ttrpc"
)

// conns accepts connections of this user and counts those open. ttrpc's own graceful end
// may take a connection for idle whose answer is about to be written; a peer that has
// closed has what it wanted.
type conns struct{ open sync.WaitGroup }

// Handshake implements ttrpc.Handshaker.
func (c *conns) Handshake(ctx context.Context, conn net.Conn) (net.Conn, any, error) {
	conn, creds, err := ttrpc.UnixSocketRequireSameUser().Handshake(ctx, conn)
	if err != nil {
		return nil, nil, err
	}
	c.open.Add(1)
	return &counted{Conn: conn, done: c.open.Done}, creds, nil
}

// wait returns when every connection is closed, or ctx ends.
func (c *conns) wait(ctx context.Context) {
	closed := make(chan struct{})
	go func() { // ends with the last connection; the caller closes those left
		c.open.Wait()
		close(closed)
	}()
	select {
	case <-closed:
	case <-ctx.Done():
	}
}

type counted struct {
	net.Conn
	once sync.Once
	done func()
}

// Close implements net.Conn.
func (c *counted) Close() error {
	err := c.Conn.Close()
	c.once.Do(c.done)
	return err
}
