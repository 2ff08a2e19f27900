// Package stdio connects the standard streams of container processes to the streams
// the shim has opened for them.
//
// It owns pipes, terminals' master sides and the copying. It must not know how
// processes are started.
package stdio

import (
	"fmt"
	"net"
	"sync"

	"github.com/containerd/errdefs"
)

// maxWaiting bounds streams that have come and not been taken yet.
const maxWaiting = 4096

// Key names a stream: file descriptor FD (0, 1, 2) of a process.
type Key struct {
	Container, Exec string
	FD              uint32
}

// Registry holds the streams the shim has opened until their process takes them. A
// stream that comes later, from a shim that reconnected, replaces the process's old
// one. It may be used concurrently.
type Registry struct {
	mu      sync.Mutex
	waiting map[Key]net.Conn
	taken   map[Key]func(net.Conn)
}

// NewRegistry returns an empty registry.
func NewRegistry() *Registry {
	return &Registry{waiting: map[Key]net.Conn{}, taken: map[Key]func(net.Conn){}}
}

// Register hands over a stream; on success the registry owns it.
func (r *Registry) Register(k Key, conn net.Conn) error {
	if k.FD > 2 {
		return fmt.Errorf("stream for file descriptor %d: must be 0 to 2: %w", k.FD, errdefs.ErrInvalidArgument)
	}
	r.mu.Lock()
	attach := r.taken[k]
	var old net.Conn
	if attach == nil {
		if len(r.waiting) >= maxWaiting {
			r.mu.Unlock()
			return fmt.Errorf("more than %d streams wait for their process: %w", maxWaiting, errdefs.ErrResourceExhausted)
		}
		old = r.waiting[k]
		r.waiting[k] = conn
	}
	r.mu.Unlock()
	if old != nil {
		_ = old.Close()
	}
	if attach != nil {
		attach(conn)
	}
	return nil
}

// take gives the stream of k, or nil, and has later ones passed to attach.
func (r *Registry) take(k Key, attach func(net.Conn)) net.Conn {
	r.mu.Lock()
	defer r.mu.Unlock()
	conn := r.waiting[k]
	delete(r.waiting, k)
	r.taken[k] = attach
	return conn
}

// Forget closes what waits for a process and stops passing on new streams.
func (r *Registry) Forget(container, exec string) {
	var old []net.Conn
	r.mu.Lock()
	for fd := range uint32(3) {
		k := Key{container, exec, fd}
		if c := r.waiting[k]; c != nil {
			old = append(old, c)
		}
		delete(r.waiting, k)
		delete(r.taken, k)
	}
	r.mu.Unlock()
	for _, c := range old {
		_ = c.Close()
	}
}
