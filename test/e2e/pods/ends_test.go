package pods

import (
	"fmt"
	"strings"
	"testing"

	"github.com/hypernetes/hypernetes/test/e2e/testcluster"
)

// TestEnds lets containers end in every way and reads how from their status.
func TestEnds(t *testing.T) {
	t.Parallel()
	n := testcluster.Up(t).Namespace(t)
	n.Apply("testdata/ends.yaml")
	made := n.Get("pod/ends", ".metadata.creationTimestamp")
	for _, end := range []struct {
		container, reason, message string
		code                       int
	}{
		{"ok", "Completed", "", 0},
		{"seven", "Error", "", 7},
		{"oom", "OOMKilled", "", 137},
		{"talker", "Completed", "", 0},
		{"message", "Error", "why it ended\n", 3},
		{"lastwords", "Error", "these are the last words\n", 4},
	} {
		got := n.Ended("ends", end.container)
		want(t, "exit code of "+end.container, got.ExitCode, end.code)
		want(t, "reason of "+end.container, got.Reason, end.reason)
		want(t, "message of "+end.container, got.Message, end.message)
		// containerd notes the start when its call has returned: what ended meanwhile has
		// finished before, also with runc.
		if got.StartedAt < made || got.FinishedAt < made {
			t.Errorf("%s started %q, finished %q", end.container, got.StartedAt, got.FinishedAt)
		}
	}
	n.Wait("pod/ends", "jsonpath={.status.phase}=Failed")

	t.Run("the last words of a talkative container are not lost", func(t *testing.T) {
		var lines int
		for line := range strings.Lines(n.For(t).Logs("ends/talker")) {
			if line != fmt.Sprintf("line %d\n", lines) {
				t.Fatalf("line %d of the log is %q", lines, line)
			}
			lines++
		}
		want(t, "lines", lines, 60000)
	})
	t.Run("CrashLoopBackOff", func(t *testing.T) {
		n := n.For(t)
		n.Wait("pod/crashes", "jsonpath={.status.containerStatuses[0].state.waiting.reason}=CrashLoopBackOff")
		n.Wait("pod/crashes", "jsonpath={.status.containerStatuses[0].restartCount}=2")
		want(t, "exit code of the last try", n.Pod("crashes").Container("main").LastState.Terminated.ExitCode, 1)
	})
	t.Run("missing program", func(t *testing.T) {
		n := n.For(t)
		end := n.Ended("missing", "main")
		want(t, "reason", end.Reason, "StartError")
		want(t, "exit code", end.ExitCode, 128)
		if !strings.Contains(end.Message, "no-such-program") {
			t.Errorf("the message does not name the program: %q", end.Message)
		}
	})
	t.Run("long message", func(t *testing.T) {
		end := n.For(t).Ended("missing", "bigmessage")
		want(t, "message", end.Message, strings.Repeat("x", 4096))
		want(t, "exit code", end.ExitCode, 0)
	})
}
