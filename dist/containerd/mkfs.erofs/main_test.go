package main

import (
	"archive/tar"
	"bytes"
	"os"
	"os/exec"
	"path/filepath"
	"reflect"
	"strings"
	"syscall"
	"testing"
)

func TestParse(t *testing.T) {
	for name, c := range map[string]struct {
		args []string
		want plan
		err  string
	}{
		"differ":    {args: []string{"--tar=f", "--aufs", "--quiet", "-Enoinline_data", "-b4096", "-U", "u", "/x/layer.erofs"}, want: plan{tar: true, options: []string{"--quiet", "-Enoinline_data", "-U", "u"}, output: "/x/layer.erofs"}},
		"directory": {args: []string{"--quiet", "out", "dir"}, want: plan{options: []string{"--quiet", "out", "dir"}}},
		"help":      {args: []string{"--help"}, want: plan{help: true}},
		"index":     {args: []string{"--tar=i", "out"}, err: "enable_tar_index"},
		"no output": {args: []string{"--tar=f"}, err: "no output"},
	} {
		t.Run(name, func(t *testing.T) {
			got, err := parse(c.args)
			if c.err != "" {
				if err == nil || !strings.Contains(err.Error(), c.err) {
					t.Fatalf("error %v, want one with %q", err, c.err)
				}
				return
			}
			if err != nil || !reflect.DeepEqual(got, c.want) {
				t.Fatalf("got %+v, %v; want %+v", got, err, c.want)
			}
		})
	}
}

// TestConvert packs a layer and looks at what is in it with a loop mount of the
// host's kernel, in a mount namespace of the test's own.
func TestConvert(t *testing.T) {
	if _, err := exec.LookPath("mkfs.erofs"); err != nil {
		t.Skip("skipped: mkfs.erofs is not installed (Debian package erofs-utils)")
	}
	if os.Getuid() != 0 {
		t.Skip("skipped: needs root to make device nodes and to mount")
	}
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	write := func(h tar.Header, data string) {
		h.Size = int64(len(data))
		if err := w.WriteHeader(&h); err != nil {
			t.Fatal(err)
		}
		if _, err := w.Write([]byte(data)); err != nil {
			t.Fatal(err)
		}
	}
	write(tar.Header{Name: "dir/", Typeflag: tar.TypeDir, Mode: 0o2755}, "")
	write(tar.Header{Name: "dir/file", Typeflag: tar.TypeReg, Mode: 0o640, Uid: 7, Gid: 8, PAXRecords: map[string]string{"SCHILY.xattr.user.k": "v"}}, strings.Repeat("x", 100000))
	write(tar.Header{Name: "dir/hard", Typeflag: tar.TypeLink, Linkname: "dir/file", Mode: 0o640, Uid: 7, Gid: 8}, "")
	write(tar.Header{Name: "link", Typeflag: tar.TypeSymlink, Linkname: "/etc/passwd"}, "")
	write(tar.Header{Name: "dir/.wh.gone", Typeflag: tar.TypeReg}, "")
	write(tar.Header{Name: "opaque/", Typeflag: tar.TypeDir, Mode: 0o755}, "")
	write(tar.Header{Name: "opaque/.wh..wh..opq", Typeflag: tar.TypeReg}, "")
	write(tar.Header{Name: "../../escape", Typeflag: tar.TypeReg, Mode: 0o644}, "outside")
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	out := filepath.Join(dir, "sub", "layer.erofs")
	if err := os.Mkdir(filepath.Dir(out), 0o755); err != nil {
		t.Fatal(err)
	}
	real, err := exec.LookPath("mkfs.erofs")
	if err != nil {
		t.Fatal(err)
	}
	if err := convert(t.Context(), real, plan{options: []string{"--quiet", "-Enoinline_data"}, output: out}, &b, os.Stderr); err != nil {
		t.Fatal(err)
	}
	if left, _ := filepath.Glob(filepath.Join(dir, "sub", ".unpack-*")); len(left) > 0 {
		t.Errorf("left behind: %v", left)
	}
	if _, err := os.Stat(filepath.Join(dir, "escape")); err == nil {
		t.Error("a path with .. left the directory")
	}
	script := `mount -o loop,ro "$1" "$2" && cd "$2" && stat -c '%n %F %a %u %g %h %t' dir dir/file dir/hard link dir/gone && getfattr -d -m - --only-values -n user.k dir/file 2>/dev/null; true`
	mnt := filepath.Join(dir, "mnt")
	if err := os.Mkdir(mnt, 0o755); err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command("sh", "-c", script, "sh", out, mnt)
	cmd.SysProcAttr = &syscall.SysProcAttr{Unshareflags: syscall.CLONE_NEWNS}
	got, err := cmd.CombinedOutput()
	if err != nil {
		t.Fatalf("%v: %s", err, got)
	}
	for _, want := range []string{
		"dir directory 2755 0 0 2 0\n",
		"dir/file regular file 640 7 8 2 0\n",
		"dir/hard regular file 640 7 8 2 0\n",
		"link symbolic link 777 0 0 1 0\n",
		"dir/gone character special file",
	} {
		if !strings.Contains(string(got), want) {
			t.Errorf("missing %q in:\n%s", want, got)
		}
	}
}
