package testcluster

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"
)

// Tutorial runs a section of a page, whose heading begins so, as it is written, in a
// directory and with further variables. Only the cluster's name, h8s, is another. What a page says a command
// prints has to be among what it prints, in that order.
func (c *Cluster) Tutorial(t *testing.T, file, heading, dir string, env ...string) {
	t.Helper()
	text, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	steps, err := tutorial(filepath.Base(file), heading, string(text))
	if err != nil {
		t.Fatal(err)
	}
	bin := t.TempDir()
	// A program called h8s that means this cluster.
	wrapper := fmt.Sprintf("#!/bin/bash\nset -e\nif [ \"$1\" = kubectl ]; then shift; exec %[1]s/bin/h8s kubectl --name %[2]s \"$@\"; fi\n"+
		"if [ \"$1\" = login ]; then exec %[1]s/bin/h8s \"$@\"; fi\nexec %[1]s/bin/h8s \"$@\" --name %[2]s\n", c.Out, c.Node)
	if err := os.WriteFile(filepath.Join(bin, "h8s"), []byte(wrapper), 0o755); err != nil {
		t.Fatal(err)
	}
	env = append([]string{"H8S_OUT=" + c.Out, "PATH=" + bin + ":" + os.Getenv("PATH")}, env...)
	for _, s := range steps {
		s.run(t, c, filepath.Base(file), dir, env)
	}
}

// step is a block of commands of a tutorial, and the lines the page says it prints.
type step struct {
	line   int
	script string
	prints []string
}

// tutorial reads the steps of a page's section.
func tutorial(page, heading, text string) (steps []step, err error) {
	in, fence := false, ""
	for i, line := range strings.Split(text, "\n") {
		switch {
		case strings.HasPrefix(line, "## "):
			in = strings.HasPrefix(line, "## "+heading)
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
		return nil, fmt.Errorf("%s: no section %q with steps, or a block of it does not end", page, heading)
	}
	return steps, nil
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

func (s step) run(t *testing.T, c *Cluster, page, dir string, env []string) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Minute)
	defer cancel()
	script := strings.NewReplacer("h8s-2", c.Node+"-2", "/var/lib/h8s/h8s/", "/var/lib/h8s/"+c.Node+"/").Replace(s.script)
	cmd := exec.CommandContext(ctx, "bash", "-euo", "pipefail", "-c", script)
	cmd.Dir, cmd.WaitDelay = dir, 5*time.Second
	cmd.Env = append(os.Environ(), env...)
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
