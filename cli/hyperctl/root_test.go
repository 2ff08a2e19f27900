package hyperctl

import (
	"bytes"
	"context"
	"path/filepath"
	"strings"
	"testing"
)

// TestArguments goes through the command line without a runtime.
func TestArguments(t *testing.T) {
	nothing := filepath.Join(t.TempDir(), "no.sock")
	for _, tc := range []struct {
		args []string
		want string
		code int
	}{
		{[]string{"run"}, "requires at least 1 arg", 2},
		{[]string{"exec", "pod"}, "requires at least 2 arg", 2},
		{[]string{"run", "--no-such-flag", "x"}, "unknown flag", 2},
		{[]string{"frobnicate"}, "unknown command", 2},
		{[]string{"--runtime-endpoint", nothing, "ps"}, "no container runtime answers at " + nothing, 1},
		{[]string{"--runtime-endpoint", "tcp://1.2.3.4:5", "ps"}, "want an absolute path", 2},
		{[]string{"--runtime-endpoint", nothing, "run", "-m", "lots", "busybox"}, `memory "lots"`, 2},
		{[]string{"--node", "Not A Name", "ps"}, "node name", 2},
		{[]string{"--runtime-endpoint", nothing, "rm"}, "name Pods, or give --all", 2},
		{[]string{"--runtime-endpoint", nothing, "images"}, "no containerd at", 1},
	} {
		var stderr bytes.Buffer
		if code := Main(context.Background(), tc.args, &stderr); code != tc.code || !strings.Contains(stderr.String(), tc.want) {
			t.Errorf("%v: code %d, %q; want %d, %q", tc.args, code, stderr.String(), tc.code, tc.want)
		}
	}
}
