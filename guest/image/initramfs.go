package image

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/hypernetes/hypernetes/guest/image/closure"
)

type program struct{ guest, host string }

// programs are what hyperstart runs, by their path in the guest, with the path on the
// build machine (Debian packages crun and e2fsprogs). File systems are grown by ioctl.
var programs = []program{
	{"/usr/bin/crun", "/usr/bin/crun"},
	{"/usr/sbin/mkfs.ext4", "/usr/sbin/mke2fs"},
	{"/usr/sbin/e2fsck", "/usr/sbin/e2fsck"},
}

// xfs (Debian package xfsprogs) is for kernels that have it built in: as a module it
// would cost every VM the loading. Mounting replays its log, so nothing checks it.
var xfs = program{"/usr/sbin/mkfs.xfs", "/usr/sbin/mkfs.xfs"}

// Initramfs returns an uncompressed cpio archive with init as /init, the programs
// hyperstart runs with their libraries, and the modules of moduleDir ("" for a kernel
// without): their load order, one absolute path a line, is /lib/modules/h8s.order.
func Initramfs(init, moduleDir string) ([]byte, error) {
	var out bytes.Buffer
	a := archive{CPIO: NewCPIO(&out)}
	a.base()
	a.copy("/init", init, 0o755)
	all := slices.Clone(programs)
	if moduleDir == "" {
		all = append(all, xfs)
	}
	var hosts []string
	for _, p := range all {
		a.copy(p.guest, p.host, 0o755)
		hosts = append(hosts, p.host)
	}
	libs, err := closure.Of("", hosts...)
	if err != nil {
		return nil, err
	}
	for _, l := range libs {
		a.copy(l, l, 0o755)
	}
	// Without it mke2fs prints a warning and knows no usage types.
	a.copy("/etc/mke2fs.conf", "/etc/mke2fs.conf", 0o644)
	if moduleDir != "" {
		a.modules(moduleDir)
	}
	a.do(a.Close())
	return out.Bytes(), a.err
}

// archive adds files to a CPIO until the first error, which it keeps.
type archive struct {
	*CPIO
	err error
}

func (a *archive) do(err error) {
	if a.err == nil {
		a.err = err
	}
}

// base is what must be there before hyperstart mounts anything: the kernel opens
// /dev/console for PID 1 before it does devtmpfs.
func (a *archive) base() {
	for _, d := range []string{"dev", "etc", "proc", "run", "sys", "tmp", "usr/bin", "usr/sbin", "lib", "lib64"} {
		a.do(a.Directory(d, 0o755))
	}
	a.do(a.CharDevice("dev/console", 0o600, 5, 1))
	a.do(a.CharDevice("dev/null", 0o666, 1, 3))
	a.do(a.Symlink("bin", "usr/bin"))
	a.do(a.Symlink("sbin", "usr/sbin"))
}

func (a *archive) copy(name, from string, perm os.FileMode) {
	if a.err != nil {
		return
	}
	f, err := os.Open(from)
	if errors.Is(err, os.ErrNotExist) {
		a.do(fmt.Errorf("guest file %s: %w: is its Debian package installed?", name, err))
		return
	}
	if err != nil {
		a.do(err)
		return
	}
	defer f.Close()
	st, err := f.Stat()
	if err != nil {
		a.do(err)
		return
	}
	a.do(a.File(name, perm, st.Size(), f))
}

func (a *archive) modules(dir string) {
	order, err := os.ReadFile(filepath.Join(dir, "order"))
	if err != nil {
		a.do(err)
		return
	}
	var list strings.Builder
	for _, rel := range strings.Fields(string(order)) {
		name := "/lib/modules/" + filepath.Base(rel)
		a.copy(name, filepath.Join(dir, rel), 0o644)
		list.WriteString(name + "\n")
	}
	a.do(a.File("/lib/modules/h8s.order", 0o644, int64(list.Len()), strings.NewReader(list.String())))
}
