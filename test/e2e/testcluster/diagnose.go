package testcluster

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strings"
)

// dump prints what one needs to know about a failed test's Namespace.
func (n *Namespace) dump(ctx context.Context) {
	for _, args := range [][]string{
		{"get", "all", "-o", "wide"},
		{"describe", "pods"},
		{"get", "events", "--sort-by=.lastTimestamp"},
	} {
		out, err := n.try(ctx, n.in(args)...)
		if err != nil {
			out += err.Error()
		}
		n.t.Logf("kubectl %s\n%s", strings.Join(args, " "), tail(out, 24<<10))
	}
	names, _ := n.try(ctx, n.in([]string{"get", "pods", "-o", "jsonpath={.items[*].metadata.name}"})...)
	for _, pod := range strings.Fields(names) {
		out, err := n.try(ctx, n.in([]string{"logs", pod, "--all-containers", "--prefix", "--tail=30", "--ignore-errors"})...)
		if err != nil {
			out += err.Error()
		}
		n.t.Logf("logs of %s\n%s", pod, tail(out, 8<<10))
	}
	n.dumpNode()
}

// dumpNode prints the ends of the logs of containerd, the shims and the consoles
// of this Namespace's VMs.
func (n *Namespace) dumpNode() {
	for _, log := range []string{"containerd.log", "kubelet.log"} {
		path := filepath.Join("/var/lib/h8s", n.Node, "log", log)
		b, err := os.ReadFile(path)
		if err != nil {
			n.t.Logf("%s: %v", path, err)
			continue
		}
		var lines []string
		for line := range strings.Lines(string(b)) {
			if strings.Contains(line, n.Name) {
				lines = append(lines, line)
			}
		}
		n.t.Logf("%s, lines that name %s:\n%s", path, n.Name, tail(strings.Join(lines, ""), 12<<10))
	}
	consoles, _ := filepath.Glob(filepath.Join("/run/h8s", n.Node, "shim", "*", "console*"))
	for _, path := range consoles {
		if b, err := os.ReadFile(path); err == nil {
			n.t.Logf("%s ends with:\n%s", path, tail(string(b), 2<<10))
		}
	}
}

func tail(s string, max int) string {
	if len(s) <= max {
		return s
	}
	return fmt.Sprintf("... %d bytes left out ...\n%s", len(s)-max, s[len(s)-max:])
}
