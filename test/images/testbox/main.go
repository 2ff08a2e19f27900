// Command testbox is the process inside test Pods: a server for every probe
// and protocol, and one misbehaviour per subcommand. It is one static program
// so that a test says what it wants instead of scripting it in a shell.
package main

import (
	"fmt"
	"os"
	"sort"
)

// commands by name; each returns the exit code.
var commands = map[string]struct {
	usage string
	run   func(args []string) int
}{
	"serve":    {"[-http :8080] [-tcp :8081] [-udp :8081] [-grpc :8082]  serve all four", serve},
	"exit":     {"CODE  end at once with CODE", exit},
	"signals":  {"[-code N]  print signals; end with N (default 0) on SIGTERM", printSignals},
	"suicide":  {"SIGNUM  kill myself with a signal", suicide},
	"mem":      {"MIB  take and touch MIB mebibytes, print 'ready', keep them", hogMemory},
	"cpu":      {"SECONDS  spin on every CPU", spin},
	"forkbomb": {"[-max N]  start copies of myself without end", forkBomb},
	"write":    {"FILE BYTES  write and sync a file of zeros", writeFile},
	"log":      {"COUNT [INTERVAL]  print numbered lines", logLines},
	"stdin":    {"  copy stdin to stdout, then print the byte count to stderr", copyStdin},
	"dial":     {"NETWORK ADDRESS  connect, send a line, print the answer", dial},
	"get":      {"[-ca FILE] [-token FILE] [-timeout 1m] URL...  fetch URLs, print status and body of each", get},
	"stat":     {"FILE...  describe files with all their attributes", stat},
	"flow":     {"ADDRESS  keep a TCP connection to an echo server busy, print a line a round trip", flow},
	"ledger":   {"[-read] [-interval 20ms] DIR  append checked records, print the number of each that is durable", keepLedger},
	"lookup":   {"[-type A|SRV|PTR|CNAME] NAME  ask the resolver", lookup},
	"raw":      {"INTERFACE HEX...  send Ethernet frames as they are", raw},
	"tls":      {"[-addr :8443] [-dir /tls]  serve an admission webhook and an aggregated API", serveTLS},
	"io":       {"[-write] [-random] [-sync] [-block 4096] [-area BYTES] [-depth 1] [-time 1s] FILE|-  measure I/O past the cache", inputOutput},
	"watch":    {"FILE  print a file's content every time it changes", watch},
}

func main() {
	if len(os.Args) > 1 {
		if c, ok := commands[os.Args[1]]; ok {
			os.Exit(c.run(os.Args[2:]))
		}
	}
	names := make([]string, 0, len(commands))
	for n := range commands {
		names = append(names, n)
	}
	sort.Strings(names)
	fmt.Fprintln(os.Stderr, "usage: testbox COMMAND")
	for _, n := range names {
		fmt.Fprintf(os.Stderr, "  %s %s\n", n, commands[n].usage)
	}
	os.Exit(2)
}
