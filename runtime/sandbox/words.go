package sandbox

import (
	"strings"
	"unicode"

	"github.com/containerd/log"

	"github.com/hypernetes/hypernetes/runtime/vmm"
)

const (
	// wordLines and wordBytes bound what of a guest's console is repeated to people.
	wordLines = 8
	wordBytes = 1 << 10
)

// lastWords is what people are told of a VM that ended without being asked to: why, and
// the end of its console, which a hostile guest has written.
func lastWords(reason string, e vmm.Exit, console string) string {
	text := "the Pod's " + reason
	if e.Detail != "" && !strings.Contains(reason, e.Detail) {
		text += " (" + e.Detail + ")"
	}
	console = printable(console)
	// What a kernel prints after its panic is registers and addresses.
	if i := strings.Index(console, e.Detail); i >= 0 && e.Reason == vmm.ReasonPanic {
		console = console[:i+len(e.Detail)]
	}
	lines := strings.Split(strings.Trim(console, "\n"), "\n")
	tail := strings.Join(lines[max(0, len(lines)-wordLines):], "\n")
	if over := len(tail) - wordBytes; over > 0 {
		tail = strings.ToValidUTF8(tail[over:], "")
	}
	if tail != "" {
		text += "\nconsole: " + tail
	}
	return text
}

// printable is what a guest wrote without what a terminal would take for commands.
func printable(console string) string {
	return strings.Map(func(r rune) rune {
		if r != '\n' && !unicode.IsPrint(r) {
			return -1
		}
		return r
	}, strings.ToValidUTF8(console, "?"))
}

// explain leaves words as the termination message of a container whose first process
// runs: it cannot write one any more, and this is where the kubelet looks for the reason.
func (c *Container) explain(words string) {
	p, err := c.process("")
	if err != nil || c.plan == nil || p.State().Status == StatusStopped {
		return
	}
	for _, d := range c.plan.Decisions {
		if d.ReadBack == "" {
			continue
		}
		if err := c.pod.WriteBack(d.ReadBack, []byte(words)); err != nil {
			log.G(c.s.ctx).WithError(err).WithField("container", c.id).Warn("termination message is lost")
		}
	}
}
