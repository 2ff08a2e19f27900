package image

import (
	"bytes"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"reflect"
	"strings"
	"testing"

	"github.com/containerd/errdefs"

	"github.com/hypernetes/hypernetes/guest/kernel"
)

func TestCPIOIsWhatCpioReads(t *testing.T) {
	var b bytes.Buffer
	c := NewCPIO(&b)
	err := errors.Join(
		c.File("a/b/file", 0o640, 5, strings.NewReader("hello")),
		c.Directory("/a/b", 0o755), // there already: made as a parent
		c.Symlink("bin", "usr/bin"),
		c.CharDevice("dev/console", 0o600, 5, 1),
		c.File("empty", 0o644, 0, strings.NewReader("")),
		c.Close(),
	)
	if err != nil {
		t.Fatal(err)
	}
	if b.Len()%512 != 0 {
		t.Errorf("archive of %d bytes", b.Len())
	}
	if _, err := exec.LookPath("cpio"); err != nil {
		t.Skip("no cpio to read it with: install the Debian package cpio")
	}
	cmd := exec.Command("cpio", "-itv", "--quiet")
	cmd.Stdin = &b
	cmd.Env = append(os.Environ(), "TZ=UTC", "LC_ALL=C")
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	want := [][]string{
		{"drwxr-xr-x", "a"}, {"drwxr-xr-x", "a/b"}, {"-rw-r-----", "a/b/file"}, {"lrwxrwxrwx", "usr/bin"},
		{"drwxr-xr-x", "dev"}, {"crw-------", "dev/console"}, {"-rw-r--r--", "empty"},
	}
	var got [][]string
	for line := range strings.Lines(string(out)) {
		f := strings.Fields(line)
		got = append(got, []string{f[0], f[len(f)-1]})
	}
	if !reflect.DeepEqual(got, want) {
		t.Errorf("cpio lists\n%s", out)
	}
}

func TestCPIORefuses(t *testing.T) {
	c := NewCPIO(&bytes.Buffer{})
	for name, err := range map[string]error{
		"outside": c.Symlink("../x", "y"),
		"root":    c.File("/", 0o644, 0, strings.NewReader("")),
		"nul":     c.Symlink("a\x00b", "y"),
		"short":   c.File("short", 0o644, 10, strings.NewReader("x")),
		"huge":    c.File("huge", 0o644, 1<<33, strings.NewReader("")),
		"twice":   errors.Join(c.Symlink("s", "x"), c.Symlink("s", "y")),
	} {
		if err == nil {
			t.Errorf("%s: no error", name)
		}
	}
}

func TestLoadOrder(t *testing.T) {
	mods := map[string]Module{
		"virtio_scsi": {Name: "virtio_scsi", Depends: []string{"virtio_ring", "scsi_mod", "virtio"}},
		"virtio_ring": {Name: "virtio_ring", Depends: []string{"virtio"}},
		"virtio":      {Name: "virtio"}, "scsi_mod": {Name: "scsi_mod", Depends: []string{"scsi_common"}},
		"a": {Name: "a", Depends: []string{"b"}}, "b": {Name: "b", Depends: []string{"a"}},
	}
	builtin := map[string]bool{"scsi_common": true, "ext4": true}
	order, err := LoadOrder(mods, builtin, []string{"virtio_scsi", "ext4", "nothing?", "virtio"})
	if err != nil {
		t.Fatal(err)
	}
	var names []string
	for _, m := range order {
		names = append(names, m.Name)
	}
	if got := strings.Join(names, " "); got != "scsi_mod virtio virtio_ring virtio_scsi" {
		t.Errorf("order %s", got)
	}
	if _, err := LoadOrder(mods, builtin, []string{"nothing"}); !errors.Is(err, errdefs.ErrNotFound) {
		t.Errorf("missing module: %v", err)
	}
	if _, err := LoadOrder(mods, builtin, []string{"a"}); !errors.Is(err, errdefs.ErrInvalidArgument) {
		t.Errorf("loop: %v", err)
	}
}

func TestParseDepends(t *testing.T) {
	got := parseDepends([]byte("license=GPL\x00depends=virtio-ring,scsi_mod\x00retpoline=Y\x00"))
	if !reflect.DeepEqual(got, []string{"virtio_ring", "scsi_mod"}) {
		t.Errorf("depends %q", got)
	}
	if got := parseDepends([]byte("depends=\x00")); len(got) != 0 {
		t.Errorf("depends %q", got)
	}
}

func TestModuleListReads(t *testing.T) {
	names := ReadModuleList(kernel.StockModules)
	if len(names) < 8 || names[0] != "virtio_pci" {
		t.Errorf("names %q", names)
	}
}

func TestMissingOptions(t *testing.T) {
	fragment := "# text\nCONFIG_A=y\nCONFIG_B=n\nCONFIG_C=\"x\"\n# CONFIG_D is not set\nCONFIG_E=y\n# CONFIG_F needs CONFIG_G\n"
	if m := MissingOptions(fragment, "CONFIG_A=y\nCONFIG_C=\"x\"\nCONFIG_E=y\n"); len(m) != 0 {
		t.Errorf("missing %q", m)
	}
	got := MissingOptions(fragment, "CONFIG_A=y\nCONFIG_B=y\nCONFIG_C=\"y\"\nCONFIG_D=y\n")
	if want := []string{"CONFIG_B=n", `CONFIG_C="x"`, "# CONFIG_D is not set", "CONFIG_E=y"}; !reflect.DeepEqual(got, want) {
		t.Errorf("missing %q", got)
	}
}

func TestControlFields(t *testing.T) {
	f := controlFields("Package: linux-image-cloud-amd64\nVersion: 6.1.1-1\nDepends: foo (= 1), linux-image-6.1.0-9-cloud-amd64 (= 6.1.1-1)\nDescription: a\n b: c\n\nPackage: other\n")
	if f["Package"] != "linux-image-cloud-amd64" || f["b"] != "" {
		t.Errorf("fields %q", f)
	}
	if d := firstDependency(f["Depends"], "linux-image-"); d != "linux-image-6.1.0-9-cloud-amd64" {
		t.Errorf("dependency %q", d)
	}
}

func TestScratchIsSmall(t *testing.T) {
	path := filepath.Join(t.TempDir(), "s")
	n, err := Scratch(t.Context(), path, 16<<30)
	if err != nil {
		t.Fatal(err)
	}
	if n > 1<<20 {
		t.Errorf("template allocates %d bytes", n)
	}
	if out, err := exec.Command("/usr/sbin/e2fsck", "-fn", path).CombinedOutput(); err != nil {
		t.Errorf("e2fsck: %v: %s", err, out)
	}
	if _, err := Scratch(t.Context(), path, 1<<20+1); !errors.Is(err, errdefs.ErrInvalidArgument) {
		t.Errorf("odd size: %v", err)
	}
}

func TestInitramfsIsReproducible(t *testing.T) {
	a, err := Initramfs("/bin/true", "")
	if err != nil {
		t.Fatal(err)
	}
	b, err := Initramfs("/bin/true", "")
	if err != nil || !bytes.Equal(a, b) {
		t.Errorf("two builds differ (%v)", err)
	}
}
