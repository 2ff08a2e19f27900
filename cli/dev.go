package cli

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
	"strconv"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/containerd/errdefs"
	"github.com/spf13/cobra"
	"golang.org/x/sync/errgroup"

	"github.com/hypernetes/hypernetes/cluster"
	"github.com/hypernetes/hypernetes/cluster/apiclient"
	"github.com/hypernetes/hypernetes/cluster/drain"
	"github.com/hypernetes/hypernetes/cluster/layout"
	"github.com/hypernetes/hypernetes/cluster/settings"
	"github.com/hypernetes/hypernetes/cluster/status"
	"github.com/hypernetes/hypernetes/cluster/token"
)

func newDevCommand() *cobra.Command {
	cmd := &cobra.Command{Use: "dev", Short: "For developing and trying out on one machine"}
	cmd.AddCommand(newDevNodesCommand())
	return cmd
}

// maxNodes of one machine: their addresses are one byte apart, and their memory is one.
const maxNodes = 64

// joinTTL is how long the token of further nodes is good, should it not be revoked.
const joinTTL = 15 * time.Minute

func newDevNodesCommand() *cobra.Command {
	o := drainOptions{}
	cmd := &cobra.Command{
		Use:   "nodes [N]",
		Short: "Make the cluster one of N nodes, all on this machine",
		Long: `Makes the cluster of a node that is up one of N nodes, by adding nodes on this machine or
by draining and removing the last ones; without N, lists them. Each further node is in
namespaces of its own, with its own containerd, kubelet and Pods, on a network with the
first, and joins as h8s agent does. It is called as the first with a number: h8s-2.`,
		Example: "  h8s up && h8s dev nodes 3\n  h8s dev nodes",
		Args:    cobra.MaximumNArgs(1),
	}
	name, output := nodeFlag(cmd), outputFlag(cmd)
	o.add(cmd, time.Minute)
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		if err := checkOutput(*output); err != nil {
			return err
		}
		_, l, err := find(*name)
		if err != nil {
			return err
		}
		if len(args) == 0 {
			return printFurther(cmd, l, *output)
		}
		n, err := strconv.Atoi(args[0])
		if err != nil || n < 1 || n > maxNodes {
			return fmt.Errorf("nodes %q: want a number from 1 to %d: %w", args[0], maxNodes, errdefs.ErrInvalidArgument)
		}
		return scale(cmd, l, n, o)
	}
	return cmd
}

// furtherNode is another node of this machine in the cluster of its first.
type furtherNode struct {
	layout   layout.Node
	settings settings.Node
	number   int
}

// furtherNodes lists those made by h8s dev nodes for the cluster of the node called first.
func furtherNodes(first string) []furtherNode {
	var out []furtherNode
	for _, name := range nodeNames() {
		l, err := layout.NewNode(name)
		if err != nil {
			continue
		}
		s, err := settings.Load(l.StatePath("node.json"))
		if err != nil || s.Of != first {
			continue
		}
		number, _ := strconv.Atoi(strings.TrimPrefix(name, first+"-")) // 0 sorts first
		out = append(out, furtherNode{l, s, number})
	}
	slices.SortFunc(out, func(a, b furtherNode) int { return cmp.Compare(a.number, b.number) })
	return out
}

// newFurther is the settings of the k-th node of the machine.
func newFurther(first settings.Node, k int) (furtherNode, error) {
	l, err := layout.NewNode(fmt.Sprintf("%s-%d", first.Name, k))
	if err != nil {
		return furtherNode{}, err
	}
	ip := settings.IsolatedIP[:strings.LastIndexByte(settings.IsolatedIP, '.')+1] + strconv.Itoa(k)
	return furtherNode{l, settings.Node{
		Name: l.Name, Role: settings.Agent, Of: first.Name, Server: first.APIServer(), NodeIP: ip,
		CinderConfig: first.CinderConfig,
		APIPort:      settings.APIPort, Egress: first.Egress,
	}, k}, nil
}

func furtherStatus(ctx context.Context, first string) []status.Further {
	var out []status.Further
	for _, f := range furtherNodes(first) {
		out = append(out, status.Further{Name: f.layout.Name, Phase: f.status(ctx).Phase, IP: f.settings.NodeIP})
	}
	return out
}

func (f furtherNode) status(ctx context.Context) status.Node {
	st, err := status.NewClient(f.layout.StatusSocket()).Status(ctx)
	if err != nil {
		return cluster.Absent(f.layout)
	}
	return st
}

func printFurther(cmd *cobra.Command, l layout.Node, output string) error {
	first, err := settings.Load(l.StatePath("node.json"))
	if err != nil {
		return notRunning(l)
	}
	me := furtherNode{layout: l, settings: first}
	list := append([]status.Further{{Name: l.Name, Phase: me.status(cmd.Context()).Phase, IP: first.NodeIP}}, furtherStatus(cmd.Context(), l.Name)...)
	if output == "json" {
		return printJSON(cmd.OutOrStdout(), list)
	}
	tw := tabwriter.NewWriter(cmd.OutOrStdout(), 2, 8, 2, ' ', 0)
	fmt.Fprintln(tw, "NAME\tPHASE\tADDRESS")
	for _, n := range list {
		fmt.Fprintf(tw, "%s\t%s\t%s\n", n.Name, n.Phase, n.IP)
	}
	return tw.Flush()
}

// scale makes it n nodes.
func scale(cmd *cobra.Command, l layout.Node, n int, o drainOptions) error {
	api, first, err := runningFirst(cmd.Context(), l)
	if err != nil {
		return err
	}
	defer api.Close()
	have := furtherNodes(l.Name)
	for i := len(have) - 1; i >= 0; i-- {
		if have[i].number > n {
			if err := keepVolumes(cmd.Context(), api, have[i].layout.Name, o); err != nil {
				return err
			}
			if err := dropFurther(cmd, api, have[i], o); err != nil {
				return err
			}
		}
	}
	var want []furtherNode
	for k := 2; k <= n; k++ {
		i := slices.IndexFunc(have, func(f furtherNode) bool { return f.number == k })
		if i >= 0 {
			want = append(want, have[i])
			continue
		}
		f, err := newFurther(first, k)
		if err != nil {
			return err
		}
		if slices.Contains(nodeNames(), f.layout.Name) {
			return becausef("H8S_BUSY", "node %s exists and is not one of node %s's; h8s reset --name %s removes it: %w", f.layout.Name, l.Name, f.layout.Name, errdefs.ErrAlreadyExists)
		}
		want = append(want, f)
	}
	if err := startAll(cmd, api, first, want); err != nil {
		return err
	}
	fmt.Fprintf(cmd.OutOrStdout(), "The cluster has %d nodes here. Next: h8s node list%s\n", n, nameSuffix(l.Name))
	return nil
}

// runningFirst returns a client of the cluster of the first node of this machine, which
// must run.
func runningFirst(ctx context.Context, l layout.Node) (*apiclient.Client, settings.Node, error) {
	st, err := status.NewClient(l.StatusSocket()).Status(ctx)
	if err != nil {
		return nil, settings.Node{}, notRunning(l)
	}
	s := st.Settings
	if s.HostNetwork || s.RuntimeOnly || s.IsAgent() {
		return nil, s, becausef("H8S_USAGE", "node %s was not made by h8s up with a control plane: further nodes of this machine join only such a one: %w", l.Name, errdefs.ErrInvalidArgument)
	}
	if st.Phase != status.Running && st.Phase != status.Degraded {
		return nil, s, becausef("H8S_NOT_RUNNING", "node %s is %s: %w", l.Name, st.Phase, errdefs.ErrUnavailable)
	}
	api, _, err := admin(l)
	return api, s, err
}

// dropFurther drains a node as far as its time-out allows, and removes it.
func dropFurther(cmd *cobra.Command, api *apiclient.Client, f furtherNode, o drainOptions) error {
	o.force = true
	if err := drainNode(cmd, api, f.layout.Name, o); err != nil && !errdefs.IsNotFound(err) {
		fmt.Fprintf(cmd.ErrOrStderr(), "h8s: %v\n     It is removed all the same.\n", err)
	}
	if err := removeNode(cmd, f.layout); err != nil {
		return err
	}
	return drain.Remove(cmd.Context(), api, f.layout.Name)
}

// startFurther starts the further nodes of a node that has become ready, those that do
// not run.
func startFurther(cmd *cobra.Command, l layout.Node) error {
	nodes := furtherNodes(l.Name)
	if len(nodes) == 0 {
		return nil
	}
	api, first, err := runningFirst(cmd.Context(), l)
	if err != nil {
		return err
	}
	defer api.Close()
	return startAll(cmd, api, first, nodes)
}

// startOne is h8s up of a further node.
func startOne(cmd *cobra.Command, l layout.Node, s settings.Node) error {
	fl, err := layout.NewNode(s.Of)
	if err != nil {
		return err
	}
	api, first, err := runningFirst(cmd.Context(), fl)
	if err != nil {
		return err
	}
	defer api.Close()
	return startAll(cmd, api, first, []furtherNode{{layout: l, settings: s}})
}

// startAll starts those of the nodes that do not run, a few at a time, each with a line
// when it is ready.
func startAll(cmd *cobra.Command, api *apiclient.Client, first settings.Node, nodes []furtherNode) error {
	ctx := cmd.Context()
	nodes = slices.DeleteFunc(slices.Clone(nodes), func(f furtherNode) bool { return f.status(ctx).PID > 0 })
	secret := ""
	if slices.ContainsFunc(nodes, func(f furtherNode) bool { return !cluster.Joined(f.layout) }) {
		t, err := makeToken(ctx, api, first, joinTTL, "h8s dev nodes")
		if err != nil {
			return err
		}
		secret = t.Printed()
		defer func() {
			ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), 5*time.Second)
			defer cancel()
			_, _ = token.Revoke(ctx, api, t.ID) // it expires anyway
		}()
	}
	p := newProgress(cmd.OutOrStdout())
	defer p.end()
	var g errgroup.Group
	g.SetLimit(4)
	for _, f := range nodes {
		g.Go(func() error {
			name := "node " + f.layout.Name
			began := time.Now()
			p.event(status.Event{Kind: status.Begin, Name: name})
			last, err := spawn(ctx, f.layout, superviseInput{f.settings, secret}, func(e status.Event) {
				if e.Kind == status.Warn {
					p.event(status.Event{Kind: status.Warn, Name: f.layout.Name + " " + e.Name, Seconds: e.Seconds, Message: e.Message})
				}
			})
			if err == nil && last.Kind == status.Fail {
				err = because(last.Reason, errors.New(last.Message))
			}
			if err != nil {
				return fmt.Errorf("node %s: %w", f.layout.Name, err)
			}
			p.event(status.Event{Kind: status.Step, Name: name, Seconds: time.Since(began).Seconds(), Message: f.settings.NodeIP})
			return nil
		})
	}
	return g.Wait()
}

// eachFurther does something with each further node of the one called first, at once,
// with a line for each instead of what it prints.
func eachFurther(cmd *cobra.Command, first string, do func(cmd *cobra.Command, l layout.Node) error) error {
	p := newProgress(cmd.OutOrStdout())
	defer p.end()
	var g errgroup.Group
	for _, f := range furtherNodes(first) {
		g.Go(func() error {
			began := time.Now()
			silent := &cobra.Command{}
			silent.SetContext(cmd.Context())
			silent.SetOut(io.Discard)
			silent.SetErr(cmd.ErrOrStderr())
			if err := do(silent, f.layout); err != nil {
				return fmt.Errorf("node %s: %w", f.layout.Name, err)
			}
			p.event(status.Event{Kind: status.Step, Name: "node " + f.layout.Name, Seconds: time.Since(began).Seconds()})
			return nil
		})
	}
	return g.Wait()
}
