package cli

import (
	"bufio"
	"errors"
	"fmt"
	"os"
	"strings"

	"github.com/containerd/errdefs"
	"github.com/spf13/cobra"

	"github.com/hypernetes/hypernetes/cluster"
	"github.com/hypernetes/hypernetes/cluster/kubeconfig"
	"github.com/hypernetes/hypernetes/cluster/layout"
	"github.com/hypernetes/hypernetes/cluster/reset"
	"github.com/hypernetes/hypernetes/cluster/status"
)

func newDownCommand() *cobra.Command {
	var keepPods bool
	cmd := &cobra.Command{
		Use:   "down",
		Short: "Stop a node and its Pods",
		Long: `Stops the Pods, then the components, and lets the node's namespaces vanish. What the
cluster knows stays: the next h8s up brings it all back. With --keep-pods the virtual
machines go on without a control plane until the next h8s up.`,
		Args: noArgs,
	}
	name := nodeFlag(cmd)
	cmd.Flags().BoolVar(&keepPods, "keep-pods", false, "leave Pods and the node's namespaces running")
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		if err := needRoot(); err != nil {
			return err
		}
		_, l, err := find(*name)
		if err != nil {
			return err
		}
		if err := eachFurther(cmd, l.Name, func(cmd *cobra.Command, l layout.Node) error {
			_, err := stopNode(cmd, l, keepPods)
			return err
		}); err != nil {
			return err
		}
		stopped, err := stopNode(cmd, l, keepPods)
		if err != nil {
			return err
		}
		switch {
		case !stopped:
			fmt.Fprintf(cmd.OutOrStdout(), "Node %s is not running, nothing to do.\n", l.Name)
		case keepPods:
			fmt.Fprintf(cmd.OutOrStdout(), "Stopped; Pods run on. Next: h8s up%s\n", nameSuffix(l.Name))
		default:
			fmt.Fprintf(cmd.OutOrStdout(), "Stopped, state kept. Next: h8s up%s, or h8s reset%s to remove it.\n", nameSuffix(l.Name), nameSuffix(l.Name))
		}
		return nil
	}
	return cmd
}

func nameSuffix(name string) string {
	if name == DefaultNode {
		return ""
	}
	return " --name " + name
}

// stopNode stops the node through its daemon, or directly if it has none. It reports
// whether there was anything to stop.
func stopNode(cmd *cobra.Command, l layout.Node, keepPods bool) (bool, error) {
	p := newProgress(cmd.OutOrStdout())
	defer p.end()
	last, err := status.NewClient(l.StatusSocket()).Down(cmd.Context(), keepPods, p.event)
	if err == nil {
		if last.Kind == status.Fail {
			return true, because(last.Reason, errors.New(last.Message))
		}
		return true, reset.WaitDaemonGone(cmd.Context(), l)
	}
	if !errdefs.IsUnavailable(err) {
		return true, err
	}
	if cluster.Absent(l).Phase == status.Absent && !reset.AnythingRuns(l) {
		return false, nil
	}
	a, err := layout.FindArtifacts()
	if err != nil {
		return true, err
	}
	err = cluster.Stop(cmd.Context(), a, l, keepPods, p.event)
	if err != nil && reasonOf(err) == nil {
		err = because("H8S_STOP_FAILED", err)
	}
	return true, err
}

func newResetCommand() *cobra.Command {
	var yes, dryRun bool
	cmd := &cobra.Command{
		Use:   "reset",
		Short: "Stop a node and remove every trace of it",
		Long: `Stops the node as h8s down does, then removes its files, certificates, images and
volumes, its cgroups and its entry in your kubeconfig. This cannot be undone.`,
		Args: noArgs,
	}
	name := nodeFlag(cmd)
	cmd.Flags().BoolVarP(&yes, "yes", "y", false, "do not ask")
	cmd.Flags().BoolVar(&dryRun, "dry-run", false, "only list what would be removed")
	cmd.RunE = func(cmd *cobra.Command, _ []string) error { return runReset(cmd, *name, yes, dryRun) }
	return cmd
}

func runReset(cmd *cobra.Command, name string, yes, dryRun bool) error {
	if err := needRoot(); err != nil {
		return err
	}
	_, l, err := find(name)
	if err != nil {
		return err
	}
	out := cmd.OutOrStdout()
	plan := reset.Plan(l)
	further := furtherNodes(l.Name)
	for _, f := range further {
		plan = append(plan, reset.Plan(f.layout)...)
	}
	if dryRun {
		for _, item := range plan {
			fmt.Fprintf(out, "%-10s %s\n", item.Kind, item.What)
		}
		fmt.Fprintf(out, "%d things would be removed.\n", len(plan))
		return nil
	}
	if len(plan) == 0 {
		fmt.Fprintf(out, "Nothing of node %s is left, nothing to do.\n", l.Name)
		return nil
	}
	lost := ""
	if n := countVolumes(plan); n > 0 {
		lost = fmt.Sprintf(" and the data of its volumes (%d; --dry-run lists them)", n)
	}
	if !yes && !confirm(cmd, fmt.Sprintf("Remove node %s with everything in its cluster%s? [y/N] ", l.Name, lost)) {
		return becausef("H8S_USAGE", "not confirmed; --yes does not ask: %w", errdefs.ErrInvalidArgument)
	}
	if err := eachFurther(cmd, l.Name, removeNode); err != nil {
		return err
	}
	forgetNode(cmd.Context(), l)
	if err := removeNode(cmd, l); err != nil {
		return err
	}
	path, err := kubeconfig.UserPath()
	if err == nil {
		_, err = kubeconfig.Unmerge(path, l.Name)
	}
	if err != nil {
		return err
	}
	fmt.Fprintf(out, "Node %s is gone; nothing of it is left.\n", l.Name)
	return nil
}

func countVolumes(plan []reset.Item) int {
	n := 0
	for _, item := range plan {
		if item.Kind == "volume" {
			n++
		}
	}
	return n
}

// removeNode stops a node and removes what there is of it.
func removeNode(cmd *cobra.Command, l layout.Node) error {
	if _, err := stopNode(cmd, l, false); err != nil {
		// What did not stop in order is swept below.
		fmt.Fprintf(cmd.ErrOrStderr(), "h8s: %v; removing what is left\n", err)
	}
	if err := reset.Remove(cmd.Context(), l); err != nil {
		return because("H8S_STOP_FAILED", err)
	}
	return nil
}

func confirm(cmd *cobra.Command, question string) bool {
	f, ok := cmd.InOrStdin().(*os.File)
	if !ok || !isTerminal(f) {
		return false
	}
	fmt.Fprint(cmd.OutOrStdout(), question)
	line, err := bufio.NewReader(f).ReadString('\n')
	return err == nil && strings.EqualFold(strings.TrimSpace(line), "y")
}
