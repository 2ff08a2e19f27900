package bootstrap

import (
	"context"
	"flag"
	"fmt"
	"io"
	"net"
	"os"
	"runtime/debug"

	bootapi "github.com/containerd/containerd/api/runtime/bootstrap/v1"
	"github.com/containerd/containerd/api/types/runtimeoptions/v1"
	"github.com/containerd/errdefs"
	"google.golang.org/protobuf/proto"
)

// Params is what containerd says of the shim to start, or to delete.
type Params struct {
	ID, Namespace, Bundle string
	// Address is containerd's ttrpc address, for events.
	Address string
	// Socket is the path of the shim's own socket.
	Socket string
	// ConfigPath is the configuration's, "" if containerd names none.
	ConfigPath string
	Debug      bool
}

// Program is a shim.
type Program struct {
	// Check says whether a shim with these parameters could work; called by start.
	Check func(Params) error
	// Serve serves until the sandbox has been shut down.
	Serve func(ctx context.Context, p Params, l net.Listener) error
	// Delete collects what a dead shim left, and does nothing if it lives.
	Delete func(ctx context.Context, p Params) error
	// Sweep collects what every dead shim of the node left. Not containerd's: a node's
	// supervisor runs `containerd-shim-hyper-v2 sweep` before it starts containerd.
	Sweep func(ctx context.Context, p Params) error
}

// maxParams bounds what is read from standard input, in bytes.
const maxParams = 4 << 20

// gcPercent trades processor time, of which a shim needs little, for memory.
const gcPercent = 40

// Main runs the action of the command line and returns the exit status.
func Main(p Program) int {
	debug.SetGCPercent(gcPercent)
	params, action, err := parseArgs(os.Args[1:])
	if err == nil {
		switch action {
		case "start":
			err = start(p, params, os.Stdin, os.Stdout)
		case "serve":
			err = serve(p, params)
		case "delete":
			err = remove(p, params, os.Stdout)
		case "sweep":
			err = sweep(p, params)
		default:
			err = fmt.Errorf("action %q: must be start, delete or sweep: %w", action, errdefs.ErrInvalidArgument)
		}
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	return 0
}

func parseArgs(args []string) (Params, string, error) {
	var p Params
	var ignored string
	f := flag.NewFlagSet("containerd-shim-hyper-v2", flag.ContinueOnError)
	f.SetOutput(io.Discard)
	f.StringVar(&p.Namespace, "namespace", "", "")
	f.StringVar(&p.ID, "id", "", "")
	f.StringVar(&p.Bundle, "bundle", "", "")
	f.StringVar(&ignored, "address", "", "")
	f.StringVar(&ignored, "publish-binary", "", "")
	f.StringVar(&p.ConfigPath, "config", "", "")
	f.StringVar(&p.Socket, "socket", "", "")
	f.StringVar(&p.Address, "events", "", "")
	f.BoolVar(&p.Debug, "debug", false, "")
	if err := f.Parse(args); err != nil {
		return p, "", fmt.Errorf("command line: %w: %w", err, errdefs.ErrInvalidArgument)
	}
	if f.NArg() != 1 {
		return p, "", fmt.Errorf("command line: want one action, got %d; containerd starts this program: %w", f.NArg(), errdefs.ErrInvalidArgument)
	}
	if f.Arg(0) != "sweep" && (p.ID == "" || p.Namespace == "") {
		return p, "", fmt.Errorf("command line: -namespace and -id must be given: %w", errdefs.ErrInvalidArgument)
	}
	return p, f.Arg(0), nil
}

// readParams completes the parameters from standard input.
func readParams(p Params, in io.Reader) (Params, error) {
	b, err := io.ReadAll(io.LimitReader(in, maxParams))
	if err != nil {
		return p, fmt.Errorf("read bootstrap parameters: %w", err)
	}
	var boot bootapi.BootstrapParams
	if err := proto.Unmarshal(b, &boot); err != nil || len(b) == 0 || boot.InstanceID != p.ID || boot.Namespace != p.Namespace {
		return p, fmt.Errorf("standard input has no bootstrap parameters for %s; remedy: containerd 2.3 or later: %w", p.ID, errdefs.ErrInvalidArgument)
	}
	p.Address = boot.ContainerdTtrpcAddress
	p.Debug = p.Debug || boot.LogLevel <= bootapi.LogLevel_LOG_LEVEL_DEBUG
	var o runtimeoptions.Options
	if ok, err := boot.FindExtension(&o); err != nil {
		return p, fmt.Errorf("runtime options: %w: %w", err, errdefs.ErrInvalidArgument)
	} else if ok {
		p.ConfigPath = o.ConfigPath
	}
	dir := boot.GetSocketDir()
	if dir == "" {
		dir = defaultSocketDir
	}
	p.Socket = socketPath(dir, p.Address, p.Namespace, p.ID)
	return p, nil
}
