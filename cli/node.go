package cli

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/containerd/errdefs"
	"github.com/spf13/cobra"

	"github.com/hypernetes/hypernetes/cluster"
	"github.com/hypernetes/hypernetes/cluster/apiclient"
	"github.com/hypernetes/hypernetes/cluster/drain"
	"github.com/hypernetes/hypernetes/cluster/layout"
	"github.com/hypernetes/hypernetes/cluster/status"
)

func newNodeCommand() *cobra.Command {
	cmd := &cobra.Command{Use: "node", Short: "List the cluster's nodes, drain them and remove them"}
	cmd.AddCommand(newNodeListCommand(), newNodeDrainCommand(), newNodeUncordonCommand(), newNodeRemoveCommand())
	return cmd
}

// clusterNode is a node of the cluster as h8s node list shows it.
type clusterNode struct {
	Name          string   `json:"name"`
	Roles         []string `json:"roles"`
	Ready         string   `json:"ready"`
	Unschedulable bool     `json:"unschedulable,omitempty"`
	Address       string   `json:"address"`
	PodCIDRs      []string `json:"podCIDRs"`
	Version       string   `json:"version"`
	Message       string   `json:"message,omitempty"`
}

func (n clusterNode) state() string {
	s := map[string]string{"True": "Ready", "False": "NotReady", "Unknown": "lost"}[n.Ready]
	if s == "" {
		s = "unknown"
	}
	if n.Unschedulable {
		s += ", takes no Pods"
	}
	return s
}

func listNodes(ctx context.Context, api *apiclient.Client) ([]clusterNode, error) {
	var list struct {
		Items []struct {
			Metadata struct {
				Name   string
				Labels map[string]string
			}
			Spec struct {
				Unschedulable bool
				PodCIDRs      []string
			}
			Status struct {
				Addresses  []struct{ Type, Address string }
				Conditions []struct{ Type, Status, Message string }
				NodeInfo   struct{ KubeletVersion string }
			}
		}
	}
	if err := api.Get(ctx, "/api/v1/nodes", &list); err != nil {
		return nil, err
	}
	out := make([]clusterNode, 0, len(list.Items))
	for _, i := range list.Items {
		n := clusterNode{
			Name: i.Metadata.Name, Unschedulable: i.Spec.Unschedulable, PodCIDRs: i.Spec.PodCIDRs,
			Version: i.Status.NodeInfo.KubeletVersion, Roles: []string{},
		}
		for label := range i.Metadata.Labels {
			if role, ok := strings.CutPrefix(label, "node-role.kubernetes.io/"); ok {
				n.Roles = append(n.Roles, role)
			}
		}
		slices.Sort(n.Roles)
		for _, a := range i.Status.Addresses {
			if a.Type == "InternalIP" && n.Address == "" {
				n.Address = a.Address
			}
		}
		for _, c := range i.Status.Conditions {
			if c.Type == "Ready" {
				n.Ready, n.Message = c.Status, c.Message
			}
		}
		out = append(out, n)
	}
	slices.SortFunc(out, func(a, b clusterNode) int { return strings.Compare(a.Name, b.Name) })
	return out, nil
}

func newNodeListCommand() *cobra.Command {
	cmd := &cobra.Command{Use: "list", Short: "List the cluster's nodes", Args: noArgs}
	name, output := nodeFlag(cmd), outputFlag(cmd)
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		if err := checkOutput(*output); err != nil {
			return err
		}
		_, l, err := find(*name)
		if err != nil {
			return err
		}
		api, _, err := admin(l)
		if err != nil {
			return err
		}
		defer api.Close()
		nodes, err := listNodes(cmd.Context(), api)
		if err != nil {
			return err
		}
		if *output == "json" {
			return printJSON(cmd.OutOrStdout(), nodes)
		}
		tw := tabwriter.NewWriter(cmd.OutOrStdout(), 2, 8, 2, ' ', 0)
		fmt.Fprintln(tw, "NAME\tSTATE\tROLES\tADDRESS\tPODS' ADDRESSES\tVERSION")
		for _, n := range nodes {
			fmt.Fprintf(tw, "%s\t%s\t%s\t%s\t%s\t%s\n", n.Name, n.state(), strings.Join(n.Roles, ","), n.Address, strings.Join(n.PodCIDRs, ","), n.Version)
		}
		return tw.Flush()
	}
	return cmd
}

// drainOptions are the flags of commands that evict Pods.
type drainOptions struct {
	timeout time.Duration
	force   bool
}

func (o *drainOptions) add(cmd *cobra.Command, timeout time.Duration) {
	cmd.Flags().DurationVar(&o.timeout, "timeout", timeout, "how long to try what PodDisruptionBudgets forbid and wait for Pods to end")
	cmd.Flags().BoolVar(&o.force, "force", false, "evict Pods too that nobody makes anew elsewhere; when the node is removed, also lose its volumes")
}

// drainNode cordons the node and evicts its Pods, with a line for each.
func drainNode(cmd *cobra.Command, api *apiclient.Client, node string, o drainOptions) error {
	if err := drain.Cordon(cmd.Context(), api, node, true); err != nil {
		if errdefs.IsNotFound(err) {
			return becausef("H8S_NOT_FOUND", "the cluster has no node %s; h8s node list shows those it has: %w", node, errdefs.ErrNotFound)
		}
		return err
	}
	ctx, cancel := context.WithTimeout(cmd.Context(), o.timeout)
	defer cancel()
	p := newProgress(cmd.OutOrStdout())
	defer p.end()
	began := time.Now()
	p.event(status.Event{Kind: status.Begin, Name: "drain " + node})
	err := drain.Drain(ctx, api, node, o.force, func(pod string) {
		p.event(status.Event{Kind: status.Step, Name: "evicted", Seconds: time.Since(began).Seconds(), Message: pod})
	})
	var blocked *drain.BlockedError
	if errors.As(err, &blocked) {
		return because("H8S_BLOCKED", err)
	}
	return err
}

func newNodeDrainCommand() *cobra.Command {
	o := drainOptions{}
	cmd := &cobra.Command{
		Use: "drain NODE", Short: "Move a node's Pods elsewhere and keep new ones off", Args: cobra.ExactArgs(1),
		Long: "Keeps new Pods off the node and evicts those there, as their PodDisruptionBudgets allow.\nWhat is in the way is listed. h8s node uncordon lets Pods on again.",
	}
	name := nodeFlag(cmd)
	o.add(cmd, 5*time.Minute)
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		_, l, err := find(*name)
		if err != nil {
			return err
		}
		api, _, err := admin(l)
		if err != nil {
			return err
		}
		defer api.Close()
		if err := drainNode(cmd, api, args[0], o); err != nil {
			return err
		}
		fmt.Fprintf(cmd.OutOrStdout(), "Node %s is drained. Next: h8s node remove%s %s, or h8s node uncordon%s %s\n", args[0], nameSuffix(l.Name), args[0], nameSuffix(l.Name), args[0])
		return nil
	}
	return cmd
}

func newNodeUncordonCommand() *cobra.Command {
	cmd := &cobra.Command{Use: "uncordon NODE", Short: "Let Pods on a drained node again", Args: cobra.ExactArgs(1)}
	name := nodeFlag(cmd)
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		_, l, err := find(*name)
		if err != nil {
			return err
		}
		api, _, err := admin(l)
		if err != nil {
			return err
		}
		defer api.Close()
		if err := drain.Cordon(cmd.Context(), api, args[0], false); err != nil {
			return err
		}
		fmt.Fprintf(cmd.OutOrStdout(), "Node %s takes Pods again.\n", args[0])
		return nil
	}
	return cmd
}

func newNodeRemoveCommand() *cobra.Command {
	o := drainOptions{}
	cmd := &cobra.Command{
		Use: "remove NODE", Short: "Drain a node and take it out of the cluster", Args: cobra.ExactArgs(1),
		Long: "Drains the node and deletes it from the cluster. A node that is lost is not drained: its\nPods are made anew elsewhere. On a machine of its own the node goes on asking to be let\nin until h8s reset removes it there; one made by h8s dev nodes is removed altogether.",
	}
	name := nodeFlag(cmd)
	o.add(cmd, 5*time.Minute)
	cmd.RunE = func(cmd *cobra.Command, args []string) error { return runNodeRemove(cmd, *name, args[0], o) }
	return cmd
}

func runNodeRemove(cmd *cobra.Command, first, node string, o drainOptions) error {
	_, l, err := find(first)
	if err != nil {
		return err
	}
	api, s, err := admin(l)
	if err != nil {
		return err
	}
	defer api.Close()
	if node == s.Name {
		return becausef("H8S_USAGE", "node %s runs the cluster's control plane: h8s reset --name %s removes it with its cluster: %w", node, node, errdefs.ErrInvalidArgument)
	}
	nodes, err := listNodes(cmd.Context(), api)
	if err != nil {
		return err
	}
	i := slices.IndexFunc(nodes, func(n clusterNode) bool { return n.Name == node })
	if i < 0 {
		return becausef("H8S_NOT_FOUND", "the cluster has no node %s; h8s node list shows those it has: %w", node, errdefs.ErrNotFound)
	}
	if err := keepVolumes(cmd.Context(), api, node, o); err != nil {
		return err
	}
	if nodes[i].Ready == "True" {
		if err := drainNode(cmd, api, node, o); err != nil {
			return err
		}
	}
	if further := furtherNodes(s.Name); slices.ContainsFunc(further, func(f furtherNode) bool { return f.layout.Name == node }) {
		fl, err := layout.NewNode(node)
		if err != nil {
			return err
		}
		if err := removeNode(cmd, fl); err != nil {
			return err
		}
	}
	if err := drain.Remove(cmd.Context(), api, node); err != nil {
		return err
	}
	fmt.Fprintf(cmd.OutOrStdout(), "Node %s is out of the cluster.\n", node)
	return nil
}

// keepVolumes refuses to remove a node with volumes in its files, which would be lost,
// unless it is forced to.
func keepVolumes(ctx context.Context, api *apiclient.Client, node string, o drainOptions) error {
	if o.force {
		return nil
	}
	var list struct {
		Items []struct {
			Metadata struct{ Name string }
			Spec     struct{ Node, Claim string }
		}
	}
	err := api.Get(ctx, "/apis/hypernetes.io/v1alpha1/localvolumes?fieldSelector=spec.node%3D"+node, &list)
	if err != nil && !errdefs.IsNotFound(err) {
		return err
	}
	var claims []string
	for _, v := range list.Items {
		if v.Spec.Node == node {
			claims = append(claims, cmp.Or(v.Spec.Claim, v.Metadata.Name))
		}
	}
	if len(claims) == 0 {
		return nil
	}
	slices.Sort(claims)
	more := ""
	if n := len(claims); n > 5 {
		claims, more = claims[:5], fmt.Sprintf(" and %d more", n-5)
	}
	return becausef("H8S_VOLUMES", "node %s has the data of volumes, which would be lost with it: PersistentVolumeClaims %s%s: %w",
		node, strings.Join(claims, ", "), more, errdefs.ErrFailedPrecondition)
}

// forgetNode takes a further node of this machine out of its cluster, as far as that is
// there.
func forgetNode(ctx context.Context, l layout.Node) {
	api, s, err := cluster.AdminClient(l)
	if err != nil || s.Name == l.Name {
		return
	}
	defer api.Close()
	ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	_ = drain.Remove(ctx, api, l.Name)
}
