package badinput

import (
	"bytes"
	"context"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/hypernetes/hypernetes/test/artifacts"
	"github.com/hypernetes/hypernetes/test/e2e/testcluster"
)

func TestMain(m *testing.M) { testcluster.Main(m) }

// nobody is a node that no test ever gets to run.
const nobody = "badinput"

// result is what a command did.
type result struct {
	stdout, stderr string
	code           int
}

func (r result) String() string { return r.stdout + r.stderr }

// run runs one of the built programs with extra environment and returns what it did.
func run(t *testing.T, env []string, program string, args ...string) result {
	t.Helper()
	// Not the test's context: that has ended when a clean-up runs commands.
	ctx, cancel := context.WithTimeout(context.Background(), 3*time.Minute)
	defer cancel()
	cmd := exec.CommandContext(ctx, built(t, program), args...)
	cmd.Env = append(append(os.Environ(), "H8S_OUT="+artifacts.Dir()), env...)
	cmd.WaitDelay = 5 * time.Second
	var stdout, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	err := cmd.Run()
	if cmd.ProcessState == nil {
		t.Fatalf("%s %s: %v", program, strings.Join(args, " "), err)
	}
	return result{stdout.String(), stderr.String(), cmd.ProcessState.ExitCode()}
}

// built is the path of a built program; without it the test is skipped.
func built(t *testing.T, program string) string {
	t.Helper()
	path := filepath.Join(artifacts.Dir(), "bin", program)
	if _, err := os.Stat(path); err != nil {
		t.Skipf("not built: %v (run `make build`)", err)
	}
	return path
}

// refused checks that a command ended with the exit code and said, on stderr and in
// few words, what pattern matches; a stack trace or a usage page is not few words.
func refused(t *testing.T, r result, code int, pattern string) {
	t.Helper()
	if r.code != code {
		t.Errorf("exit code %d, want %d:\n%s", r.code, code, r)
	}
	if !regexp.MustCompile(pattern).MatchString(r.stderr) {
		t.Errorf("want an error that matches %q, got:\n%s", pattern, r)
	}
	if lines := strings.Count(strings.TrimSpace(r.stderr), "\n") + 1; lines > 4 {
		t.Errorf("the error has %d lines, want at most 4:\n%s", lines, r.stderr)
	}
	if strings.Contains(r.String(), "goroutine ") {
		t.Errorf("a stack trace:\n%s", r)
	}
}

// traces lists what a node has on the machine: processes, cgroups, directories, mounts.
func traces(t *testing.T, node string) []string {
	t.Helper()
	var found []string
	for _, pattern := range []string{"/run/h8s/" + node, "/var/lib/h8s/" + node, "/sys/fs/cgroup/h8s/" + node, "/sys/fs/cgroup/*/h8s/" + node} {
		matches, err := filepath.Glob(pattern)
		if err != nil {
			t.Fatal(err)
		}
		found = append(found, matches...)
	}
	mounts, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(mounts)) {
		if strings.Contains(line, "/h8s/"+node+"/") {
			found = append(found, "mount "+strings.TrimSpace(line))
		}
	}
	processes, err := filepath.Glob("/proc/[0-9]*/cmdline")
	if err != nil {
		t.Fatal(err)
	}
	for _, file := range processes {
		b, err := os.ReadFile(file)
		if err == nil && slices.Contains(strings.Split(string(b), "\x00"), node) {
			found = append(found, "process "+strings.ReplaceAll(string(b), "\x00", " "))
		}
	}
	return found
}

// untouched checks that nothing of a node is on the machine.
func untouched(t *testing.T, node string) {
	t.Helper()
	deadline := time.Now().Add(20 * time.Second)
	for {
		left := traces(t, node)
		if len(left) == 0 {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("left behind:\n  %s", strings.Join(left, "\n  "))
		}
		<-time.After(200 * time.Millisecond)
	}
}
