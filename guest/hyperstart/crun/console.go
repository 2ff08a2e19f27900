package crun

import (
	"fmt"
	"os"
	"time"

	"golang.org/x/sys/unix"
)

// consoleTimeout bounds the wait for the terminal after crun has succeeded; it sends
// the descriptor before it exits.
const consoleTimeout = 10 * time.Second

// consoleSocket is where crun sends a terminal's master side.
type consoleSocket struct {
	path string
	fd   int
}

func listenConsole(path string) (*consoleSocket, error) {
	fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("open console socket: %w", err)
	}
	if err = unix.Bind(fd, &unix.SockaddrUnix{Name: path}); err == nil {
		err = unix.Listen(fd, 1)
	}
	if err != nil {
		_ = unix.Close(fd)
		return nil, fmt.Errorf("listen on console socket: %w", err)
	}
	return &consoleSocket{path: path, fd: fd}, nil
}

func (s *consoleSocket) close() {
	_ = unix.Close(s.fd)
	_ = os.Remove(s.path)
}

func (s *consoleSocket) receive() (*os.File, error) {
	tv := unix.NsecToTimeval(consoleTimeout.Nanoseconds())
	if err := unix.SetsockoptTimeval(s.fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &tv); err != nil {
		return nil, fmt.Errorf("receive console: %w", err)
	}
	conn, _, err := unix.Accept4(s.fd, unix.SOCK_CLOEXEC)
	if err != nil {
		return nil, fmt.Errorf("receive console: %w", err)
	}
	defer unix.Close(conn)
	if err := unix.SetsockoptTimeval(conn, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &tv); err != nil {
		return nil, fmt.Errorf("receive console: %w", err)
	}
	buf, oob := make([]byte, 4096), make([]byte, unix.CmsgSpace(4))
	_, n, _, _, err := unix.Recvmsg(conn, buf, oob, unix.MSG_CMSG_CLOEXEC)
	if err != nil {
		return nil, fmt.Errorf("receive console: %w", err)
	}
	msgs, err := unix.ParseSocketControlMessage(oob[:n])
	if err != nil || len(msgs) != 1 {
		return nil, fmt.Errorf("receive console: %d control messages: %w", len(msgs), unix.EPROTO)
	}
	fds, err := unix.ParseUnixRights(&msgs[0])
	if err != nil || len(fds) != 1 {
		return nil, fmt.Errorf("receive console: %d descriptors: %w", len(fds), unix.EPROTO)
	}
	if err := unix.SetNonblock(fds[0], true); err != nil {
		_ = unix.Close(fds[0])
		return nil, fmt.Errorf("receive console: %w", err)
	}
	return os.NewFile(uintptr(fds[0]), "console"), nil
}
