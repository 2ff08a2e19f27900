// Package mountinfo owns reading a process's table of mounts (proc_pid_mountinfo(5)). It
// must not know what anybody looks for in it.
package mountinfo

import (
	"fmt"
	"io"
	"os"
	"strconv"
	"strings"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

// maxSize bounds a table; a mount has some hundred bytes, and the kernel bounds their
// number (fs.mount-max, 100000).
const maxSize = 64 << 20

// Mount is a line of the table.
type Mount struct {
	Device string // major:minor
	Root   string // of the mount within its file system
	Target string
	Type   string
	Source string
	// Options are the file system's, not the mount's.
	Options string
}

// Read reads the mounts that the process ("self", or a pid) sees, those on top of others
// after them.
func Read(process string) ([]Mount, error) {
	f, err := os.Open("/proc/" + process + "/mountinfo")
	if err != nil {
		return nil, err
	}
	defer f.Close()
	b, err := io.ReadAll(io.LimitReader(f, maxSize+1))
	if err != nil {
		return nil, err
	}
	if len(b) > maxSize {
		return nil, fmt.Errorf("%s has over %d bytes: %w", f.Name(), maxSize, errdefs.ErrResourceExhausted)
	}
	return Parse(string(b)), nil
}

// Parse skips lines it cannot read: the kernel writes none, and one odd mount elsewhere
// should not stop every Pod.
func Parse(text string) []Mount {
	var out []Mount
	for line := range strings.Lines(text) {
		head, tail, ok := strings.Cut(strings.TrimSuffix(line, "\n"), " - ")
		if !ok {
			continue
		}
		// Not Fields: a source may be empty.
		h, t := strings.Split(head, " "), strings.Split(tail, " ")
		if len(h) < 6 || len(t) < 3 {
			continue
		}
		out = append(out, Mount{Device: h[2], Root: unescape(h[3]), Target: unescape(h[4]), Type: t[0], Source: unescape(t[1]), Options: unescape(t[2])})
	}
	return out
}

// unescape reads the kernel's \ooo for space, tab, newline and backslash.
func unescape(s string) string {
	if !strings.Contains(s, `\`) {
		return s
	}
	var b strings.Builder
	for i := 0; i < len(s); i++ {
		if s[i] == '\\' && i+4 <= len(s) {
			if n, err := strconv.ParseUint(s[i+1:i+4], 8, 8); err == nil {
				b.WriteByte(byte(n))
				i += 3
				continue
			}
		}
		b.WriteByte(s[i])
	}
	return b.String()
}

// At returns the topmost mount exactly on target.
func At(mounts []Mount, target string) (Mount, bool) {
	for i := len(mounts) - 1; i >= 0; i-- {
		if mounts[i].Target == target {
			return mounts[i], true
		}
	}
	return Mount{}, false
}

// Number is the device's, as st_dev has it.
func (m Mount) Number() (uint64, bool) {
	major, minor, ok := strings.Cut(m.Device, ":")
	a, err1 := strconv.ParseUint(major, 10, 32)
	b, err2 := strconv.ParseUint(minor, 10, 32)
	return unix.Mkdev(uint32(a), uint32(b)), ok && err1 == nil && err2 == nil
}
