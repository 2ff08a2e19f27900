package main

import (
	"flag"
	"fmt"
	"time"

	"github.com/hypernetes/hypernetes/test/ledger"
)

// keepLedger prints "has N ID" of a ledger that is as it should be, and then "kept N" of
// each record that it appended.
func keepLedger(args []string) int {
	fs := flag.NewFlagSet("ledger", flag.ExitOnError)
	read := fs.Bool("read", false, "only look at it")
	interval := fs.Duration("interval", 20*time.Millisecond, "between two records")
	_ = fs.Parse(args)
	if fs.NArg() != 1 {
		return fail(fmt.Errorf("ledger: want DIR"))
	}
	if *read {
		s, err := ledger.Read(fs.Arg(0))
		fmt.Println("has", s.Records, s.ID)
		if err != nil {
			return fail(err)
		}
		return 0
	}
	l, s, err := ledger.Open(fs.Arg(0))
	fmt.Println("has", s.Records, s.ID)
	if err != nil {
		return fail(err)
	}
	for {
		n, err := l.Append()
		if err != nil {
			return fail(err)
		}
		fmt.Println("kept", n)
		<-time.After(*interval)
	}
}
