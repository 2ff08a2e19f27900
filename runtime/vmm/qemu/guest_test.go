package qemu

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/hypernetes/hypernetes/guest/image"
	"github.com/hypernetes/hypernetes/runtime/vmm"
	"github.com/hypernetes/hypernetes/test/artifacts"
)

// bootTimeout is for a loaded build machine without KVM.
const bootTimeout = 3 * time.Minute

func TestMain(m *testing.M) {
	MaybeLaunch()
	if os.Getenv("H8S_TEST_PARENT") != "" {
		parentMain()
	}
	code := m.Run()
	if err := os.RemoveAll(scratchDir); err != nil {
		fmt.Fprintln(os.Stderr, err)
	}
	os.Exit(code)
}

// scratchDir holds what all tests share; it goes with the process.
var scratchDir string

// guestFiles are what the tests boot: a kernel of out/share and an initramfs made here.
type guestFiles struct{ variant, kernel, initrd string }

var buildInit = sync.OnceValues(func() (string, error) {
	dir, err := os.MkdirTemp("", "h8s-qemu-test-")
	if err != nil {
		return "", err
	}
	scratchDir = dir
	cmd := exec.Command("go", "build", "-trimpath", "-ldflags", "-s -w", "-o", filepath.Join(dir, "init"), "./testdata/init")
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		return "", fmt.Errorf("build the test guest: %w: %s", err, out)
	}
	return filepath.Join(dir, "init"), nil
})

// variants are the guest kernels that are built; without any the test is skipped.
func variants(t testing.TB) []guestFiles {
	t.Helper()
	if os.Getuid() != 0 {
		t.Skip("needs root: the VMM is confined by namespaces")
	}
	var found []guestFiles
	for _, v := range []string{"stock", "hyper"} {
		dir := filepath.Join(artifacts.Dir(), "share", v)
		if _, err := os.Stat(filepath.Join(dir, "vmlinux")); err == nil {
			found = append(found, guestFiles{variant: v, kernel: filepath.Join(dir, "vmlinux"), initrd: filepath.Join(dir, "initramfs.img")})
		}
	}
	if len(found) == 0 {
		t.Skipf("no guest kernel below %s: run `make guest`", artifacts.Dir())
	}
	init, err := buildInit()
	if err != nil {
		t.Fatal(err)
	}
	for i := range found {
		found[i].initrd = testInitrd(t, found[i], init)
	}
	return found
}

// testInitrd is the built initramfs with another /init: of archives behind each other
// the later one's files win.
func testInitrd(t testing.TB, g guestFiles, init string) string {
	t.Helper()
	built, err := os.ReadFile(g.initrd)
	if err != nil {
		t.Fatal(err)
	}
	b, err := os.ReadFile(init)
	if err != nil {
		t.Fatal(err)
	}
	out := bytes.NewBuffer(built)
	c := image.NewCPIO(out)
	if err := errors.Join(c.File("init", 0o755, int64(len(b)), bytes.NewReader(b)), c.Close()); err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(t.TempDir(), g.variant+".img")
	if err := os.WriteFile(path, out.Bytes(), 0o644); err != nil {
		t.Fatal(err)
	}
	return path
}

var probeOnce = sync.OnceValues(func() (Host, error) { return Probe(context.Background(), "", "") })

func host(t testing.TB) Host {
	t.Helper()
	if _, err := exec.LookPath("qemu-system-x86_64"); err != nil {
		t.Skip("no qemu-system-x86_64: install the Debian package qemu-system-x86")
	}
	h, err := probeOnce()
	if err != nil {
		t.Fatal(err)
	}
	return h
}

// guest is a VM of a test and its conversation.
type guest struct {
	*VM
	t     testing.TB
	lines *bufio.Reader
}

func config(g guestFiles) vmm.Config {
	return vmm.Config{ID: "test-" + g.variant, Kernel: g.kernel, Initrd: g.initrd, VCPUs: 1, MaxVCPUs: 1, MemoryBytes: 256 << 20, UID: 1879048193, GID: 1879048193}
}

func boot(t testing.TB, c vmm.Config) *guest {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), bootTimeout)
	defer cancel()
	v, err := New(host(t)).Start(ctx, c)
	if err != nil {
		t.Fatal(err)
	}
	m := v.(*VM)
	t.Cleanup(func() {
		if err := m.Kill(); err != nil {
			t.Error(err)
		}
		<-m.Done()
		if t.Failed() {
			t.Logf("exit %+v\nconsole: %s\nstderr: %s", m.Exit(), m.console.String(), m.stderr.String())
		}
	})
	g := &guest{VM: m, t: t, lines: bufio.NewReader(m.Channel())}
	if got := g.line(); got != "hello" {
		t.Fatalf("first line %q", got)
	}
	return g
}

func (g *guest) line() string {
	g.t.Helper()
	if err := g.process.channel.SetReadDeadline(time.Now().Add(bootTimeout)); err != nil {
		g.t.Fatal(err)
	}
	s, err := g.lines.ReadString('\n')
	if err != nil {
		g.t.Fatalf("channel: %v", err)
	}
	return strings.TrimSpace(s)
}

func (g *guest) send(command string) {
	g.t.Helper()
	if _, err := io.WriteString(g.Channel(), command+"\n"); err != nil {
		g.t.Fatal(err)
	}
}

func (g *guest) ask(command, want string) {
	g.t.Helper()
	g.send(command)
	if got := g.line(); got != want {
		g.t.Fatalf("%s: guest says %q, want %q", command, got, want)
	}
}

// ends waits for the VM's end and checks why.
func (g *guest) ends(reason, detail string) {
	g.t.Helper()
	select {
	case <-g.Done():
	case <-time.After(bootTimeout):
		g.t.Fatal("vm does not end")
	}
	if e := g.Exit(); e.Reason != reason || !strings.Contains(e.Detail, detail) || e.At.IsZero() {
		g.t.Fatalf("exit %+v, want %s ... %q", e, reason, detail)
	}
}
