package closure

import (
	"errors"
	"os/exec"
	"sort"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
)

// TestOfFindsWhatLddFinds compares with ld.so's own answer.
func TestOfFindsWhatLddFinds(t *testing.T) {
	const program = "/usr/sbin/mke2fs"
	out, err := exec.Command("ldd", program).Output()
	if err != nil {
		t.Skipf("ldd %s: %v: install the Debian package e2fsprogs", program, err)
	}
	var want []string
	for line := range strings.Lines(string(out)) {
		for _, w := range strings.Fields(line) {
			if strings.HasPrefix(w, "/") {
				want = append(want, w)
			}
		}
	}
	got, err := Of("", program)
	if err != nil {
		t.Fatal(err)
	}
	sort.Strings(got)
	sort.Strings(want)
	if strings.Join(got, " ") != strings.Join(want, " ") {
		t.Errorf("closure %q, ldd says %q", got, want)
	}
	twice, err := Of("", program, program)
	if err != nil || len(twice) != len(got) {
		t.Errorf("program named twice: %q, %v", twice, err)
	}
}

func TestOfMissing(t *testing.T) {
	if _, err := Of("", "/nowhere/program"); !errors.Is(err, errdefs.ErrNotFound) {
		t.Errorf("error %v", err)
	}
}
