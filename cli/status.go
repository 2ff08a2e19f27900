package cli

import (
	"context"
	"fmt"
	"io"
	"os"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/containerd/errdefs"
	"github.com/spf13/cobra"

	"github.com/hypernetes/hypernetes/cluster"
	"github.com/hypernetes/hypernetes/cluster/doctor"
	"github.com/hypernetes/hypernetes/cluster/status"
	"github.com/hypernetes/hypernetes/cluster/supervisor"
)

func newStatusCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "status",
		Short: "Show a node, its components and what is wrong with them",
		Long:  "Shows the node's phase and each component's state. The exit code is 0\nfor a node that is running or degraded, which is to say one with a component that is not ready.",
		Args:  noArgs,
	}
	name, output := nodeFlag(cmd), outputFlag(cmd)
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		if err := checkOutput(*output); err != nil {
			return err
		}
		_, l, err := find(*name)
		if err != nil {
			return err
		}
		st, err := status.NewClient(l.StatusSocket()).Status(cmd.Context())
		if errdefs.IsUnavailable(err) {
			st, err = cluster.Absent(l), nil
		}
		if err != nil {
			return err
		}
		st.Nodes = furtherStatus(cmd.Context(), l.Name)
		st.OpenStack = cloudStatus(cmd.Context(), st)
		if *output == "json" {
			err = printJSON(cmd.OutOrStdout(), st)
		} else {
			err = printStatus(cmd.OutOrStdout(), st)
		}
		if err != nil {
			return err
		}
		if st.Phase != status.Running && st.Phase != status.Degraded {
			return becausef("H8S_NOT_RUNNING", "node %s is %s", l.Name, st.Phase)
		}
		return nil
	}
	return cmd
}

// cloudStatus asks the cluster's cloud, from the node.
func cloudStatus(ctx context.Context, st status.Node) *status.OpenStack {
	dial := dialNode(st)
	if st.Settings.OpenStack == nil || dial == nil {
		return nil
	}
	c, err := doctor.CloudCredentials(*st.Settings.OpenStack)
	if err != nil {
		return &status.OpenStack{Message: err.Error()}
	}
	// Whoever asks for the node's status must not wait long for somebody else's.
	ctx, cancel := context.WithTimeout(ctx, 3*time.Second)
	defer cancel()
	said, err := doctor.AskCloud(ctx, c, dial)
	if err != nil {
		return &status.OpenStack{Message: err.Error()}
	}
	return &status.OpenStack{Answers: true, Message: said}
}

func printStatus(w io.Writer, st status.Node) error {
	fmt.Fprintf(w, "node %s: %s\n", st.Name, st.Phase)
	if st.Phase == status.Headless {
		fmt.Fprintln(w, "Its daemon is gone; Pods and components that run go on. h8s up takes them over.")
	}
	if st.Error != "" {
		fmt.Fprintf(w, "error: %s\n", st.Error)
	}
	if st.Server != "" {
		fmt.Fprintf(w, "server: %s   kubeconfig: %s\n", st.Server, st.Kubeconfig)
	}
	for _, p := range st.Settings.Publish {
		fmt.Fprintf(w, "published: %s\n", p)
	}
	for _, n := range st.Nodes {
		fmt.Fprintf(w, "further node: %s %s (%s)\n", n.Name, n.Phase, n.IP)
	}
	if st.OpenStack != nil {
		fmt.Fprintf(w, "OpenStack: %s\n", st.OpenStack.Message)
	}
	if len(st.Components) == 0 {
		return nil
	}
	tw := tabwriter.NewWriter(w, 2, 8, 2, ' ', 0)
	fmt.Fprintln(tw, "\nCOMPONENT\tSTATE\tPID\tRESTARTS\tFOR\tREADY IN")
	for _, c := range st.Components {
		fmt.Fprintf(tw, "%s\t%s\t%d\t%d\t%s\t%.1fs\n", c.Name, c.State, c.PID, c.Restarts, time.Since(c.Since).Round(time.Second), c.ReadySeconds)
	}
	if err := tw.Flush(); err != nil {
		return err
	}
	for _, c := range st.Components {
		if c.State == supervisor.Ready || c.LastError == "" {
			continue
		}
		fmt.Fprintf(w, "\n%s is %s: %s\n", c.Name, c.State, c.LastError)
		if c.State == supervisor.Failing {
			fmt.Fprint(w, tail(c.Log, 20))
		}
	}
	return nil
}

// tail returns the last lines of a log, indented.
func tail(path string, n int) string {
	f, err := os.Open(path)
	if err != nil {
		return ""
	}
	defer f.Close()
	if err := seekLines(f, n); err != nil {
		return ""
	}
	b, err := io.ReadAll(io.LimitReader(f, 64<<10))
	if err != nil {
		return ""
	}
	lines := strings.Split(strings.TrimRight(string(b), "\n"), "\n")
	for i := range lines {
		lines[i] = "  " + lines[i] + "\n"
	}
	return strings.Join(lines, "")
}
