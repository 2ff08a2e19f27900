package qemu

import (
	"context"
	"time"

	"golang.org/x/sys/unix"
)

func rdtsc() uint64

// measureTSC returns the rate of the CPU's time stamp counter in kHz, measured against
// the raw monotonic clock over a tenth of a second (good to a few parts in a million).
func measureTSC(ctx context.Context) (int64, error) {
	t0, c0 := stamp()
	timer := time.NewTimer(100 * time.Millisecond)
	defer timer.Stop()
	select {
	case <-timer.C:
	case <-ctx.Done():
		return 0, ctx.Err()
	}
	t1, c1 := stamp()
	return int64(float64(c1-c0) * 1e6 / float64(t1-t0)), nil
}

// stamp reads both clocks at one moment: of some tries the one that was preempted least.
func stamp() (ns int64, tsc uint64) {
	best := ^uint64(0)
	for range 16 {
		var ts unix.Timespec
		before := rdtsc()
		if err := unix.ClockGettime(unix.CLOCK_MONOTONIC_RAW, &ts); err != nil {
			continue
		}
		if after := rdtsc(); after-before < best {
			best, ns, tsc = after-before, ts.Nano(), before+(after-before)/2
		}
	}
	return ns, tsc
}
