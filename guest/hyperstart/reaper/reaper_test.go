package reaper

import (
	"bufio"
	"context"
	"os"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

func running(t *testing.T) *Reaper {
	t.Helper()
	// Orphans come to this process as they come to PID 1.
	if err := unix.Prctl(unix.PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0); err != nil {
		t.Fatal(err)
	}
	r := New()
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan struct{})
	go func() {
		defer close(done)
		r.Run(ctx)
	}()
	t.Cleanup(func() {
		cancel()
		<-done
	})
	return r
}

func wait(t *testing.T, c <-chan Status) Status {
	t.Helper()
	select {
	case st := <-c:
		return st
	case <-time.After(30 * time.Second):
		t.Fatal("no status")
	}
	return Status{}
}

func sh(t *testing.T, r *Reaper, script string, out *os.File) (int, <-chan Status) {
	t.Helper()
	null, err := os.OpenFile(os.DevNull, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer null.Close()
	if out == nil {
		out = null
	}
	pid, c, err := r.Start("/bin/sh", []string{"sh", "-c", script}, &syscall.ProcAttr{
		Files: []uintptr{null.Fd(), out.Fd(), 2}})
	if err != nil {
		t.Fatal(err)
	}
	return pid, c
}

func TestStart(t *testing.T) {
	r := running(t)
	for range 20 { // fast ones: the exit races with the registration
		if _, c := sh(t, r, "exit 3", nil); wait(t, c).Code != 3 {
			t.Fatal("wrong status")
		}
	}
	if _, c := sh(t, r, "kill -9 $$", nil); wait(t, c).Code != 137 {
		t.Fatal("a killed process must report 128+n")
	}
	if _, _, err := r.Start("/nonexistent", []string{"x"}, &syscall.ProcAttr{}); err == nil {
		t.Fatal("started nothing")
	}
}

func TestAdopt(t *testing.T) {
	r := running(t)
	for _, script := range []string{"exit 5", "sleep 0.2; exit 5"} {
		w := r.Window()
		rd, wr, err := os.Pipe()
		if err != nil {
			t.Fatal(err)
		}
		// The shell leaves a child behind, as crun does. The child stays until the shell is
		// gone: a shell collects those that end before it does.
		_, c := sh(t, r, "sh -c 'while kill -0 $0; do :; done; "+script+"' $$ >/dev/null 2>&1 & echo $!", wr)
		wr.Close()
		line, err := bufio.NewReader(rd).ReadString('\n')
		if err != nil {
			t.Fatal(err)
		}
		rd.Close()
		wait(t, c)
		pid, err := strconv.Atoi(strings.TrimSpace(line))
		if err != nil {
			t.Fatal(err)
		}
		if script == "exit 5" {
			for unix.Kill(pid, 0) == nil { // until it is dead and reaped
				time.Sleep(time.Millisecond)
			}
		}
		if st := wait(t, w.Adopt(pid)); st.Code != 5 {
			t.Fatalf("%s: adopted status %d", script, st.Code)
		}
		w.Close()
	}
	if len(r.windows) != 0 || len(r.waiters) != 0 {
		t.Fatal("the reaper keeps what is done")
	}
}
