package main

import (
	"bufio"
	"crypto/rand"
	"encoding/json"
	"flag"
	"fmt"
	random "math/rand/v2"
	"os"
	"runtime"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// inputOutput reads or writes a file or device past the cache and prints what came of it
// as a line of JSON. For "-" it does so for each line of its input; as a machine's first
// process it can only be told so.
func inputOutput(args []string) int {
	if len(args) != 1 || args[0] != "-" {
		if err := measure(args); err != nil {
			return fail(err)
		}
		return 0
	}
	if os.Getpid() == 1 {
		if err := unix.Mount("dev", "/dev", "devtmpfs", 0, ""); err != nil {
			return fail(err)
		}
	}
	fmt.Println("{}") // a terminal loses what came before
	for lines := bufio.NewScanner(os.Stdin); lines.Scan(); {
		if err := measure(strings.Fields(lines.Text())); err != nil {
			fmt.Printf("{\"error\": %q}\n", err.Error())
		}
	}
	return 0
}

// load is what is done to a file.
type load struct {
	write, random, sync bool
	block, area         int64
	depth               int
	time                time.Duration
}

// measured is what came of it: latencies in microseconds.
type measured struct {
	PerSecond float64 `json:"perSecond"`
	P50       float64 `json:"p50"`
	P99       float64 `json:"p99"`
}

func measure(args []string) error {
	var l load
	fs := flag.NewFlagSet("io", flag.ContinueOnError)
	fs.BoolVar(&l.write, "write", false, "")
	fs.BoolVar(&l.random, "random", false, "")
	fs.BoolVar(&l.sync, "sync", false, "fdatasync after each write, as part of it")
	fs.Int64Var(&l.block, "block", 4096, "bytes of an operation")
	fs.Int64Var(&l.area, "area", 64<<20, "bytes from the beginning that are used")
	fs.IntVar(&l.depth, "depth", 1, "operations at a time")
	fs.DurationVar(&l.time, "time", time.Second, "")
	if err := fs.Parse(args); err != nil {
		return err
	}
	if fs.NArg() != 1 || l.block < 512 || l.area < l.block || l.depth < 1 {
		return fmt.Errorf("io: want one FILE, -block of 512 or more, -area not below it, -depth of 1 or more")
	}
	f, err := os.OpenFile(fs.Arg(0), os.O_RDWR|unix.O_DIRECT, 0)
	if err != nil {
		return err
	}
	defer f.Close()
	// A thread each: the scheduler is not asked to take a processor from who waits for a disk.
	runtime.GOMAXPROCS(l.depth + 1)
	m, err := l.run(f)
	if err != nil {
		return err
	}
	return json.NewEncoder(os.Stdout).Encode(m)
}

func (l load) run(f *os.File) (measured, error) {
	var next atomic.Int64
	var wg sync.WaitGroup
	all, failed := make([][]time.Duration, l.depth), make([]error, l.depth)
	began := time.Now()
	for i := range l.depth {
		wg.Go(func() { all[i], failed[i] = l.worker(f, &next, began.Add(l.time)) })
	}
	wg.Wait()
	took := time.Since(began)
	for _, err := range failed {
		if err != nil {
			return measured{}, err
		}
	}
	sorted := slices.Sorted(slices.Values(slices.Concat(all...)))
	at := func(part float64) float64 {
		return float64(sorted[int(part*float64(len(sorted)-1))].Nanoseconds()) / 1e3
	}
	return measured{PerSecond: float64(len(sorted)) / took.Seconds(), P50: at(0.5), P99: at(0.99)}, nil
}

// worker does one operation after the other, at least one.
func (l load) worker(f *os.File, next *atomic.Int64, end time.Time) ([]time.Duration, error) {
	buffer := aligned(int(l.block))
	_, _ = rand.Read(buffer) // zeros are no data to some disks
	took := make([]time.Duration, 0, 1<<14)
	for blocks := l.area / l.block; ; {
		at := next.Add(1)
		if l.random {
			at = random.Int64()
		}
		began := time.Now()
		if err := l.operation(f, buffer, at%blocks*l.block); err != nil {
			return nil, err
		}
		ended := time.Now()
		if took = append(took, ended.Sub(began)); ended.After(end) {
			return took, nil
		}
	}
}

func (l load) operation(f *os.File, buffer []byte, at int64) error {
	if !l.write {
		_, err := f.ReadAt(buffer, at)
		return err
	}
	if _, err := f.WriteAt(buffer, at); err != nil || !l.sync {
		return err
	}
	return unix.Fdatasync(int(f.Fd()))
}

// aligned is a buffer as direct I/O wants it.
func aligned(size int) []byte {
	const page = 4096
	b := make([]byte, size+page)
	skip := -int(uintptr(unsafe.Pointer(unsafe.SliceData(b)))) & (page - 1)
	return b[skip : skip+size]
}
