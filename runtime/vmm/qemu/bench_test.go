package qemu

import (
	"fmt"
	"os"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// BenchmarkHello measures exec of QEMU to the guest's first byte on the channel: wall
// time, CPU of the whole VMM (launcher included) and memory then.
func BenchmarkHello(b *testing.B) {
	for _, f := range variants(b) {
		for _, machine := range []string{"q35", "microvm"} {
			b.Run(f.variant+"/"+machine, func(b *testing.B) {
				var cpu time.Duration
				var rss, pss float64
				for range b.N {
					c := config(f)
					c.Machine = machine
					g := boot(b, c)
					cpu += cpuTime(b, g.PID())
					rss, pss = rss+memory(b, g.PID(), "Rss"), pss+memory(b, g.PID(), "Pss")
					b.StopTimer()
					if err := g.Kill(); err != nil {
						b.Fatal(err)
					}
					<-g.Done()
					b.StartTimer()
				}
				n := float64(b.N)
				b.ReportMetric(float64(cpu.Milliseconds())/n, "cpu-ms/op")
				b.ReportMetric(rss/n/1024, "rss-MiB")
				b.ReportMetric(pss/n/1024, "pss-MiB")
			})
		}
	}
}

func cpuTime(b *testing.B, pid int) time.Duration {
	b.Helper()
	var ts unix.Timespec
	clock := int32(^uint32(pid)<<3 | 2) // CPUCLOCK_SCHED of the whole process, clock_getcpuclockid(3)
	if err := unix.ClockGettime(clock, &ts); err != nil {
		b.Fatal(err)
	}
	return time.Duration(ts.Nano())
}

func memory(b *testing.B, pid int, field string) float64 {
	b.Helper()
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/smaps_rollup", pid))
	if err != nil {
		b.Fatal(err)
	}
	for line := range strings.Lines(string(text)) {
		if f := strings.Fields(line); f[0] == field+":" {
			var kb float64
			if _, err := fmt.Sscan(f[1], &kb); err != nil {
				b.Fatal(err)
			}
			return kb
		}
	}
	b.Fatalf("no %s in smaps_rollup", field)
	return 0
}
