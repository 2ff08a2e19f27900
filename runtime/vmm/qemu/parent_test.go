package qemu

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"runtime"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// parentMain is the test binary as the owner of a VM, to be killed: it starts one, ends
// every thread Go is willing to end, and says which process the VM is.
func parentMain() {
	files := strings.Split(os.Getenv("H8S_TEST_PARENT"), ":")
	h, err := Probe(context.Background(), "", "")
	if err == nil {
		var v interface{ PID() int }
		if v, err = New(h).Start(context.Background(), config(guestFiles{"orphan", files[0], files[1]})); err == nil {
			churnThreads()
			fmt.Println(v.PID())
			select {}
		}
	}
	fmt.Println(err)
	os.Exit(1)
}

// churnThreads makes Go create and end threads: a goroutine that ends locked takes its
// thread along. A parent death signal bound to one of them would now go off.
func churnThreads() {
	done := make(chan struct{})
	for range 50 {
		go func() {
			runtime.LockOSThread()
			done <- struct{}{}
		}()
	}
	for range 50 {
		<-done
	}
}

func TestVMDiesWithItsParent(t *testing.T) {
	f := variants(t)[0]
	cmd := exec.Command("/proc/self/exe")
	cmd.Env = append(os.Environ(), "H8S_TEST_PARENT="+f.kernel+":"+f.initrd)
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	defer func() { _ = cmd.Process.Kill(); _ = cmd.Wait() }()
	buf := make([]byte, 256)
	n, err := out.Read(buf)
	if err != nil {
		t.Fatal(err)
	}
	pid, err := strconv.Atoi(strings.TrimSpace(string(buf[:n])))
	if err != nil {
		t.Fatalf("parent says %q", buf[:n])
	}
	fd, err := unix.PidfdOpen(pid, 0)
	if err != nil {
		t.Fatalf("vm %d does not live: %v", pid, err)
	}
	defer unix.Close(fd)
	if gone(t, fd, 300*time.Millisecond) {
		t.Fatal("vm died although its parent lives")
	}
	if err := cmd.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	if !gone(t, fd, time.Minute) {
		_ = unix.Kill(pid, unix.SIGKILL)
		t.Fatalf("vm %d outlives its parent", pid)
	}
}

// gone waits for the end of the process behind a pidfd.
func gone(t *testing.T, fd int, limit time.Duration) bool {
	t.Helper()
	deadline := time.Now().Add(limit)
	for {
		left := time.Until(deadline).Milliseconds()
		n, err := unix.Poll([]unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}, int(max(left, 0)))
		if errors.Is(err, unix.EINTR) {
			continue
		}
		if err != nil {
			t.Fatal(err)
		}
		return n > 0
	}
}
