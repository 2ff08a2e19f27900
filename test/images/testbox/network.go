package main

import (
	"bufio"
	"context"
	"encoding/hex"
	"errors"
	"flag"
	"fmt"
	"net"
	"os"
	"sort"
	"strconv"
	"strings"
	"syscall"
	"time"
)

// flow keeps one TCP connection to an echo server busy until it breaks or is told to
// stop: the proof that nothing along the way dropped it.
func flow(args []string) int {
	if len(args) != 1 {
		return fail(fmt.Errorf("flow: want ADDRESS"))
	}
	c, err := net.DialTimeout("tcp", args[0], 10*time.Second)
	if err != nil {
		return fail(err)
	}
	defer c.Close()
	in := bufio.NewReader(c)
	for i := 1; ; i++ {
		// A stall shorter than this is a retransmission, not a broken connection.
		_ = c.SetDeadline(time.Now().Add(20 * time.Second))
		if _, err := fmt.Fprintln(c, i); err != nil {
			return fail(fmt.Errorf("flow broke after %d: %w", i-1, err))
		}
		line, err := in.ReadString('\n')
		if err != nil || strings.TrimSpace(line) != strconv.Itoa(i) {
			return fail(fmt.Errorf("flow broke at %d: got %q: %v", i, line, err))
		}
		fmt.Println("flow", i)
		time.Sleep(100 * time.Millisecond)
	}
}

// lookup asks the resolver of resolv.conf.
func lookup(args []string) int {
	fs := flag.NewFlagSet("lookup", flag.ExitOnError)
	kind := fs.String("type", "A", "A, SRV, PTR or CNAME")
	_ = fs.Parse(args)
	ctx, cancel := context.WithTimeout(context.Background(), 15*time.Second)
	defer cancel()
	r := &net.Resolver{PreferGo: true}
	var out []string
	var err error
	switch *kind {
	case "A":
		out, err = r.LookupHost(ctx, fs.Arg(0))
	case "SRV":
		var srv []*net.SRV
		_, srv, err = r.LookupSRV(ctx, "", "", fs.Arg(0))
		for _, s := range srv {
			out = append(out, fmt.Sprintf("%s:%d", s.Target, s.Port))
		}
	case "PTR":
		out, err = r.LookupAddr(ctx, fs.Arg(0))
	case "CNAME":
		var name string
		name, err = r.LookupCNAME(ctx, fs.Arg(0))
		out = []string{name}
	default:
		err = fmt.Errorf("lookup: type %s", *kind)
	}
	if err != nil {
		return fail(err)
	}
	sort.Strings(out)
	fmt.Println(strings.Join(out, "\n"))
	return 0
}

// raw sends Ethernet frames as they are, as only somebody who owns the kernel can.
func raw(args []string) int {
	if len(args) < 2 {
		return fail(errors.New("raw: want INTERFACE and frames in hexadecimal"))
	}
	link, err := net.InterfaceByName(args[0])
	if err != nil {
		return fail(err)
	}
	fd, err := syscall.Socket(syscall.AF_PACKET, syscall.SOCK_RAW, 0)
	if err != nil {
		return fail(err)
	}
	defer syscall.Close(fd)
	for _, text := range args[1:] {
		frame, err := hex.DecodeString(text)
		if err != nil {
			return fail(err)
		}
		if err := syscall.Sendto(fd, frame, 0, &syscall.SockaddrLinklayer{Ifindex: link.Index}); err != nil {
			return fail(err)
		}
	}
	fmt.Fprintln(os.Stdout, "sent", len(args)-1)
	return 0
}
