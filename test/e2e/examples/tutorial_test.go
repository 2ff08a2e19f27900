package examples

import (
	"bytes"
	"cmp"
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/hypernetes/hypernetes/test/e2e/testcluster"
)

// step is a block of commands of a tutorial, and the lines the page says it prints.
type step struct {
	line   int
	script string
	prints []string
}

// tutorial reads the steps of a page's section "Tutorial".
func tutorial(t *testing.T, file string) (steps []step) {
	t.Helper()
	text, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	in, fence := false, ""
	for i, line := range strings.Split(string(text), "\n") {
		switch {
		case strings.HasPrefix(line, "## "):
			in = strings.HasPrefix(line, "## Tutorial")
		case !in:
		case strings.HasPrefix(line, "```"):
			was := fence
			if fence = strings.TrimPrefix(line, "```"); was == "" && fence == "sh" {
				steps = append(steps, step{line: i + 2})
			} else if was != "" {
				fence = ""
			}
		case fence == "sh":
			steps[len(steps)-1].script += line + "\n"
		case fence == "text":
			s := &steps[len(steps)-1]
			s.prints = append(s.prints, line)
		}
	}
	if fence != "" || len(steps) == 0 {
		t.Fatalf("%s: no tutorial, or a block of it does not end", file)
	}
	return steps
}

// missing is the first of the lines, in their order, that the output does not have: "…" is
// anything, and so many blanks are one.
func missing(output string, lines []string) string {
	rest := strings.Split(output, "\n")
	for _, want := range lines {
		parts := strings.Split(strings.Join(strings.Fields(want), " "), "…")
		for i := range parts {
			parts[i] = regexp.QuoteMeta(parts[i])
		}
		pattern := regexp.MustCompile("^" + strings.Join(parts, ".*") + "$")
		for {
			if len(rest) == 0 {
				return want
			}
			line := strings.Join(strings.Fields(rest[0]), " ")
			rest = rest[1:]
			if pattern.MatchString(line) {
				break
			}
		}
	}
	return ""
}

func TestMissing(t *testing.T) {
	for _, c := range []struct {
		lines []string
		want  string
	}{
		{[]string{"a b", "c … e"}, ""}, {[]string{"c … e", "a b"}, "a b"}, {[]string{"a"}, "a"}, {[]string{"…d…"}, ""},
	} {
		if got := missing("a   b\nc  d  e\n", c.lines); got != c.want {
			t.Errorf("%q: %q, want %q", c.lines, got, c.want)
		}
	}
}

// TestTutorials runs the tutorials as they are written, page after page, on a cluster of
// their own. Only the cluster's name and port are others.
func TestTutorials(t *testing.T) {
	t.Parallel()
	c := testcluster.Own(t, cmp.Or(os.Getenv("H8S_E2E_NODE"), "e2e")+"-t", cmp.Or(os.Getenv("H8S_E2E_TUTORIAL_PORT"), "16448"))
	bin, dir := t.TempDir(), t.TempDir()
	// A program called h8s that means this cluster.
	wrapper := fmt.Sprintf("#!/bin/bash\nset -e\nif [ \"$1\" = kubectl ]; then shift; exec %[1]s/bin/h8s kubectl --name %[2]s \"$@\"; fi\nexec %[1]s/bin/h8s \"$@\" --name %[2]s\n", c.Out, c.Node)
	if err := os.WriteFile(filepath.Join(bin, "h8s"), []byte(wrapper), 0o755); err != nil {
		t.Fatal(err)
	}
	for _, page := range []string{"tenancy.md", "networking.md"} {
		t.Run(page, func(t *testing.T) {
			for _, s := range tutorial(t, filepath.Join("..", "..", "..", "docs", page)) {
				s.run(t, c, page, bin, dir)
			}
		})
	}
}

func (s step) run(t *testing.T, c *testcluster.Cluster, page, bin, dir string) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Minute)
	defer cancel()
	script := strings.ReplaceAll(s.script, "h8s-2", c.Node+"-2")
	cmd := exec.CommandContext(ctx, "bash", "-euo", "pipefail", "-c", script)
	cmd.Dir, cmd.WaitDelay = dir, 5*time.Second
	cmd.Env = append(os.Environ(), "H8S_OUT="+c.Out, "PATH="+bin+":"+os.Getenv("PATH"))
	var out bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &out
	began := time.Now()
	err := cmd.Run()
	t.Logf("%s:%d: %.1f s", page, s.line, time.Since(began).Seconds())
	if err != nil {
		t.Fatalf("%s:%d: %v\n%s\n%s", page, s.line, err, script, out.String())
	}
	if line := missing(strings.ReplaceAll(out.String(), c.Node+"-2", "h8s-2"), s.prints); line != "" {
		t.Errorf("%s:%d: prints no %q, or not in that order:\n%s", page, s.line, line, out.String())
	}
}
