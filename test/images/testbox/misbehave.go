package main

import (
	"bufio"
	"errors"
	"flag"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"os/signal"
	"runtime"
	"strconv"
	"sync/atomic"
	"syscall"
	"time"
)

// number is args[i], or def if it is missing or not a number.
func number(args []string, i, def int) int {
	if i < len(args) {
		if n, err := strconv.Atoi(args[i]); err == nil {
			return n
		}
	}
	return def
}

func fail(err error) int {
	fmt.Fprintln(os.Stderr, "testbox:", err)
	return 1
}

func exit(args []string) int { return number(args, 0, 0) }

func printSignals(args []string) int {
	fs := flag.NewFlagSet("signals", flag.ExitOnError)
	code := fs.Int("code", 0, "exit code on SIGTERM")
	ignore := fs.Bool("ignore", false, "do not end on SIGTERM")
	_ = fs.Parse(args)
	c := make(chan os.Signal, 64)
	signal.Notify(c)
	fmt.Println("ready")
	for s := range c {
		if s == syscall.SIGURG { // the Go runtime's own
			continue
		}
		fmt.Println("signal", s)
		if s == syscall.SIGTERM && !*ignore {
			return *code
		}
	}
	return 0
}

// suicide ends by a signal. The kernel keeps PID 1 of a namespace from killing
// itself, so there a child dies and its end is passed on as a shell would.
func suicide(args []string) int {
	sig := syscall.Signal(number(args, 0, 9))
	if os.Getpid() == 1 {
		err := exec.Command("/proc/self/exe", append([]string{"suicide"}, args...)...).Run()
		var exit *exec.ExitError
		if !errors.As(err, &exit) {
			return fail(fmt.Errorf("child: %w", err))
		}
		return 128 + int(exit.Sys().(syscall.WaitStatus).Signal())
	}
	signal.Reset(sig)
	if err := syscall.Kill(os.Getpid(), sig); err != nil {
		return fail(err)
	}
	<-time.After(10 * time.Second)
	return fail(fmt.Errorf("signal %d does not kill me", sig))
}

func hogMemory(args []string) int {
	hog := make([]byte, number(args, 0, 64)<<20)
	for i := 0; i < len(hog); i += 4096 {
		hog[i] = 1
	}
	fmt.Println("ready")
	c := make(chan os.Signal, 1)
	signal.Notify(c, syscall.SIGTERM)
	<-c
	runtime.KeepAlive(hog)
	return 0
}

func spin(args []string) int {
	var work atomic.Uint64
	for range runtime.NumCPU() {
		go func() {
			for n := uint64(0); ; n++ {
				work.Store(n)
			}
		}()
	}
	<-time.After(time.Duration(number(args, 0, 10)) * time.Second)
	return 0
}

// forkBomb starts copies of itself until the kernel refuses, and then keeps
// trying: the limits of the Pod, not this program, must end it.
func forkBomb(args []string) int {
	fs := flag.NewFlagSet("forkbomb", flag.ExitOnError)
	limit := fs.Int("max", 0, "stop after this many copies (0: never)")
	_ = fs.Parse(args)
	var started, refused int
	for *limit == 0 || started < *limit {
		if err := exec.Command("/proc/self/exe", "forkbomb").Start(); err != nil {
			if refused++; refused == 1 {
				fmt.Printf("refused after %d: %v\n", started, err)
			}
			continue
		}
		started++
	}
	return 0
}

func writeFile(args []string) int {
	if len(args) != 2 {
		return fail(fmt.Errorf("write: want FILE BYTES"))
	}
	f, err := os.Create(args[0])
	if err != nil {
		return fail(err)
	}
	defer f.Close()
	if _, err := io.CopyN(f, zeros{}, int64(number(args, 1, 0))); err != nil {
		return fail(err)
	}
	if err := f.Sync(); err != nil {
		return fail(err)
	}
	fmt.Println("written")
	return 0
}

func logLines(args []string) int {
	var every time.Duration
	if len(args) > 1 {
		d, err := time.ParseDuration(args[1])
		if err != nil {
			return fail(err)
		}
		every = d
	}
	out := bufio.NewWriter(os.Stdout)
	for i := range number(args, 0, 10) {
		fmt.Fprintln(out, "line", i)
		if every > 0 {
			out.Flush()
			<-time.After(every)
		}
	}
	out.Flush()
	return 0
}

func copyStdin([]string) int {
	n, err := io.Copy(os.Stdout, os.Stdin)
	if err != nil {
		return fail(err)
	}
	fmt.Fprintln(os.Stderr, n)
	return 0
}

func dial(args []string) int {
	if len(args) != 2 {
		return fail(fmt.Errorf("dial: want NETWORK ADDRESS"))
	}
	c, err := net.DialTimeout(args[0], args[1], 5*time.Second)
	if err != nil {
		return fail(err)
	}
	defer c.Close()
	_ = c.SetDeadline(time.Now().Add(5 * time.Second))
	if _, err := fmt.Fprintln(c, "hello"); err != nil {
		return fail(err)
	}
	line, err := bufio.NewReader(c).ReadString('\n')
	fmt.Print(line)
	if err != nil {
		return fail(err)
	}
	return 0
}

// watch polls, because atomic updates replace what inotify would watch.
func watch(args []string) int {
	if len(args) != 1 {
		return fail(fmt.Errorf("watch: want FILE"))
	}
	last := "\x00"
	for range time.Tick(200 * time.Millisecond) {
		data, err := os.ReadFile(args[0])
		text := string(data)
		if err != nil {
			text = err.Error()
		}
		if text != last {
			fmt.Println(text)
			last = text
		}
	}
	return 0
}
