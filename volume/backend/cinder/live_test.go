package cinder

import (
	"context"
	"os/exec"

	"github.com/hypernetes/hypernetes/test/openstack/openstacktest"
)

// inside makes commands that run where the OpenStack is.
func inside(c *openstacktest.Cloud) func(context.Context, string, ...string) *exec.Cmd {
	return func(ctx context.Context, name string, args ...string) *exec.Cmd {
		return exec.CommandContext(ctx, "nsenter", append([]string{"--net=" + c.NetNS(), name}, args...)...)
	}
}
