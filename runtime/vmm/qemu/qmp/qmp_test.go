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
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/containerd/errdefs"
)

// pair returns a client's end and a QEMU's.
func pair(t testing.TB) (client, server *net.UnixConn) {
	t.Helper()
	fds, err := syscall.Socketpair(syscall.AF_UNIX, syscall.SOCK_STREAM|syscall.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	var ends [2]*net.UnixConn
	for i, fd := range fds {
		f := os.NewFile(uintptr(fd), "end")
		c, err := net.FileConn(f)
		if err != nil {
			t.Fatal(err)
		}
		_ = f.Close()
		ends[i] = c.(*net.UnixConn)
		t.Cleanup(func() { _ = c.Close() })
	}
	return ends[0], ends[1]
}

// serve plays QEMU: it answers each command with what reply returns.
func serve(t *testing.T, conn *net.UnixConn, reply func(command string, id uint64) string) {
	t.Helper()
	done := make(chan struct{})
	t.Cleanup(func() { _ = conn.Close(); <-done })
	go func() {
		defer close(done)
		fmt.Fprint(conn, `{"QMP": {"version": {}, "capabilities": ["oob"]}}`+"\r\n")
		for s := bufio.NewScanner(conn); s.Scan(); {
			var m struct {
				Execute string
				ID      uint64
			}
			if json.Unmarshal(s.Bytes(), &m) != nil {
				return
			}
			fmt.Fprint(conn, reply(m.Execute, m.ID))
		}
	}()
}

func ok(id uint64) string { return fmt.Sprintf(`{"return": {}, "id": %d}`+"\r\n", id) }

func TestExecuteAndEvents(t *testing.T) {
	client, server := pair(t)
	events := make(chan Event, 8)
	serve(t, server, func(command string, id uint64) string {
		switch command {
		case "fails":
			return fmt.Sprintf(`{"error": {"class": "DeviceNotFound", "desc": "no such"}, "id": %d}`+"\n", id)
		case "speaks":
			return `{"event": "SHUTDOWN", "data": {"guest": true}, "timestamp": {"seconds": 1}}` + "\r\n" + ok(id)
		case "wrong id":
			return ok(id+1000) + ok(id)
		}
		return ok(id)
	})
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	c, err := Open(ctx, client, func(e Event) { events <- e })
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	if _, err := c.Execute(ctx, "fails", nil); !errors.Is(err, errdefs.ErrNotFound) || !strings.Contains(err.Error(), "no such") {
		t.Errorf("error %v", err)
	}
	for _, command := range []string{"speaks", "wrong id"} {
		if _, err := c.Execute(ctx, command, map[string]any{"a": 1}); err != nil {
			t.Error(err)
		}
	}
	if e := <-events; e.Name != "SHUTDOWN" || string(e.Data) != `{"guest": true}` {
		t.Errorf("event %+v", e)
	}
}

func TestDescriptorsArrive(t *testing.T) {
	client, server := pair(t)
	got := make(chan int, 1)
	go func() {
		fmt.Fprintln(server, `{"QMP": {}}`)
		buf, oob := make([]byte, 4096), make([]byte, 256)
		for id := uint64(1); id <= 2; id++ {
			_, n, _, _, err := server.ReadMsgUnix(buf, oob)
			if err != nil {
				break
			}
			if n > 0 {
				msgs, _ := syscall.ParseSocketControlMessage(oob[:n])
				fds, _ := syscall.ParseUnixRights(&msgs[0])
				for _, fd := range fds {
					_ = syscall.Close(fd)
				}
				got <- len(fds)
			}
			fmt.Fprint(server, ok(id))
		}
	}()
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	c, err := Open(ctx, client, func(Event) {})
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	if _, err := c.Execute(ctx, "add-fd", nil, os.Stdin); err != nil {
		t.Fatal(err)
	}
	if n := <-got; n != 1 {
		t.Errorf("%d descriptors arrived", n)
	}
}

func TestSilenceEndsWithTheContext(t *testing.T) {
	client, server := pair(t)
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Millisecond)
	defer cancel()
	if _, err := Open(ctx, client, func(Event) {}); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("error %v", err)
	}
	_ = server.Close()
}

func TestEndOfConnectionFailsWaiters(t *testing.T) {
	client, server := pair(t)
	serve(t, server, func(command string, id uint64) string {
		if command == "quit" {
			_ = server.Close()
		}
		return ok(id)
	})
	c, err := Open(t.Context(), client, func(Event) {})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := c.Execute(t.Context(), "quit", nil); err == nil {
		t.Error("no error from a closed connection")
	}
	<-c.Done()
	if _, err := c.Execute(t.Context(), "stop", nil); err == nil {
		t.Error("no error after the end")
	}
}

func TestOversizedMessageEndsTheSession(t *testing.T) {
	client, server := pair(t)
	go func() {
		defer server.Close()
		_, _ = server.Write(bytes.Repeat([]byte("x"), MaxMessage+2))
	}()
	if _, err := Open(t.Context(), client, func(Event) {}); !errors.Is(err, bufio.ErrTooLong) {
		t.Errorf("error %v", err)
	}
}

// FuzzRead feeds the whole session: nothing QEMU says may panic the shim, be delivered
// as the answer to another command, or keep the reader alive after the end.
func FuzzRead(f *testing.F) {
	f.Add([]byte(`{"QMP": {}}` + "\r\n" + `{"return": {}, "id": 1}` + "\n"))
	f.Add([]byte(`{"event": "SHUTDOWN", "data": null}` + "\n\n"))
	f.Add([]byte(`{"QMP": 1}` + "\n" + `{"QMP": 2}` + "\n" + `{"error": {}, "id": 1}`))
	f.Add([]byte(`{"id": -1}` + "\n"))
	f.Fuzz(func(t *testing.T, data []byte) {
		client, server := pair(t)
		go func() {
			_, _ = server.Write(data)
			_ = server.CloseWrite()
		}()
		ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
		defer cancel()
		c, err := Open(ctx, client, func(Event) {})
		if errors.Is(err, context.DeadlineExceeded) {
			t.Fatal("session outlives its connection")
		}
		if err == nil {
			c.Close()
		}
	})
}
