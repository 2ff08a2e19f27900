package bench

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"
)

// process is one of a Pod's processes on the host.
type process struct {
	PID, parent int
	Command     string
	// CPU is what it has used so far.
	CPU time.Duration
}

// processesOf finds the shim of a sandbox, by its id on the command line, and its
// descendants: for a VM its VMM, for runc the containers themselves.
func processesOf(sandbox string) ([]process, error) {
	all, err := processes()
	if err != nil {
		return nil, err
	}
	var mine []process
	for _, p := range all {
		b, err := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", p.PID))
		if err != nil {
			continue // it has ended
		}
		args := strings.Split(string(b), "\x00")
		if strings.HasPrefix(filepath.Base(args[0]), "containerd-shim-") && contains(args, sandbox) {
			mine = append(mine, p)
		}
	}
	for i := 0; i < len(mine); i++ {
		for _, p := range all {
			if p.parent == mine[i].PID {
				mine = append(mine, p)
			}
		}
	}
	if len(mine) == 0 {
		return nil, fmt.Errorf("sandbox %s: no shim has it on its command line", sandbox)
	}
	return mine, nil
}

func contains(args []string, id string) bool {
	for _, a := range args {
		if a == id {
			return true
		}
	}
	return false
}

func processes() ([]process, error) {
	dirs, err := filepath.Glob("/proc/[0-9]*")
	if err != nil {
		return nil, err
	}
	var all []process
	for _, dir := range dirs {
		b, err := os.ReadFile(filepath.Join(dir, "stat"))
		if err != nil {
			continue
		}
		p, err := parseStat(b)
		if err != nil {
			return nil, fmt.Errorf("%s: %w", dir, err)
		}
		all = append(all, p)
	}
	return all, nil
}

// userHz is the unit of CPU times in /proc, the same on every Linux architecture.
const userHz = 100

// parseStat reads /proc/PID/stat; the command in parentheses may hold anything.
func parseStat(b []byte) (process, error) {
	first, last := bytes.IndexByte(b, '('), bytes.LastIndexByte(b, ')')
	if first < 0 || last < first {
		return process{}, errors.New("stat: no command")
	}
	rest := strings.Fields(string(b[last+1:]))
	if len(rest) < 13 {
		return process{}, errors.New("stat: too short")
	}
	var n [4]int
	for i, s := range []string{strings.TrimSpace(string(b[:first])), rest[1], rest[11], rest[12]} {
		v, err := strconv.Atoi(s)
		if err != nil {
			return process{}, fmt.Errorf("stat: %w", err)
		}
		n[i] = v
	}
	return process{
		PID: n[0], parent: n[1], Command: string(b[first+1 : last]),
		CPU: time.Duration(n[2]+n[3]) * time.Second / userHz,
	}, nil
}

// pss is the proportional share of memory of a process, in bytes.
func pss(pid int) (int64, error) {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/smaps_rollup", pid))
	if err != nil {
		return 0, err
	}
	return field(b, "Pss:")
}

// field reads "Name:  123 kB" and returns bytes.
func field(b []byte, name string) (int64, error) {
	lines := bufio.NewScanner(bytes.NewReader(b))
	for lines.Scan() {
		f := strings.Fields(lines.Text())
		if len(f) >= 2 && f[0] == name {
			kb, err := strconv.ParseInt(f[1], 10, 64)
			return kb << 10, err
		}
	}
	return 0, fmt.Errorf("no %q", name)
}
