// Package endpoint keeps gRPC servers reachable at paths of Unix sockets, and tells the
// kubelet about a plugin at one (pluginregistration/v1).
//
// A socket is put in its place by a rename, so that whoever sees the file can dial it,
// and stays there when the process ends: a plugin that is only restarted is not taken for
// one that was removed. One that another removes, or whose directory is made anew, is put
// there again; a restarted kubelet finds all of them.
//
// It owns sockets and registration. It must not know what is served.
package endpoint

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"github.com/containerd/errdefs"
	"github.com/containerd/log"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc"
)

const (
	// look is how often it is looked whether a socket is still there.
	look = 2 * time.Second
	// grace is how long calls may go on when the process ends.
	grace = 5 * time.Second
	// maxPath bounds a socket's path (unix(7)), with the dot of the one that is renamed.
	maxPath = 106
)

// Parse reads unix:///path or a path.
func Parse(s string) (string, error) {
	path, _ := strings.CutPrefix(s, "unix://")
	switch {
	case !filepath.IsAbs(path) || filepath.Clean(path) != path || path == "/":
		return "", fmt.Errorf("endpoint %q: must be unix:// and an absolute path: %w", s, errdefs.ErrInvalidArgument)
	case len(path) > maxPath:
		return "", fmt.Errorf("endpoint %q: a socket's path has %d bytes at most: %w", s, maxPath, errdefs.ErrInvalidArgument)
	}
	return path, nil
}

// Serve serves at a path until ctx ends. ready is called once it can be dialled.
func Serve(ctx context.Context, server *grpc.Server, path string, ready func()) error {
	var serving sync.WaitGroup
	defer serving.Wait()
	defer stop(server)
	bound, err := listen(server, &serving, path)
	if err != nil {
		return err
	}
	ready()
	ticker := time.NewTicker(look)
	defer ticker.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-ticker.C:
		}
		if there(path, bound) {
			continue
		}
		log.G(ctx).WithField("socket", path).Info("socket was removed: serving at a new one")
		again, err := listen(server, &serving, path)
		if err != nil {
			log.G(ctx).WithError(err).Warn("no socket: again soon")
			continue
		}
		bound = again
	}
}

// stop lets calls end, but not for ever.
func stop(server *grpc.Server) {
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		server.GracefulStop()
	}()
	select {
	case <-ended:
	case <-time.After(grace):
		server.Stop()
		<-ended
	}
}

// listen replaces what is at path by a socket that is served already.
func listen(server *grpc.Server, serving *sync.WaitGroup, path string) (unix.Stat_t, error) {
	var bound unix.Stat_t
	dir, name := filepath.Split(path)
	if err := os.MkdirAll(dir, 0o750); err != nil {
		return bound, fmt.Errorf("socket %s: %w", path, err)
	}
	if info, err := os.Lstat(path); err == nil && info.Mode().Type() != os.ModeSocket {
		return bound, fmt.Errorf("socket %s: there is a %s: remove it: %w", path, info.Mode().Type(), errdefs.ErrFailedPrecondition)
	}
	// The kubelet passes over names that begin with a dot.
	hidden := filepath.Join(dir, "."+name)
	if err := os.Remove(hidden); err != nil && !errors.Is(err, os.ErrNotExist) {
		return bound, fmt.Errorf("socket %s: %w", path, err)
	}
	l, err := net.ListenUnix("unix", &net.UnixAddr{Net: "unix", Name: hidden})
	if err != nil {
		return bound, fmt.Errorf("socket %s: %w", path, err)
	}
	l.SetUnlinkOnClose(false)
	err = os.Chmod(hidden, 0o600)
	if err == nil {
		err = unix.Lstat(hidden, &bound)
	}
	if err == nil {
		err = os.Rename(hidden, path)
	}
	if err != nil {
		_ = l.Close()
		return bound, fmt.Errorf("socket %s: %w", path, err)
	}
	serving.Go(func() { _ = server.Serve(l) }) // its end is the server's
	return bound, nil
}

func there(path string, bound unix.Stat_t) bool {
	var now unix.Stat_t
	return unix.Lstat(path, &now) == nil && now.Ino == bound.Ino && now.Dev == bound.Dev
}
