package cli

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"os/signal"
	"slices"
	"strings"

	"github.com/containerd/errdefs"
	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"github.com/hypernetes/hypernetes/cli/usage"
	"github.com/hypernetes/hypernetes/cluster/layout"
)

// version is set when linking.
var version = "unknown"

// DefaultNode is the node commands mean when no --name is given.
const DefaultNode = "h8s"

// Main runs h8s and returns its exit code.
func Main(args []string) int {
	ctx, stop := signal.NotifyContext(context.Background(), unix.SIGINT, unix.SIGTERM)
	defer stop()
	root := newRoot()
	root.SetArgs(args)
	if err := root.ExecuteContext(ctx); err != nil {
		return explain(os.Stderr, err)
	}
	return 0
}

func newRoot() *cobra.Command {
	root := &cobra.Command{
		Use:   "h8s",
		Short: "Hypernetes: Kubernetes whose Pods are virtual machines",
		Long: `Hypernetes (h8s) is Kubernetes whose Pods are virtual machines.

  h8s up          starts a node with its control plane on this machine
  h8s kubectl     talks to it
  h8s down        stops it, h8s reset removes every trace of it

The node lives in network, mount and host-name namespaces of its own; the machine's
own network and file systems stay as they are. The API server is published on
127.0.0.1 only.`,
		SilenceUsage: true, SilenceErrors: true,
		CompletionOptions: cobra.CompletionOptions{HiddenDefaultCmd: false},
	}
	root.AddCommand(
		newUpCommand(), newDownCommand(), newStatusCommand(), newResetCommand(), newDoctorCommand(),
		newLogsCommand(), newKubectlCommand(), newServerCommand(), newAgentCommand(), newTokenCommand(),
		newTenantCommand(), newNetworkCommand(), newApplyCommand(), newConvertCommand(),
		newLoginCommand(), newCredentialCommand(),
		newNodeCommand(), newDevCommand(), newImageCommand(), newVersionCommand(),
		newSuperviseCommand(), newAnchorCommand(),
	)
	usage.Strict(root)
	return root
}

// nodeFlag adds --name and returns where the node's name will be found.
func nodeFlag(cmd *cobra.Command) *string {
	name := new(string)
	addNodeFlag(cmd, name)
	return name
}

func addNodeFlag(cmd *cobra.Command, name *string) {
	cmd.Flags().StringVarP(name, "name", "n", DefaultNode, "name of the node")
	_ = cmd.RegisterFlagCompletionFunc("name", func(*cobra.Command, []string, string) ([]string, cobra.ShellCompDirective) { // the flag is there
		return nodeNames(), cobra.ShellCompDirectiveNoFileComp
	})
}

// nodeNames lists the nodes of this machine, running or not.
func nodeNames() []string {
	dirs, _ := os.ReadDir(layout.StateRoot) // no directory, no nodes
	var names []string
	for _, d := range dirs {
		if _, err := layout.NewNode(d.Name()); err == nil && d.IsDir() {
			names = append(names, d.Name())
		}
	}
	return names
}

// notRunning says of a node that is needed whether it is down or unknown, and what to do.
func notRunning(l layout.Node) error {
	names := nodeNames()
	if slices.Contains(names, l.Name) {
		return becausef("H8S_NOT_RUNNING", "node %s is not running; start it: h8s up%s: %w", l.Name, nameSuffix(l.Name), errdefs.ErrUnavailable)
	}
	others := "this machine has none"
	if len(names) > 0 {
		others = "this machine has " + strings.Join(names, ", ")
	}
	return becausef("H8S_NOT_RUNNING", "there is no node %s (%s); make it: h8s up%s: %w", l.Name, others, nameSuffix(l.Name), errdefs.ErrUnavailable)
}

func needRoot() error {
	if os.Geteuid() != 0 {
		return becausef("H8S_NOT_ROOT", "this needs root: %w", errdefs.ErrPermissionDenied)
	}
	return nil
}

// find returns the artefacts and the paths of a node.
func find(name string) (layout.Artifacts, layout.Node, error) {
	l, err := layout.NewNode(name)
	if err != nil {
		return layout.Artifacts{}, l, err
	}
	a, err := layout.FindArtifacts()
	return a, l, err
}

// outputFlag adds -o for commands that read.
func outputFlag(cmd *cobra.Command) *string {
	output := new(string)
	cmd.Flags().StringVarP(output, "output", "o", "table", "table or json")
	_ = cmd.RegisterFlagCompletionFunc("output", cobra.FixedCompletions([]string{"table", "json"}, cobra.ShellCompDirectiveNoFileComp)) // the flag is there
	return output
}

func checkOutput(format string) error {
	if format != "table" && format != "json" {
		return becausef("H8S_USAGE", "output %q: want table or json: %w", format, errdefs.ErrInvalidArgument)
	}
	return nil
}

func printJSON(w io.Writer, v any) error {
	enc := json.NewEncoder(w)
	enc.SetIndent("", "  ")
	return enc.Encode(v)
}

// noArgs refuses arguments with a reason.
func noArgs(_ *cobra.Command, args []string) error {
	if len(args) > 0 {
		return becausef("H8S_USAGE", "unexpected argument %q: %w", args[0], errdefs.ErrInvalidArgument)
	}
	return nil
}

func newVersionCommand() *cobra.Command {
	return &cobra.Command{
		Use: "version", Short: "Print the version", Args: noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			_, err := fmt.Fprintln(cmd.OutOrStdout(), version)
			return err
		},
	}
}
