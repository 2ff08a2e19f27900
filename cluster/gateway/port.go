package gateway

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"
)

// ListenLoopback listens on a port of the host's loopback. If the port is taken it
// returns a *PortInUseError that names the program.
func ListenLoopback(port int) (net.Listener, error) {
	l, err := net.Listen("tcp4", fmt.Sprintf("127.0.0.1:%d", port))
	if errors.Is(err, unix.EADDRINUSE) {
		return nil, &PortInUseError{Port: port, Owner: Owner(port), Err: unix.EADDRINUSE}
	}
	return l, err
}

// Owner names the process listening on a TCP port, as "name (pid N)", or returns ""
// if it cannot be found.
func Owner(port int) string {
	for _, table := range []string{"/proc/net/tcp", "/proc/net/tcp6"} {
		f, err := os.Open(table)
		if err != nil {
			continue
		}
		inode := listeningInode(f, port)
		_ = f.Close()
		if inode == "" {
			continue
		}
		if owner := socketOwner("socket:[" + inode + "]"); owner != "" {
			return owner
		}
	}
	return ""
}

// listeningInode finds the socket inode listening on port in a /proc/net/tcp table.
func listeningInode(table io.Reader, port int) string {
	const listen = "0A"
	suffix := fmt.Sprintf(":%04X", port)
	sc := bufio.NewScanner(table)
	for sc.Scan() {
		f := strings.Fields(sc.Text())
		if len(f) > 9 && strings.HasSuffix(f[1], suffix) && f[3] == listen {
			return f[9]
		}
	}
	return ""
}

func socketOwner(link string) string {
	fds, _ := filepath.Glob("/proc/[0-9]*/fd/*") // the pattern is correct, so no error
	for _, fd := range fds {
		if target, err := os.Readlink(fd); err != nil || target != link {
			continue
		}
		dir := filepath.Dir(filepath.Dir(fd))
		comm, err := os.ReadFile(filepath.Join(dir, "comm"))
		if err != nil {
			return ""
		}
		return fmt.Sprintf("%s (pid %s)", strings.TrimSpace(string(comm)), filepath.Base(dir))
	}
	return ""
}
