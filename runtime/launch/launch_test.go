package launch

import (
	"io"
	"os"
	"strings"
	"testing"

	"github.com/hypernetes/hypernetes/guest/image/closure"
)

func TestMain(m *testing.M) {
	Maybe()
	os.Exit(m.Run())
}

const shell = "/usr/bin/busybox"

// run runs a shell command confined and returns what it prints.
func run(t *testing.T, o Order, command string) string {
	t.Helper()
	if os.Getuid() != 0 {
		t.Skip("skipped: needs root to make namespaces")
	}
	libraries, err := closure.Of("", shell)
	if err != nil {
		t.Skipf("skipped: Debian package busybox: %v", err)
	}
	o.Binary, o.Args, o.UID, o.GID = shell, []string{"sh", "-c", command}, 1879048196, 1879048196
	for _, f := range append(libraries, shell, "/dev/null") {
		o.Binds = append(o.Binds, Bind{From: f, To: f})
	}
	p, err := Start(o, nil)
	if err != nil {
		t.Fatal(err)
	}
	defer p.Stderr.Close()
	out, err := io.ReadAll(p.Stderr)
	if err != nil {
		t.Fatal(err)
	}
	<-p.Exited
	return string(out)
}

// TestRoot: the program sees what it was given, and writes only what it may.
func TestRoot(t *testing.T) {
	dir := t.TempDir()
	for _, name := range []string{"ro", "rw"} {
		if err := os.WriteFile(dir+"/"+name, []byte("old"), 0o666); err != nil {
			t.Fatal(err)
		}
		if err := os.Chmod(dir+"/"+name, 0o666); err != nil {
			t.Fatal(err)
		}
	}
	out := run(t, Order{
		Files: map[string][]byte{"/conf": []byte("text\n")},
		Binds: []Bind{{From: dir + "/ro", To: "/data/ro"}, {From: dir + "/rw", To: "/data/rw", Writable: true}},
	}, `read x </conf; echo "$x"; echo /etc/* /proc/* /root/*; echo new >/data/rw && echo wrote; echo new >/data/ro; echo x >/new`)
	if !strings.HasPrefix(out, "text\n/etc/* /proc/* /root/*\nwrote\n") || strings.Count(out, "Read-only file system") != 2 {
		t.Errorf("%s", out)
	}
	if b, err := os.ReadFile(dir + "/rw"); err != nil || string(b) != "new\n" {
		t.Errorf("%q, %v", b, err)
	}
}

// TestFilter: what the program has no use for fails, for it and not for others.
func TestFilter(t *testing.T) {
	const fork = "echo started; " + shell + " echo forked; echo ended"
	if out := run(t, Order{Filter: true}, fork); !strings.HasPrefix(out, "started\n") || strings.Contains(out, "forked") || !strings.Contains(out, "fork") {
		t.Errorf("with the filter: %s", out)
	}
	if out := run(t, Order{}, fork); out != "started\nforked\nended\n" {
		t.Errorf("without: %s", out)
	}
}

// TestMissing: an order that cannot be carried out is told of on the program's output.
func TestMissing(t *testing.T) {
	if out := run(t, Order{Binds: []Bind{{From: "/none/at/all", To: "/x"}}}, "echo ran"); !strings.Contains(out, "/none/at/all") || strings.Contains(out, "ran") {
		t.Errorf("%s", out)
	}
}
