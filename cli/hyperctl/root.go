package hyperctl

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"runtime/debug"
	"strings"

	"github.com/containerd/errdefs"
	"github.com/spf13/cobra"

	"github.com/hypernetes/hypernetes/cli/usage"
)

// options are the flags every command has.
type options struct {
	node     string // node that hyperctl starts when needed
	endpoint string // containerd socket of some other node
	netns    string // network namespace in which that node's streaming server listens
	handler  string // runtime handler of new Pods
}

// ExitError carries the exit code of a process that hyperctl ran for the
// user; there is nothing to print about it unless it could not be started.
type ExitError struct {
	Code int
	Err  error // why it was not started, or nil
}

func (e *ExitError) Error() string {
	if e.Err != nil {
		return e.Err.Error()
	}
	return fmt.Sprintf("exit code %d", e.Code)
}

func (e *ExitError) Unwrap() error { return e.Err }

// Exit codes of shells for programs that they cannot run.
const (
	exitNotExecutable = 126
	exitNoSuchProgram = 127
)

// notStarted gives an error the exit code a shell would end with if the runtime says
// that the program is missing or not one. The runtime has no other class for it than
// its words.
func notStarted(err error) error {
	if err == nil {
		return nil
	}
	text := strings.ToLower(err.Error())
	switch {
	case strings.Contains(text, "executable file") && strings.Contains(text, "not found"), strings.Contains(text, "open executable: no such file"):
		return &ExitError{Code: exitNoSuchProgram, Err: err}
	case strings.Contains(text, "permission denied"), strings.Contains(text, "exec format error"):
		return &ExitError{Code: exitNotExecutable, Err: err}
	}
	return err
}

// Main runs the command line and returns the process's exit code: that of the
// process for a foreground run and exec (126 or 127 if it cannot be started), 2 for a
// malformed command line, 1 for other errors of our own.
func Main(ctx context.Context, args []string, stderr io.Writer) int {
	cmd := New()
	cmd.SetArgs(args)
	ran, err := cmd.ExecuteContextC(ctx)
	var exit *ExitError
	switch {
	case err == nil:
		return 0
	case errors.As(err, &exit):
		if exit.Err != nil {
			fmt.Fprintln(stderr, "hyperctl:", err)
		}
		return exit.Code
	}
	fmt.Fprintln(stderr, "hyperctl:", err)
	if errdefs.IsInvalidArgument(err) {
		fmt.Fprintf(stderr, "  see `%s --help`\n", ran.CommandPath())
		return 2
	}
	return 1
}

// New returns the command tree.
func New() *cobra.Command {
	o := &options{}
	cmd := &cobra.Command{
		Use:           "hyperctl",
		Short:         "Run Pods in virtual machines of their own, without Kubernetes",
		SilenceUsage:  true,
		SilenceErrors: true,
		Example:       "  POD=$(hyperctl run -d debian sleep 1000)\n  hyperctl exec -t $POD /bin/bash\n  hyperctl rm -f $POD",
	}
	f := cmd.PersistentFlags()
	f.StringVar(&o.node, "node", envOr("HYPERCTL_NODE", "hyper"), "`NODE` to use; it is started when it is not running ($HYPERCTL_NODE)")
	f.StringVar(&o.endpoint, "runtime-endpoint", os.Getenv("HYPERCTL_RUNTIME_ENDPOINT"), "`SOCKET` of a containerd to use instead of a node ($HYPERCTL_RUNTIME_ENDPOINT)")
	f.StringVar(&o.netns, "runtime-netns", os.Getenv("HYPERCTL_RUNTIME_NETNS"), "network namespace `FILE` of that containerd, if it has one of its own ($HYPERCTL_RUNTIME_NETNS)")
	cmd.AddCommand(
		newRunCommand(o), newExecCommand(o), newAttachCommand(o), newLogsCommand(o),
		newListCommand(o), newStopCommand(o), newRemoveCommand(o),
		newImagesCommand(o), newPullCommand(o), newLoadCommand(o), newRemoveImageCommand(o),
		newInfoCommand(o), newVersionCommand(),
	)
	usage.Strict(cmd)
	return cmd
}

func envOr(name, def string) string {
	if v := os.Getenv(name); v != "" {
		return v
	}
	return def
}

// stamped is set by the build: -ldflags "-X <this package>.stamped=...".
var stamped string

// version is what this binary was built from.
func version() string {
	if stamped != "" {
		return stamped
	}
	if info, ok := debug.ReadBuildInfo(); ok && info.Main.Version != "" {
		return info.Main.Version
	}
	return "(devel)"
}
