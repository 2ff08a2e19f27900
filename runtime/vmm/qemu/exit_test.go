package qemu

import (
	"os/exec"
	"strings"
	"testing"

	"github.com/hypernetes/hypernetes/runtime/vmm"
)

func exitOf(t *testing.T, script string) error {
	t.Helper()
	return exec.Command("/bin/sh", "-c", script).Run()
}

func TestClassify(t *testing.T) {
	sigkill, one := exitOf(t, "kill -9 $$"), exitOf(t, "exit 1")
	const panicked = "[ 1.0] Kernel panic - not syncing: Attempted to kill init! exitcode=0x00000300\r\n"
	for name, tc := range map[string]struct {
		end            ending
		reason, detail string
	}{
		"power off":           {ending{shutdown: "guest-shutdown"}, vmm.ReasonShutdown, "powered off"},
		"off, then kill":      {ending{shutdown: "guest-shutdown", killed: true, wait: sigkill}, vmm.ReasonShutdown, "powered off"},
		"pvpanic":             {ending{panicked: true, shutdown: "guest-panic", console: panicked}, vmm.ReasonPanic, "Attempted to kill init"},
		"pvpanic, no message": {ending{panicked: true, console: "Oops\n"}, vmm.ReasonPanic, "Oops"},
		"reset after panic":   {ending{shutdown: "guest-reset", console: panicked}, vmm.ReasonPanic, "Attempted to kill init"},
		"reboot":              {ending{shutdown: "guest-reset"}, vmm.ReasonShutdown, "reboot"},
		"kill":                {ending{killed: true, wait: sigkill}, vmm.ReasonKilled, "by the runtime"},
		"somebody's kill":     {ending{wait: sigkill}, vmm.ReasonKilled, "somebody else"},
		"signal":              {ending{shutdown: "host-signal"}, vmm.ReasonKilled, "signal"},
		"failure":             {ending{wait: one, stderr: "a\nqemu: no good\n\n"}, vmm.ReasonFailed, "exit status 1: qemu: no good"},
		"no reason":           {ending{}, vmm.ReasonFailed, "without a reason"},
		"forged panic text":   {ending{killed: true, wait: sigkill, console: panicked}, vmm.ReasonKilled, "by the runtime"},
	} {
		t.Run(name, func(t *testing.T) {
			e := classify(tc.end)
			if e.Reason != tc.reason || !strings.Contains(e.Detail, tc.detail) {
				t.Errorf("exit %+v, want %s ... %s", e, tc.reason, tc.detail)
			}
		})
	}
}

func TestDetailIsPrintableAndBounded(t *testing.T) {
	hostile := "\x1b[2JKernel panic - not syncing: \x1b]0;x\x07" + strings.Repeat("\x00é!", 500)
	for _, s := range []string{panicLine(hostile), lastLine(hostile)} {
		if s == "" || len(s) > 256 || strings.ContainsFunc(s, func(r rune) bool { return r < ' ' || r > '~' }) {
			t.Errorf("detail %q", s)
		}
	}
}

func TestTailKeepsTheEnd(t *testing.T) {
	var tl tail
	for range 100 {
		_, _ = tl.Write([]byte(strings.Repeat("a", 999) + "\n"))
	}
	_, _ = tl.Write([]byte("end"))
	if s := tl.String(); len(s) != tailBytes || !strings.HasSuffix(s, "a\nend") {
		t.Errorf("tail of %d bytes ends in %q", len(s), s[len(s)-10:])
	}
	_, _ = tl.Write([]byte(strings.Repeat("b", 3*tailBytes)))
	if s := tl.String(); s != strings.Repeat("b", tailBytes) {
		t.Errorf("tail of %d bytes after a long write", len(s))
	}
}

// blocked is a console writer that does not return until released.
type blocked struct{ release chan struct{} }

func (b blocked) Write(p []byte) (int, error) { <-b.release; return len(p), nil }

func TestDrainNeverWaitsForTheWriter(t *testing.T) {
	w := blocked{make(chan struct{})}
	var tl tail
	done := drain(strings.NewReader(strings.Repeat("x", 4<<20)+"end"), &tl, w)
	for !strings.HasSuffix(tl.String(), "end") { // reached only if the reader does not wait
		select {
		case <-done:
			t.Fatal("done before the writer returned")
		default:
		}
	}
	close(w.release)
	<-done
}
