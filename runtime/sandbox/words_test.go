package sandbox

import (
	"strings"
	"testing"
	"unicode/utf8"

	"github.com/hypernetes/hypernetes/runtime/vmm"
)

func TestLastWords(t *testing.T) {
	panicked := vmm.Exit{Reason: vmm.ReasonPanic, Detail: "Kernel panic: oops"}
	want := "the Pod's vm ended: panic (Kernel panic: oops)\nconsole: one\n[1.0] Kernel panic: oops"
	if got := lastWords("vm ended: panic", panicked, "one\n[1.0] Kernel panic: oops\nCall Trace:\n"); got != want {
		t.Errorf("panic: got %q, want %q", got, want)
	}
	for _, c := range []struct{ name, reason, detail, console, want string }{
		{"killed", "vm ended: killed", "vmm was sent killed by somebody else", "",
			"the Pod's vm ended: killed (vmm was sent killed by somebody else)"},
		{"panic", "vm ended: panic", "guest kernel panicked: sysrq", "\none\n\x1b[31mtwo\x00\r\n",
			"the Pod's vm ended: panic (guest kernel panicked: sysrq)\nconsole: one\n[31mtwo"},
		{"said already", "guest hangs: no answer", "no answer", "", "the Pod's guest hangs: no answer"},
		{"many lines", "vm ended: panic", "", strings.Repeat("x\n", 100), "the Pod's vm ended: panic\nconsole: " + strings.TrimSpace(strings.Repeat("x\n", wordLines))},
	} {
		if got := lastWords(c.reason, vmm.Exit{Detail: c.detail}, c.console); got != c.want {
			t.Errorf("%s: got %q, want %q", c.name, got, c.want)
		}
	}
}

func FuzzLastWords(f *testing.F) {
	f.Add("panic: \xff\x1b[0m\n")
	f.Add(strings.Repeat("ä", 3000))
	f.Fuzz(func(t *testing.T, console string) {
		got := lastWords("vm ended: panic", vmm.Exit{}, console)
		if len(got) > wordBytes+100 || !utf8.ValidString(got) || strings.ContainsAny(got, "\x00\x1b\r") {
			t.Errorf("%d bytes: %q", len(got), got)
		}
	})
}
