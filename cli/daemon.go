package cli

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"os"
	"os/signal"
	"syscall"

	"github.com/containerd/errdefs"
	"github.com/containerd/log"
	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"github.com/hypernetes/hypernetes/cluster"
	"github.com/hypernetes/hypernetes/cluster/layout"
	"github.com/hypernetes/hypernetes/cluster/node"
	"github.com/hypernetes/hypernetes/cluster/settings"
	"github.com/hypernetes/hypernetes/cluster/status"
)

// eventsFD is where `h8s up` reads the daemon's progress.
const eventsFD = 3

// superviseInput is what the daemon is told.
type superviseInput struct {
	settings.Node
	// Token is what an agent joins with, once.
	Token string `json:"token,omitempty"`
}

// newSuperviseCommand is the daemon behind `h8s up`: settings on standard input,
// progress on descriptor 3.
func newSuperviseCommand() *cobra.Command {
	cmd := &cobra.Command{Use: "supervise", Hidden: true, Args: noArgs}
	name := nodeFlag(cmd)
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		a, l, err := find(*name)
		if err != nil {
			return err
		}
		var s superviseInput
		if err := json.NewDecoder(io.LimitReader(os.Stdin, 1<<20)).Decode(&s); err != nil {
			return fmt.Errorf("settings: %w", err)
		}
		events := os.NewFile(eventsFD, "events")
		syscall.CloseOnExec(eventsFD)
		enc := json.NewEncoder(events)
		report := func(e status.Event) {
			_ = enc.Encode(e) // nobody may be listening any more
			if e.Kind == status.Done || e.Kind == status.Fail {
				_ = events.Close()
			}
		}
		d, err := cluster.NewDaemon(a, l, s.Node, s.Token)
		if err != nil {
			report(status.Event{Kind: status.Fail, Message: err.Error(), Reason: cluster.ReasonOf(err)})
			return err
		}
		return d.Run(cmd.Context(), report)
	}
	return cmd
}

// newAnchorCommand is the process that holds a node's namespaces.
func newAnchorCommand() *cobra.Command {
	return &cobra.Command{Use: "anchor", Hidden: true, Args: noArgs, RunE: func(cmd *cobra.Command, _ []string) error {
		// Only its own end by h8s down or reset ends it; a terminal's signals are not meant for it.
		signal.Ignore(unix.SIGHUP, unix.SIGINT, unix.SIGPIPE)
		return node.RunAnchor(os.Stdin, os.NewFile(eventsFD, "ready"), func() { <-cmd.Context().Done() })
	}}
}

func newServerCommand() *cobra.Command {
	o := &nodeOptions{}
	var nodeIP string
	cmd := &cobra.Command{
		Use:   "server",
		Short: "Run a node on this machine's own network, in the foreground",
		Long: `Runs the node and its control plane on the machine's own network and host name, in
the foreground, for a service manager. Interrupting it stops the components and keeps
the Pods; h8s down stops those too.`,
		Args: noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error { return runServer(cmd, o, nodeIP) },
	}
	o.addCommon(cmd.Flags())
	o.addOpenStack(cmd.Flags())
	cmd.Flags().StringVar(&nodeIP, "node-ip", "", "address of the node; found by its default route if empty")
	return cmd
}

func runServer(cmd *cobra.Command, o *nodeOptions, nodeIP string) error {
	if err := needRoot(); err != nil {
		return err
	}
	a, l, err := find(o.name)
	if err != nil {
		return err
	}
	s, err := o.settings(l, cmd.Flags())
	if err != nil {
		return err
	}
	if _, err := os.Stat(l.StatePath("node.json")); err == nil && !s.HostNetwork {
		return becausef("H8S_USAGE", "node %s has namespaces of its own: h8s up starts it; h8s server --name OTHER makes one on this machine's network: %w", l.Name, errdefs.ErrInvalidArgument)
	}
	if s.IsAgent() {
		return becausef("H8S_USAGE", "node %s is an agent of %s: h8s agent --name %s starts it: %w", l.Name, s.Server, l.Name, errdefs.ErrInvalidArgument)
	}
	if s, err = onHost(s, nodeIP); err != nil {
		return err
	}
	return runForeground(cmd, a, l, s, "", o.ignorePreflight)
}

// onHost puts a node on the machine's own network.
func onHost(s settings.Node, nodeIP string) (settings.Node, error) {
	s.HostNetwork, s.APIPort = true, settings.APIPort
	if nodeIP != "" {
		if _, err := netip.ParseAddr(nodeIP); err != nil {
			return s, fmt.Errorf("node-ip %q: want an address of this machine: %w", nodeIP, errdefs.ErrInvalidArgument)
		}
		s.NodeIP = nodeIP
		return s, nil
	}
	var err error
	s.NodeIP, err = cluster.HostIP()
	return s, err
}

// runForeground runs a node on the machine's own network until it is interrupted.
func runForeground(cmd *cobra.Command, a layout.Artifacts, l layout.Node, s settings.Node, token string, ignorePreflight bool) error {
	p := newProgress(cmd.OutOrStdout())
	defer p.end()
	if err := preflight(cmd.Context(), a, l, s, ignorePreflight, p); err != nil {
		return err
	}
	d, err := cluster.NewDaemon(a, l, s, token)
	if err != nil {
		return err
	}
	ctx := log.WithLogger(cmd.Context(), log.G(cmd.Context()).WithField("node", l.Name))
	var failed error
	err = d.Run(ctx, func(e status.Event) {
		p.event(e)
		switch e.Kind {
		case status.Done:
			fmt.Fprintf(cmd.OutOrStdout(), "Ready in %.1fs.", e.Seconds)
			if !s.IsAgent() {
				fmt.Fprintf(cmd.OutOrStdout(), " KUBECONFIG=%s", l.Kubeconfig())
			}
			fmt.Fprintln(cmd.OutOrStdout())
		case status.Fail:
			failed = because(e.Reason, errors.New(e.Message))
			fmt.Fprintf(cmd.OutOrStdout(), "Not ready: %s\n", e.Message)
		}
	})
	if failed != nil {
		return failed // with its reason; what the components did meanwhile does not mend it
	}
	return err
}
