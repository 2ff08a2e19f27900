package mountinfo

import (
	"os"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

const golden = `94 27 0:46 /a/b /pod\040a rw,nosuid shared:3 master:1 - tmpfs h8s-vol:651b rw,size=64k
95 27 254:1 /b\134c /pod\040a rw - ext4 /dev/vda rw
97 27 0:47 / /empty rw - tmpfs  rw
no line
98 27 0:48 / /short
99 27 x / /odd rw - tmpfs tmpfs rw
`

func TestParse(t *testing.T) {
	got := Parse(golden)
	want := []Mount{
		{"0:46", "/a/b", "/pod a", "tmpfs", "h8s-vol:651b", "rw,size=64k"},
		{"254:1", `/b\c`, "/pod a", "ext4", "/dev/vda", "rw"},
		{"0:47", "/", "/empty", "tmpfs", "", "rw"},
		{"x", "/", "/odd", "tmpfs", "tmpfs", "rw"},
	}
	if !slices.Equal(got, want) {
		t.Errorf("%+v", got)
	}
	if m, ok := At(got, "/pod a"); !ok || m != want[1] {
		t.Errorf("the topmost is %+v, %t", m, ok)
	}
	if m, ok := At(got, "/pod"); ok {
		t.Errorf("nothing is there, not %+v", m)
	}
	if n, ok := want[1].Number(); !ok || n != unix.Mkdev(254, 1) {
		t.Errorf("number %d, %t", n, ok)
	}
	for _, bad := range []string{"", "x", "1", "1:", ":1", "1:-1", "1:4294967296", "1:2:3"} {
		if n, ok := (Mount{Device: bad}).Number(); ok {
			t.Errorf("%q is %d", bad, n)
		}
	}
}

func TestRead(t *testing.T) {
	mounts, err := Read("self")
	if err != nil {
		t.Fatal(err)
	}
	m, ok := At(mounts, "/proc")
	var st unix.Stat_t
	if err := unix.Lstat("/proc", &st); err != nil {
		t.Fatal(err)
	}
	if dev, valid := m.Number(); !ok || m.Type != "proc" || m.Root != "/" || !valid || dev != st.Dev {
		t.Errorf("%+v, %d", m, st.Dev)
	}
	if _, err := Read("0"); !os.IsNotExist(err) {
		t.Errorf("of no process: %v", err)
	}
}

func FuzzParse(f *testing.F) {
	f.Add(golden)
	f.Add("1 2 3:4 / /a\\040b rw shared:1 - ext4 /dev/a\\134 rw\n")
	f.Add("1 2 x:y / / rw - a b\n\n - \n")
	f.Fuzz(func(t *testing.T, text string) {
		mounts := Parse(text)
		if len(mounts) > strings.Count(text, "\n")+1 {
			t.Errorf("%d mounts of %q", len(mounts), text)
		}
		for _, m := range mounts {
			_, _ = m.Number()
			if _, ok := At(mounts, m.Target); !ok {
				t.Errorf("%+v is not found", m)
			}
		}
	})
}
