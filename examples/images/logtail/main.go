// Command logtail is a logging agent: it follows every *.log file of a
// directory, also those that appear later or are truncated, and prints each
// line with its origin, so that a collector of container logs gets them.
package main

import (
	"context"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"syscall"
)

func main() {
	dir := flag.String("dir", "/var/log", "directory to follow")
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM, syscall.SIGINT)
	defer stop()
	t := &tailer{dir: *dir, out: os.Stdout, at: map[string]int64{}}
	if err := t.run(ctx); err != nil {
		fmt.Fprintln(os.Stderr, "logtail:", err)
		os.Exit(1)
	}
}
