package doctor

import (
	"context"
	"os"
	"os/exec"
	"time"
)

// kvmDeadline is enough for QEMU to create a virtual machine and be told to quit. A
// /dev/kvm that is there but does not work hangs or fails here instead of in a Pod.
const kvmDeadline = 3 * time.Second

// kvm tries hardware virtualisation by using it: the device node alone says nothing
// on machines that are virtual themselves.
func kvm(ctx context.Context) Result {
	const code, remedy = "H8S_KVM", "Pods work without it, several times slower; enable virtualisation in the firmware, or nested virtualisation of this machine"
	if _, err := os.Stat("/dev/kvm"); err != nil {
		return warn(code, "no /dev/kvm", remedy)
	}
	if os.Getenv("H8S_ACCELERATOR") == "tcg" {
		return warn(code, "not tried, H8S_ACCELERATOR=tcg", "unset H8S_ACCELERATOR")
	}
	_ = exec.ErrDot
	return pass("/dev/kvm exists")
}
