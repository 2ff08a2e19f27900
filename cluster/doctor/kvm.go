package doctor

import (
	"context"

	"github.com/hypernetes/hypernetes/runtime/vmm/qemu"
)

// kvm tries hardware virtualisation by running a guest with it: the device node alone
// says nothing on machines that are virtual themselves.
func kvm(ctx context.Context) Result {
	host, err := qemu.Probe(ctx, "", "")
	if err != nil {
		return warn("H8S_KVM", "not tried: "+err.Error(), "see the check qemu")
	}
	if host.Accelerator != "kvm" {
		return warn("H8S_KVM", "virtual machines will be emulated: "+host.Reason,
			"Pods work, several times slower; enable virtualisation in the firmware, or nested virtualisation of this machine")
	}
	return pass("a test guest ran")
}
