package qemu

import (
	"errors"
	"fmt"
	"os/exec"
	"syscall"

	"github.com/hypernetes/hypernetes/runtime/vmm"
)

// ending is all that is known when QEMU is gone.
type ending struct {
	killed   bool   // by Kill
	panicked bool   // GUEST_PANICKED
	shutdown string // reason of the SHUTDOWN event, "" without one
	wait     error  // from waiting for the process
	console  string // tail
	stderr   string // tail
}

// classify tells why a VM ended.
func classify(e ending) vmm.Exit {
	panicText := panicLine(e.console)
	var exit *exec.ExitError
	signal := syscall.Signal(0)
	if errors.As(e.wait, &exit) {
		if ws, ok := exit.Sys().(syscall.WaitStatus); ok && ws.Signaled() {
			signal = ws.Signal()
		}
	}
	guestReset := e.shutdown == "guest-reset" || e.shutdown == "guest-panic"
	switch {
	case e.panicked, guestReset && panicText != "":
		// Without pvpanic (microvm) a panic shows as a reset after the kernel's message.
		if panicText == "" {
			panicText = "guest kernel panicked: " + lastLine(e.console)
		}
		return vmm.Exit{Reason: vmm.ReasonPanic, Detail: panicText}
	case e.shutdown == "guest-shutdown":
		return vmm.Exit{Reason: vmm.ReasonShutdown, Detail: "guest powered off"}
	case e.shutdown == "guest-reset":
		return vmm.Exit{Reason: vmm.ReasonShutdown, Detail: "guest asked for a reboot"}
	case e.killed:
		return vmm.Exit{Reason: vmm.ReasonKilled, Detail: "killed by the runtime"}
	case signal == syscall.SIGKILL || signal == syscall.SIGTERM:
		return vmm.Exit{Reason: vmm.ReasonKilled, Detail: fmt.Sprintf("vmm was sent %v by somebody else (out of memory?)", signal)}
	case e.shutdown == "host-signal":
		return vmm.Exit{Reason: vmm.ReasonKilled, Detail: "vmm was told to end by a signal"}
	case e.wait != nil:
		return vmm.Exit{Reason: vmm.ReasonFailed, Detail: fmt.Sprintf("vmm: %v: %s", e.wait, lastLine(e.stderr))}
	}
	return vmm.Exit{Reason: vmm.ReasonFailed, Detail: "vmm ended without a reason: " + lastLine(e.stderr)}
}
