package cluster

import (
	"bytes"
	"context"
	"os/exec"

	"github.com/containerd/log"
)

// sweep collects what Pods left whose shims are dead: control groups, taps, VMMs and
// records. It runs inside the node before containerd, which would call the shims' own
// clean-up for Pods it remembers only. Leftovers are no reason not to start.
func (d *Daemon) sweep(ctx context.Context) {
	var out bytes.Buffer
	cmd := exec.CommandContext(ctx, d.input.Artifacts.Bin("containerd-shim-hyper-v2"), "sweep")
	cmd.Stdout, cmd.Stderr = &out, &out
	cmd.Env = []string{"PATH=" + d.input.Path}
	err := d.node.Start(cmd, "sweep")
	if err == nil {
		err = cmd.Wait()
	}
	if err != nil {
		log.G(ctx).WithError(err).WithField("output", out.String()).Warn("leftovers of dead Pods could not be collected")
	}
}
