package cli

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"slices"
	"strings"

	"github.com/containerd/errdefs"
	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"github.com/hypernetes/hypernetes/cluster/layout"
	"github.com/hypernetes/hypernetes/cluster/settings"
)

func newKubectlCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "kubectl [--name NODE] ARG...",
		Short: "Run kubectl against the node",
		Long:  "Runs the kubectl that comes with h8s, with the node's administrator kubeconfig.\nEverything after the optional --name is kubectl's.",
		Example: `  h8s kubectl get pods -A
  h8s kubectl --name two logs -f web`,
		DisableFlagParsing: true,
		RunE: func(cmd *cobra.Command, args []string) error {
			if len(args) == 1 && (args[0] == "--help" || args[0] == "-h") {
				return cmd.Help()
			}
			name, rest, err := splitName(args)
			if err != nil {
				return err
			}
			a, l, err := find(name)
			if err != nil {
				return err
			}
			if s, err := settings.Load(l.StatePath("node.json")); err == nil && s.Of != "" {
				if l, err = layout.NewNode(s.Of); err != nil { // whose cluster it is
					return err
				}
			}
			f, err := os.Open(l.Kubeconfig())
			if errors.Is(err, fs.ErrNotExist) {
				return notRunning(l)
			}
			if err != nil {
				return err
			}
			_ = f.Close() // kubectl reads it
			env := slices.DeleteFunc(os.Environ(), func(kv string) bool { return strings.HasPrefix(kv, "KUBECONFIG=") })
			err = unix.Exec(a.Bin("kubernetes"), append([]string{"kubectl"}, rest...), append(env, "KUBECONFIG="+l.Kubeconfig()))
			return fmt.Errorf("run %s: %w", a.Bin("kubernetes"), err)
		},
	}
}

// splitName takes a leading --name from kubectl's arguments.
func splitName(args []string) (name string, rest []string, err error) {
	if len(args) == 0 {
		return DefaultNode, nil, nil
	}
	if v, ok := strings.CutPrefix(args[0], "--name="); ok {
		return v, args[1:], nil
	}
	if args[0] != "--name" {
		return DefaultNode, args, nil
	}
	if len(args) < 2 {
		return "", nil, becausef("H8S_USAGE", "--name needs a node's name: %w", errdefs.ErrInvalidArgument)
	}
	return args[1], args[2:], nil
}
