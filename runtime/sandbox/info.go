package sandbox

import (
	"encoding/json"
	"fmt"

	"github.com/containerd/errdefs"

	"github.com/hypernetes/hypernetes/runtime/podspec"
)

// Info is what `crictl inspectp` shows of a sandbox.
type Info struct {
	Reason       string `json:"reason,omitempty"`
	Accelerator  string `json:"accelerator,omitempty"`
	MemoryBytes  int64  `json:"memoryBytes,omitempty"`
	VCPUs        int    `json:"vcpus,omitempty"`
	AgentVersion string `json:"agentVersion,omitempty"`
	Kernel       string `json:"kernel,omitempty"`
	VMM          int    `json:"vmmPid,omitempty"`
	// Console is the end of what the guest wrote to its console, at most 4 KiB.
	Console string `json:"console,omitempty"`
}

// Info describes the sandbox for people. What the guest said is bounded.
func (s *Sandbox) Info() Info {
	c := s.Condition()
	out := Info{Reason: c.Reason, VMM: int(c.PID), Console: printable(s.console.String())}
	select {
	case <-s.booted:
	default:
		return out
	}
	out.Accelerator, out.MemoryBytes, out.VCPUs = s.accel, s.pod.MemoryBytes, s.pod.VCPUs
	if s.agent != nil {
		out.AgentVersion, out.Kernel = clip(s.agent.Hello.AgentVersion), clip(s.agent.Hello.KernelRelease)
	}
	return out
}

func clip(s string) string { return fmt.Sprintf("%.80s", s) }

// Exceeds tells whether a Pod's new resources (CRI's, as JSON) want more than its VM has.
//
// Errors: errdefs.ErrInvalidArgument.
func (s *Sandbox) Exceeds(resources []byte) (bool, error) {
	var u struct {
		Resources struct {
			Quota  int64 `json:"cpu_quota"`
			Period int64 `json:"cpu_period"`
			Memory int64 `json:"memory_limit_in_bytes"`
		}
	}
	if err := json.Unmarshal(resources, &u); err != nil {
		return false, fmt.Errorf("updated resources: %w: %w", err, errdefs.ErrInvalidArgument)
	}
	r := u.Resources
	more := r.Memory > 0 && podspec.Memory(r.Memory, s.opt.Config) > s.pod.MemoryBytes
	return more || r.Quota > 0 && podspec.VCPUs(r.Quota, r.Period, s.opt.Config) > s.pod.VCPUs, nil
}
