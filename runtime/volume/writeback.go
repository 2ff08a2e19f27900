package volume

import (
	"errors"
	"fmt"
	"os"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

// TerminationLimit is how many bytes of a termination message the kubelet reads; ask
// the guest for no more.
const TerminationLimit = 4096

// WriteBack replaces the content of a host file that Plan named as ReadBack with the
// last TerminationLimit bytes of data, which came from the guest.
//
// Errors: errdefs.ErrInvalidArgument if ReadBack is not a termination message of this
// Pod, errdefs.ErrNotFound if the kubelet has removed it.
func (p Pod) WriteBack(readBack string, data []byte) error {
	dir, err := p.dir()
	if err != nil {
		return err
	}
	s := classify(dir, readBack, "")
	if s.kind != kindTermination {
		return fmt.Errorf("%s is no termination message of pod %s: %w", readBack, p.UID, errdefs.ErrInvalidArgument)
	}
	root, err := unix.Open(dir, unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return gone(dir, err)
	}
	defer unix.Close(root)
	// Not created: the kubelet makes the file, and removes it with the container.
	fd, err := unix.Openat2(root, s.rel, &unix.OpenHow{
		Flags:   unix.O_WRONLY | unix.O_NOFOLLOW | unix.O_NONBLOCK | unix.O_CLOEXEC,
		Resolve: unix.RESOLVE_BENEATH | unix.RESOLVE_NO_SYMLINKS | unix.RESOLVE_NO_MAGICLINKS,
	})
	if err != nil {
		return gone(readBack, err)
	}
	f := os.NewFile(uintptr(fd), readBack)
	if st, err := f.Stat(); err != nil || !st.Mode().IsRegular() {
		_ = f.Close()
		return fmt.Errorf("%s is not a regular file: %w", readBack, errdefs.ErrInvalidArgument)
	}
	data = data[max(0, len(data)-TerminationLimit):]
	err = f.Truncate(0)
	if err == nil {
		_, err = f.Write(data)
	}
	if err := errors.Join(err, f.Close()); err != nil {
		return fmt.Errorf("write termination message: %w", err)
	}
	return nil
}
