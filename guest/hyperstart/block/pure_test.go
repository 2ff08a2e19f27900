package block

import (
	"encoding/binary"
	"fmt"
	"os"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/containerd/errdefs"
)

func TestPlaces(t *testing.T) {
	const gib = 1 << 30
	for _, size := range []int64{0, 1, 4096, mib, 16 * mib, 17*mib + 1, 10 * gib, 16 << 40} {
		var total int64
		for _, e := range places(size) {
			if e.from < 0 || e.from >= e.to || e.to > size {
				t.Errorf("size %d: %v", size, e)
			}
			total += e.to - e.from
		}
		if size > 0 && total > 64*mib {
			t.Errorf("size %d: %d bytes are read", size, total)
		}
	}
	covered := func(size, at int64) bool {
		return slices.ContainsFunc(places(size), func(e extent) bool { return e.from <= at && at < e.to })
	}
	for _, at := range []int64{
		0, 16*mib - 1, 10*gib - 1, 10*gib - mib, 8*mib*3 + 1024 + 0x38, // ext4 of 1 KiB blocks
		128*mib + 0x38, 128*mib*3 + 0x38, 128*mib*5 + 0x38, 128*mib*7 + 0x38, 128*mib*9 + 0x38, 128*mib*25 + 0x38, 128*mib*49 + 0x38,
		10 * gib / 4, 10 * gib / 2, 10 * gib / 4 * 3, // xfs
	} {
		if !covered(10*gib, at) {
			t.Errorf("%d is not read", at)
		}
	}
}

func TestMountOptions(t *testing.T) {
	for _, c := range []struct {
		kind     string
		options  string
		readOnly bool
		flags    uintptr
		data     string
		bad      bool
	}{
		{kind: "ext4", data: "errors=remount-ro"},
		{kind: "xfs"},
		{kind: "ext4", options: "rw noatime nosuid nodev noexec commit=30 discard", flags: unix.MS_NOATIME | unix.MS_NOSUID | unix.MS_NODEV | unix.MS_NOEXEC, data: "commit=30,discard,errors=remount-ro"},
		{kind: "ext4", options: "noatime atime errors=continue", data: "errors=continue"},
		{kind: "xfs", options: "logbsize=256k inode64", data: "logbsize=256k,inode64"},
		{kind: "ext4", options: "ro", readOnly: true, flags: unix.MS_RDONLY, data: "errors=remount-ro"},
		{kind: "ext4", options: "noload", readOnly: true, flags: unix.MS_RDONLY, data: "noload,errors=remount-ro"},
		{kind: "ext4", options: "ro", bad: true},
		{kind: "ext4", options: "noload", bad: true},
		{kind: "ext4", options: "journal_path=/dev/sda", bad: true},
		{kind: "ext4", options: "usrquota", bad: true},
		{kind: "ext4", options: "commit=5,dax", bad: true},
		{kind: "ext4", options: "commit=", bad: true},
		{kind: "ext4", options: "commit", bad: true},
		{kind: "ext4", options: "data=all", bad: true},
		{kind: "ext4", options: "discard=1", bad: true},
		{kind: "xfs", options: "logdev=/dev/sda", bad: true},
		{kind: "xfs", options: "allocsize=1kk", bad: true},
		{kind: "ext4", options: "bind", bad: true},
		{kind: "ext4", options: strings.Repeat("rw ", 65), bad: true},
	} {
		flags, data, err := mountOptions(c.kind, strings.Fields(c.options), c.readOnly)
		if c.bad != errdefs.IsInvalidArgument(err) || err == nil && (flags != c.flags || data != c.data) {
			t.Errorf("%s %q: %#x %q %v", c.kind, c.options, flags, data, err)
		}
	}
}

func TestRestrictions(t *testing.T) {
	for options, want := range map[string]string{"": "", "noatime discard": "", "noexec nosuid nodev": "nosuid nodev noexec", "noexec exec nosuid": "nosuid", "bad": ""} {
		s := Spec{Type: "ext4", Options: strings.Fields(options)}
		if got := strings.Join(s.Restrictions(), " "); got != want {
			t.Errorf("%q: %q, want %q", options, got, want)
		}
	}
}

func TestIdentify(t *testing.T) {
	head := func(put map[int]string) []byte {
		b := make([]byte, inspectBytes)
		for at, s := range put {
			copy(b[at:], s)
		}
		return b
	}
	for _, c := range []struct {
		put  map[int]string
		want content
	}{
		{nil, content{}},
		{map[int]string{1080: "\x53\xef\x01\x00"}, content{kind: "ext4", clean: true}},
		{map[int]string{1080: "\x53\xef\x00\x00"}, content{kind: "ext4"}},
		{map[int]string{1080: "\x53\xef\x03\x00"}, content{kind: "ext4"}},
		{map[int]string{1080: "\x53\xef\x01\x00", 1024 + 0x60: "\x04"}, content{kind: "ext4"}},
		{map[int]string{1080: "\x53\xef\x01\x00"}, content{kind: "ext4", clean: true, marked: true, unfinished: true}},
		{map[int]string{1080: "\x53\xef\x01\x00", 1024 + 0x34: "\x01"}, content{kind: "ext4", clean: true, marked: true}},
		{nil, content{marked: true}},
		{map[int]string{1080: "\x53\xef\x01\x00", 512: "EFI PART"}, content{kind: "both ext4 and a GPT partition table"}},
		{map[int]string{1080: "\x53\xef\x01\x00", 0: "XFSB"}, content{kind: "both ext4 and xfs"}},
		{map[int]string{1080: "\x53\xef\x01\x00", 510: "\x55\xaa"}, content{kind: "ext4", clean: true}},
		{map[int]string{0: "XFSB"}, content{kind: "xfs"}},
		{map[int]string{0: "XFSB", 126: "\x01"}, content{kind: "xfs", unfinished: true}},
		{map[int]string{510: "\x55\xaa"}, content{kind: "a partition table or boot sector"}},
		{map[int]string{510: "\x55\xaa", 512: "EFI PART"}, content{kind: "a GPT partition table"}},
		{map[int]string{65600: "_BHRfS_M"}, content{kind: "btrfs"}},
	} {
		if got := identify(head(c.put), c.want.marked); got != c.want {
			t.Errorf("%v: %+v, want %+v", c.put, got, c.want)
		}
	}
}

func FuzzIdentify(f *testing.F) {
	f.Add([]byte{}, uint16(0), false)
	f.Add([]byte("\x53\xef\x01"), uint16(1080), true)
	f.Add([]byte("XFSB"), uint16(0), false)
	f.Fuzz(func(t *testing.T, b []byte, at uint16, marked bool) {
		head := append(make([]byte, at), b...)
		c := identify(head, marked)
		if c.unfinished && c.kind == "ext4" && !marked {
			t.Fatal("unfinished without a mark")
		}
		if c.kind == "ext4" && binary.LittleEndian.Uint16(head[1080:]) != 0xef53 {
			t.Fatal("ext4 without magic")
		}
	})
}

func FuzzMountOptions(f *testing.F) {
	f.Add("ext4", "noatime commit=5", true)
	f.Fuzz(func(t *testing.T, kind, options string, readOnly bool) {
		_, data, err := mountOptions(kind, strings.Split(options, " "), readOnly)
		if err == nil && strings.ContainsAny(data, "/ \x00\n\"\\") {
			t.Fatalf("%q passed", data)
		}
	})
}

// TestBlankFile reads all of a small disk.
func TestBlankFile(t *testing.T) {
	f, err := os.CreateTemp(t.TempDir(), "")
	check(t, err)
	defer f.Close()
	if err := blank(t.Context(), f); err == nil {
		t.Error("a disk without bytes is blank")
	}
	check(t, f.Truncate(3*mib))
	check(t, blank(t.Context(), f))
	for _, at := range []int64{0, chunk - 1, chunk, 2*mib + 5, 3*mib - 1} {
		_, err = f.WriteAt([]byte{1}, at)
		check(t, err)
		if err := blank(t.Context(), f); err == nil || !strings.Contains(err.Error(), fmt.Sprintf("at byte %d)", at)) {
			t.Errorf("byte %d: %v", at, err)
		}
		_, err = f.WriteAt([]byte{0}, at)
		check(t, err)
	}
}

func TestOwn(t *testing.T) {
	if os.Getuid() != 0 {
		t.Skip("skipped: changing groups needs root")
	}
	dir, outside := t.TempDir(), t.TempDir()
	check(t, os.Chmod(outside, 0o700))
	check(t, os.WriteFile(outside+"/o", nil, 0o600))
	check(t, os.MkdirAll(dir+"/a/b", 0o700))
	check(t, os.WriteFile(dir+"/a/b/f", nil, 0o600))
	check(t, os.Symlink(outside, dir+"/a/l"))
	check(t, os.Symlink(outside+"/o", dir+"/lf"))
	check(t, unix.Mkfifo(dir+"/fifo", 0o600))
	check(t, os.WriteFile(dir+"/suid", nil, 0o700))
	check(t, unix.Chmod(dir+"/suid", 0o4700))
	for i := range 2 * names {
		check(t, os.WriteFile(fmt.Sprintf("%s/a/n%d", dir, i), nil, 0o400))
	}
	check(t, own(t.Context(), dir, 4321, false))
	is := func(p string, gid uint32, mode uint32) {
		t.Helper()
		var st unix.Stat_t
		check(t, unix.Lstat(p, &st))
		if st.Gid != gid || st.Mode&0o7777 != mode {
			t.Errorf("%s: group %d mode %o, want %d %o", p, st.Gid, st.Mode&0o7777, gid, mode)
		}
	}
	is(dir+"/a", 4321, 0o2770)
	is(dir+"/a/b", 4321, 0o2770)
	is(dir+"/a/b/f", 4321, 0o660)
	is(dir+"/a/l", 4321, 0o777)
	is(dir+"/fifo", 4321, 0o660)
	is(dir+"/suid", 4321, 0o4760)
	is(fmt.Sprintf("%s/a/n%d", dir, 2*names-1), 4321, 0o660)
	is(outside, 0, 0o700)
	is(outside+"/o", 0, 0o600)
	// The root is right: only Always looks further.
	check(t, os.WriteFile(dir+"/a/new", nil, 0o600))
	check(t, os.Chown(dir+"/a/new", 0, 0))
	check(t, own(t.Context(), dir, 4321, false))
	is(dir+"/a/new", 0, 0o600)
	check(t, own(t.Context(), dir, 4321, true))
	is(dir+"/a/new", 4321, 0o660)
	check(t, own(t.Context(), dir, 77, false))
	is(dir+"/a/new", 77, 0o660)
}
