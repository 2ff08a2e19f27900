package placeholder

import (
	"fmt"
	"os"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// mount is a line of mountinfo (proc_pid_mountinfo(5)).
type mount struct {
	device                       uint64
	root, target, fsType, source string
}

func mounts() ([]mount, error) {
	text, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		return nil, fmt.Errorf("placeholder: %w", err)
	}
	return parse(string(text)), nil
}

// mountAt returns the uppermost mount at a path, nil for none.
func mountAt(target string) (*mount, error) {
	all, err := mounts()
	if err != nil {
		return nil, err
	}
	for i := len(all) - 1; i >= 0; i-- {
		if all[i].target == target {
			return &all[i], nil
		}
	}
	return nil, nil
}

// parse passes over lines that are none.
func parse(text string) []mount {
	var out []mount
	for line := range strings.Lines(text) {
		left, right, ok := strings.Cut(strings.TrimSuffix(line, "\n"), " - ")
		l, r := strings.Fields(left), strings.Fields(right)
		if !ok || len(l) < 6 || len(r) < 2 {
			continue
		}
		major, minor, ok := strings.Cut(l[2], ":")
		a, err1 := strconv.ParseUint(major, 10, 32)
		b, err2 := strconv.ParseUint(minor, 10, 32)
		if !ok || err1 != nil || err2 != nil {
			continue
		}
		out = append(out, mount{unix.Mkdev(uint32(a), uint32(b)), unescape(l[3]), unescape(l[4]), r[0], unescape(r[1])})
	}
	return out
}

// unescape reads \040 and the like.
func unescape(s string) string {
	if !strings.Contains(s, `\`) {
		return s
	}
	var b strings.Builder
	for i := 0; i < len(s); i++ {
		if s[i] == '\\' && i+3 < len(s) {
			if c, err := strconv.ParseUint(s[i+1:i+4], 8, 8); err == nil {
				b.WriteByte(byte(c))
				i += 3
				continue
			}
		}
		b.WriteByte(s[i])
	}
	return b.String()
}
