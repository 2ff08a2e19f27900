package netns

import (
	"errors"
	"io"
	"net"
	"os"
	"path/filepath"
	"testing"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

func root(t *testing.T) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("needs root: it makes network namespaces")
	}
}

func create(t *testing.T) *NS {
	t.Helper()
	root(t)
	path := filepath.Join(t.TempDir(), "some", "ns")
	n, err := Create(path)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = n.Close()
		if err := Remove(path); err != nil {
			t.Error(err)
		}
	})
	return n
}

func inode(t *testing.T, path string) uint64 {
	t.Helper()
	var st unix.Stat_t
	if err := unix.Stat(path, &st); err != nil {
		t.Fatal(err)
	}
	return st.Ino
}

func TestLife(t *testing.T) {
	n := create(t)
	if _, err := Create(n.Path()); !errdefs.IsAlreadyExists(err) {
		t.Errorf("create again: %v", err)
	}
	again, err := Open(n.Path())
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = again.Close() }()
	here := inode(t, "/proc/self/ns/net")
	var there uint64
	if err := again.Do(func() error { there = inode(t, "/proc/thread-self/ns/net"); return nil }); err != nil {
		t.Fatal(err)
	}
	if there == here || there != inode(t, n.Path()) {
		t.Errorf("f ran in %d, namespace is %d, ours %d", there, inode(t, n.Path()), here)
	}
	if inode(t, "/proc/self/ns/net") != here {
		t.Error("the process changed its namespace")
	}
	want := errors.New("mine")
	if err := n.Do(func() error { return want }); !errors.Is(err, want) {
		t.Errorf("error of f: %v", err)
	}
	for range 2 {
		if err := Remove(n.Path()); err != nil {
			t.Error(err)
		}
	}
	if _, err := Open(n.Path()); !errdefs.IsNotFound(err) {
		t.Errorf("open after remove: %v", err)
	}
	if err := n.Do(func() error { return nil }); err != nil { // lives while held
		t.Error(err)
	}
}

// A killed Create leaves a file that is no namespace.
func TestLeftover(t *testing.T) {
	root(t)
	path := filepath.Join(t.TempDir(), "ns")
	if err := os.WriteFile(path, nil, 0o444); err != nil {
		t.Fatal(err)
	}
	if _, err := Open(path); !errdefs.IsNotFound(err) {
		t.Errorf("open of a file: %v", err)
	}
	n, err := Create(path)
	if err != nil {
		t.Fatal(err)
	}
	_ = n.Close()
	if err := Remove(path); err != nil {
		t.Error(err)
	}
	if _, err := os.Stat(path); !os.IsNotExist(err) {
		t.Errorf("left: %v", err)
	}
}

func TestSockets(t *testing.T) {
	n := create(t)
	nl, err := n.Netlink()
	if err != nil {
		t.Fatal(err)
	}
	defer nl.Close()
	links, err := nl.LinkList()
	if err != nil || len(links) == 0 || links[0].Attrs().Name != "lo" {
		t.Fatalf("links %v, %v", links, err)
	}
	if err := nl.LinkSetUp(links[0]); err != nil {
		t.Fatal(err)
	}
	l, err := n.Listen(t.Context(), "tcp", "127.0.0.1:80")
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = l.Close() }()
	done := make(chan error, 1)
	go func() {
		c, err := l.Accept()
		if err == nil {
			_, err = io.WriteString(c, "here")
			_ = c.Close()
		}
		done <- err
	}()
	c, err := n.DialContext(t.Context(), "tcp", "127.0.0.1:80")
	if err != nil {
		t.Fatal(err)
	}
	if b, err := io.ReadAll(c); err != nil || string(b) != "here" {
		t.Errorf("got %q, %v", b, err)
	}
	_ = c.Close()
	if err := <-done; err != nil {
		t.Error(err)
	}
	if c, err := net.Dial("tcp", "127.0.0.1:80"); err == nil {
		_ = c.Close()
		t.Error("the listener is in our own namespace, too")
	}
	u, err := n.ListenPacket(t.Context(), "udp", "127.0.0.1:53")
	if err != nil {
		t.Fatal(err)
	}
	_ = u.Close()
	nft, err := n.NFTables()
	if err != nil {
		t.Fatal(err)
	}
	if tables, err := nft.ListTables(); err != nil || len(tables) != 0 {
		t.Errorf("tables %v, %v", tables, err)
	}
}
