// Package qmp speaks the QEMU machine protocol over a connected Unix socket: commands
// with answers, file descriptors alongside, and events.
//
// It owns framing and its limits: QEMU runs the guest, so what it says is not trusted
// further than the guest is. It must not know what any command does.
package qmp

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"sync"
	"syscall"

	"github.com/containerd/errdefs"
)

// MaxMessage bounds one message from QEMU, in bytes. Answers to the commands used here
// are a few KiB at most.
const MaxMessage = 1 << 20

// Event is something QEMU reports on its own.
type Event struct {
	Name string
	// Data is the event's JSON object; nil if it has none.
	Data json.RawMessage
}

// Error is a command's failure as QEMU reports it.
type Error struct {
	Command, Class, Desc string
}

func (e *Error) Error() string { return fmt.Sprintf("qmp %s: %s", e.Command, e.Desc) }

// Is makes QEMU's DeviceNotFound an errdefs.ErrNotFound.
func (e *Error) Is(target error) bool {
	return target == errdefs.ErrNotFound && e.Class == "DeviceNotFound"
}

// message is any line QEMU sends.
type message struct {
	Greeting json.RawMessage `json:"QMP"`
	ID       *uint64         `json:"id"`
	Return   json.RawMessage `json:"return"`
	Error    *struct {
		Class string `json:"class"`
		Desc  string `json:"desc"`
	} `json:"error"`
	Event string          `json:"event"`
	Data  json.RawMessage `json:"data"`
}

type answer struct {
	result json.RawMessage
	err    error
}

// Client is one QMP session. Its methods may be called concurrently.
type Client struct {
	conn *net.UnixConn
	done chan struct{}

	// sending keeps a message whole and, for a command with descriptors, the channel to
	// itself until the answer: QEMU forgets descriptors when it reads the next message.
	sending chan struct{}

	mu      sync.Mutex
	next    uint64
	waiting map[uint64]waiter
	err     error
}

type waiter struct {
	command string
	ch      chan answer
}

// Open waits for QEMU's greeting on conn, negotiates capabilities and then delivers
// events to handle, one at a time from one goroutine, until the connection ends. It
// owns conn from then on, also when it fails.
func Open(ctx context.Context, conn *net.UnixConn, handle func(Event)) (*Client, error) {
	c := &Client{conn: conn, done: make(chan struct{}), sending: make(chan struct{}, 1), waiting: map[uint64]waiter{}}
	greeted := make(chan struct{})
	go c.read(handle, greeted)
	select {
	case <-greeted:
	case <-c.done:
		return nil, fmt.Errorf("qmp greeting: %w", c.failure())
	case <-ctx.Done():
		c.Close()
		return nil, fmt.Errorf("qmp greeting: %w", ctx.Err())
	}
	if _, err := c.Execute(ctx, "qmp_capabilities", nil); err != nil {
		c.Close()
		return nil, err
	}
	return c, nil
}

// Execute sends a command with arguments (nil for none; else what encodes as a JSON
// object) and files' descriptors, and returns the answer. When ctx ends first the
// command may still take effect.
func (c *Client) Execute(ctx context.Context, command string, arguments any, files ...*os.File) (json.RawMessage, error) {
	w := waiter{command: command, ch: make(chan answer, 1)}
	id := c.register(w)
	defer c.forget(id)
	line, err := json.Marshal(struct {
		Execute   string `json:"execute"`
		ID        uint64 `json:"id"`
		Arguments any    `json:"arguments,omitempty"`
	}{command, id, arguments})
	if err != nil {
		return nil, fmt.Errorf("qmp %s: %w", command, err)
	}
	select {
	case c.sending <- struct{}{}:
	case <-c.done:
		return nil, fmt.Errorf("qmp %s: %w", command, c.failure())
	case <-ctx.Done():
		return nil, fmt.Errorf("qmp %s: %w", command, ctx.Err())
	}
	deadline, _ := ctx.Deadline() // zero is none
	_ = c.conn.SetWriteDeadline(deadline)
	err = c.send(append(line, '\n'), files)
	if len(files) == 0 {
		<-c.sending
	} else {
		defer func() { <-c.sending }()
	}
	if err != nil {
		return nil, fmt.Errorf("qmp %s: %w", command, err)
	}
	select {
	case a := <-w.ch:
		return a.result, a.err
	case <-c.done:
		select { // it may have been answered just before the end
		case a := <-w.ch:
			return a.result, a.err
		default:
			return nil, fmt.Errorf("qmp %s: %w", command, c.failure())
		}
	case <-ctx.Done():
		return nil, fmt.Errorf("qmp %s: %w", command, ctx.Err())
	}
}

// Done is closed when the session is over and its goroutine has ended.
func (c *Client) Done() <-chan struct{} { return c.done }

// Close ends the session and waits for the event handler to return; it must not be
// called from there.
func (c *Client) Close() {
	_ = c.conn.Close()
	<-c.done
}

func (c *Client) register(w waiter) uint64 {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.next++
	c.waiting[c.next] = w
	return c.next
}

func (c *Client) forget(id uint64) {
	c.mu.Lock()
	defer c.mu.Unlock()
	delete(c.waiting, id)
}

func (c *Client) failure() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.err
}

func (c *Client) send(line []byte, files []*os.File) error {
	if len(files) == 0 {
		_, err := c.conn.Write(line)
		return err
	}
	fds := make([]int, len(files))
	for i, f := range files {
		fds[i] = int(f.Fd())
	}
	n, _, err := c.conn.WriteMsgUnix(line, syscall.UnixRights(fds...), nil)
	if err == nil && n < len(line) {
		_, err = c.conn.Write(line[n:])
	}
	return err
}

func (c *Client) read(handle func(Event), greeted chan<- struct{}) {
	defer close(c.done)
	lines := bufio.NewScanner(c.conn)
	lines.Buffer(make([]byte, 0, 4096), MaxMessage)
	var err error
	for err == nil && lines.Scan() {
		var m message
		if m, err = decode(lines.Bytes()); err != nil {
			break
		}
		switch {
		case m.Greeting != nil:
			if greeted != nil {
				close(greeted)
				greeted = nil
			}
		case m.Event != "":
			handle(Event{Name: m.Event, Data: m.Data})
		case m.ID != nil:
			c.answer(m)
		}
	}
	if err == nil {
		err = lines.Err()
	}
	if err == nil || errors.Is(err, net.ErrClosed) {
		err = fmt.Errorf("connection closed: %w", errdefs.ErrUnavailable)
	}
	c.mu.Lock()
	c.err = err
	c.mu.Unlock()
	_ = c.conn.Close()
}

func (c *Client) answer(m message) {
	c.mu.Lock()
	w, ok := c.waiting[*m.ID]
	delete(c.waiting, *m.ID)
	c.mu.Unlock()
	if !ok {
		return // its caller gave up, or QEMU made the id up
	}
	a := answer{result: m.Return}
	if m.Error != nil {
		a.err = &Error{Command: w.command, Class: m.Error.Class, Desc: m.Error.Desc}
	}
	w.ch <- a
}

// decode reads one line. Scalars are copied, raw JSON too: the line's memory is reused.
func decode(line []byte) (message, error) {
	var m message
	line = bytes.TrimSpace(line)
	if len(line) == 0 {
		return m, nil
	}
	if err := json.Unmarshal(line, &m); err != nil {
		return message{}, fmt.Errorf("message %.80q: %w", line, err)
	}
	return m, nil
}
