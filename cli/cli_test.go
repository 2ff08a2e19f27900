package cli

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/spf13/cobra"

	"github.com/hypernetes/hypernetes/cluster/layout"
	"github.com/hypernetes/hypernetes/cluster/settings"
	"github.com/hypernetes/hypernetes/cluster/status"
	"github.com/hypernetes/hypernetes/cluster/supervisor"
)

func TestReasonsAreStable(t *testing.T) {
	ids, exits := map[string]bool{}, map[int]bool{}
	for _, r := range reasons {
		if ids[r.ID] || exits[r.Exit] {
			t.Errorf("%s or its exit code %d is there twice", r.ID, r.Exit)
		}
		ids[r.ID], exits[r.Exit] = true, true
		if !regexp.MustCompile(`^H8S_[A-Z_]+$`).MatchString(r.ID) || r.Advice == "" || r.Exit < 2 || r.Exit > 130 {
			t.Errorf("%+v", r)
		}
	}
}

// TestEveryReasonUsedIsKnown reads the identifiers out of the code.
func TestEveryReasonUsedIsKnown(t *testing.T) {
	use := regexp.MustCompile(`(?:because|becausef)\("(H8S_[A-Z_]+)"|Reason: "(H8S_[A-Z_]+)"|return "(H8S_[A-Z_]+)"`)
	for _, pattern := range []string{"*.go", "../cluster/*.go"} {
		files, err := filepath.Glob(pattern)
		if err != nil {
			t.Fatal(err)
		}
		for _, f := range files {
			b, err := os.ReadFile(f)
			if err != nil {
				t.Fatal(err)
			}
			for _, m := range use.FindAllStringSubmatch(string(b), -1) {
				id := m[1] + m[2] + m[3]
				if !slices.ContainsFunc(reasons, func(r Reason) bool { return r.ID == id }) {
					t.Errorf("%s uses %s, which has no advice", f, id)
				}
			}
		}
	}
}

func TestExplain(t *testing.T) {
	for name, c := range map[string]struct {
		err  error
		exit int
		text string
	}{
		"plain":       {errors.New("x"), 1, "h8s: x\n"},
		"reason":      {becausef("H8S_PORT_IN_USE", "taken"), 12, "H8S_PORT_IN_USE"},
		"class":       {fmt.Errorf("name: %w", errdefs.ErrInvalidArgument), 2, "H8S_USAGE"},
		"interrupted": {context.Canceled, 130, "background"},
	} {
		var b bytes.Buffer
		if exit := explain(&b, c.err); exit != c.exit || !strings.Contains(b.String(), c.text) {
			t.Errorf("%s: exit %d, %q", name, exit, b.String())
		}
	}
}

func TestProgressWithoutTerminal(t *testing.T) {
	var b bytes.Buffer
	p := newProgress(&b)
	p.event(status.Event{Kind: status.Begin, Name: "etcd"})
	p.event(status.Event{Kind: status.Step, Name: "etcd", Seconds: 0.31})
	p.event(status.Event{Kind: status.Warn, Name: "images", Seconds: 2, Message: "one is broken"})
	p.end()
	want := "✓ etcd                       0.3s\n! images                     2.0s   one is broken\n"
	if b.String() != want {
		t.Errorf("got\n%swant\n%s", b.String(), want)
	}
}

func TestProgressOnTerminal(t *testing.T) {
	var b bytes.Buffer
	p := newProgress(&b)
	p.tty = true
	p.event(status.Event{Kind: status.Begin, Name: "components"})
	p.event(status.Event{Kind: status.Step, Name: "etcd"})
	p.end()
	want := "• components\r\033[K✓ etcd                       0.0s\n• components\r\033[K"
	if b.String() != want {
		t.Errorf("%q, want %q", b.String(), want)
	}
}

func TestSplitName(t *testing.T) {
	for _, c := range []struct {
		in, rest []string
		name     string
	}{
		{nil, nil, DefaultNode},
		{[]string{"get", "--name", "x"}, []string{"get", "--name", "x"}, DefaultNode},
		{[]string{"--name", "two", "get", "pods"}, []string{"get", "pods"}, "two"},
		{[]string{"--name=two"}, []string{}, "two"},
	} {
		name, rest, err := splitName(c.in)
		if err != nil || name != c.name || !slices.Equal(rest, c.rest) {
			t.Errorf("%v: %s %v %v", c.in, name, rest, err)
		}
	}
	if _, _, err := splitName([]string{"--name"}); err == nil {
		t.Error("a --name without a name was accepted")
	}
}

func TestLogTail(t *testing.T) {
	path := filepath.Join(t.TempDir(), "log")
	long := strings.Repeat("x", 70<<10)
	for _, c := range []struct {
		content, want string
		n             int
	}{
		{"a\nb\nc\n", "b\nc\n", 2},
		{"a\nb\nc", "b\nc", 2},
		{"a\nb\n", "a\nb\n", 5},
		{"a\nb\n", "a\nb\n", -1},
		{"a\nb\n", "", 0},
		{"", "", 3},
		{"a\n" + long + "\nc\n", long + "\nc\n", 2},
	} {
		if err := os.WriteFile(path, []byte(c.content), 0o600); err != nil {
			t.Fatal(err)
		}
		var b bytes.Buffer
		if err := printLog(t.Context(), &b, path, c.n, false); err != nil || b.String() != c.want {
			t.Errorf("last %d of %.10q: %.20q %v", c.n, c.content, b.String(), err)
		}
	}
}

func TestPrintStatusSaysWhatIsWrong(t *testing.T) {
	var b bytes.Buffer
	err := printStatus(&b, status.Node{
		Name: "x", Phase: status.Degraded, Settings: settings.Node{Publish: []settings.Publish{{Host: 1, Node: 2}}},
		Components: []supervisor.Status{{Name: "etcd", State: supervisor.Ready}, {Name: "kubelet", State: supervisor.Backoff, LastError: "the cause"}},
	})
	if err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{"node x: degraded", "127.0.0.1:1 -> node:2", "kubelet is backoff: the cause"} {
		if !strings.Contains(b.String(), want) {
			t.Errorf("no %q in:\n%s", want, b.String())
		}
	}
}

// TestHelp checks that each command explains itself and takes the node by the same flag.
func TestHelp(t *testing.T) {
	var walk func(c *cobra.Command)
	walk = func(c *cobra.Command) {
		if !c.Hidden && c.Short == "" {
			t.Errorf("%s has no short help", c.CommandPath())
		}
		for _, sub := range c.Commands() {
			walk(sub)
		}
	}
	root := newRoot()
	walk(root)
	for _, name := range []string{"up", "down", "status", "reset", "logs", "server", "doctor"} {
		cmd, _, err := root.Find([]string{name})
		if err != nil || cmd.Flags().Lookup("name") == nil {
			t.Errorf("%s: %v, or no --name", name, err)
		}
	}
}

func TestOptionsRememberSettings(t *testing.T) {
	l := layout.Node{Name: "x", State: t.TempDir(), Run: t.TempDir()}
	parse := func(args ...string) (settings.Node, error) {
		o := &nodeOptions{}
		cmd := &cobra.Command{}
		o.add(cmd.Flags())
		if err := cmd.ParseFlags(args); err != nil {
			t.Fatal(err)
		}
		return o.settings(l, cmd.Flags())
	}
	s, err := parse("--api-port", "7443", "--publish", "8001")
	if err != nil || s.APIPort != 7443 || len(s.Publish) != 1 || s.NodeIP != settings.IsolatedIP {
		t.Fatalf("%+v %v", s, err)
	}
	if err := s.Save(l.StatePath("node.json")); err != nil {
		t.Fatal(err)
	}
	if again, err := parse("--egress"); err != nil || again.APIPort != 7443 || len(again.Publish) != 1 || !again.Egress {
		t.Errorf("%+v %v", again, err)
	}
	if _, err := parse("--publish", "nonsense"); !errdefs.IsInvalidArgument(err) {
		t.Errorf("nonsense: %v", err)
	}
}

// TestReasonsAreDocumented holds the operator's table against the code's.
func TestReasonsAreDocumented(t *testing.T) {
	b, err := os.ReadFile("../docs/operations.md")
	if err != nil {
		t.Fatal(err)
	}
	for _, r := range reasons {
		if row := fmt.Sprintf("| `%s` | %d |", r.ID, r.Exit); !strings.Contains(string(b), row) {
			t.Errorf("docs/operations.md has no row %q", row)
		}
	}
	code := regexp.MustCompile(`(?:warn|fail)\("(H8S_[A-Z_0-9]+)"`)
	files, err := filepath.Glob("../cluster/doctor/*.go")
	if err != nil || len(files) == 0 {
		t.Fatal("no checks found", err)
	}
	for _, f := range files {
		if strings.HasSuffix(f, "_test.go") {
			continue
		}
		source, err := os.ReadFile(f)
		if err != nil {
			t.Fatal(err)
		}
		for _, m := range code.FindAllStringSubmatch(string(source), -1) {
			if !strings.Contains(string(b), "`"+m[1]+"`") {
				t.Errorf("docs/operations.md does not tell of %s (%s)", m[1], f)
			}
		}
	}
}

func TestTokenLeavesTheCommandLine(t *testing.T) {
	for _, c := range []struct{ in, want string }{
		{"h8s agent --token SECRET --name x", "h8s agent --token-file F --name x"},
		{"h8s agent --token=SECRET", "h8s agent --token-file=F"},
		{"h8s agent --name x", "h8s agent --name x"},
	} {
		if got := strings.Join(replaceToken(strings.Fields(c.in), "F"), " "); got != c.want {
			t.Errorf("%q, want %q", got, c.want)
		}
	}
}

func TestReadToken(t *testing.T) {
	text := "h8s1." + strings.Repeat("0a", 32) + ".abcdef.0123456789abcdef"
	file := filepath.Join(t.TempDir(), "token")
	if err := os.WriteFile(file, []byte(text+"\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	t.Setenv(tokenEnv, text)
	for name, path := range map[string]string{"file": file, "stdin": "-", "environment": ""} {
		if got, err := readToken(strings.NewReader(text), path); err != nil || got != text {
			t.Errorf("%s: %q %v", name, got, err)
		}
	}
	if v, ok := os.LookupEnv(tokenEnv); ok {
		t.Errorf("children would inherit %s=%s", tokenEnv, v)
	}
	if got, err := readToken(strings.NewReader(""), ""); err != nil || got != "" {
		t.Errorf("none: %q %v", got, err)
	}
	if _, err := readToken(strings.NewReader("nonsense"), "-"); !errdefs.IsInvalidArgument(err) {
		t.Errorf("nonsense: %v", err)
	}
	if _, err := readToken(nil, file+"x"); err == nil {
		t.Error("a file that is not there was read")
	}
}

func TestFurtherNode(t *testing.T) {
	first := settings.Node{Name: "blue", APIPort: 7443, NodeIP: settings.IsolatedIP, Egress: true}
	f, err := newFurther(first, 3)
	if err != nil || f.layout.Name != "blue-3" || f.settings.NodeIP != "100.64.0.3" || f.settings.Server != "https://100.64.0.1:6443" || !f.settings.Egress {
		t.Errorf("%+v %v", f, err)
	}
	if err := f.settings.Validate(); err != nil {
		t.Error(err)
	}
	if _, err := newFurther(settings.Node{Name: strings.Repeat("x", 32)}, 2); !errdefs.IsInvalidArgument(err) {
		t.Errorf("a name too long: %v", err)
	}
}

func TestNodeStates(t *testing.T) {
	for want, n := range map[string]clusterNode{
		"Ready": {Ready: "True"}, "NotReady": {Ready: "False"}, "lost": {Ready: "Unknown"}, "unknown": {},
		"Ready, takes no Pods": {Ready: "True", Unschedulable: true},
	} {
		if got := n.state(); got != want {
			t.Errorf("%+v: %s, want %s", n, got, want)
		}
	}
}
