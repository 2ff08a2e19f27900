package cli

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net/url"
	"slices"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"
)

// newNetworkCommand is `h8s network`.
func newNetworkCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use: "network", Aliases: []string{"net"}, Short: "Show tenants' Networks and who can talk to whom",
		Long: "Networks are made with h8s tenant create, h8s apply or h8s kubectl apply.",
	}
	cmd.AddCommand(newNetworkListCommand(), newNetworkDescribeCommand(), newNetworkCheckCommand())
	return cmd
}

func tenantFlag(cmd *cobra.Command, t *target) *string {
	tenant := new(string)
	cmd.Flags().StringVar(tenant, "tenant", "", "name of the tenant")
	_ = cmd.RegisterFlagCompletionFunc("tenant", completeTenants(t)) // the flag is there
	return tenant
}

func newNetworkListCommand() *cobra.Command {
	var t target
	var all bool
	cmd := &cobra.Command{Use: "list", Aliases: []string{"ls"}, Short: "List Networks, of all tenants unless --tenant names one", Args: noArgs}
	t.add(cmd)
	tenant, output := tenantFlag(cmd, &t), readOutputFlag(cmd)
	cmd.Flags().BoolVarP(&all, "all-tenants", "A", false, "of all tenants")
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		if all && *tenant != "" {
			return usagef("--all-tenants beside --tenant %s: want one of them", *tenant)
		}
		s, err := t.open()
		if err != nil {
			return err
		}
		defer s.Close()
		path := hypernetes + "/networks"
		if *tenant != "" {
			if err := checkTenantName(*tenant); err != nil {
				return err
			}
			path = homePath(*tenant, "networks")
		}
		if *output != "table" {
			return s.print(cmd, *output, path, noAPI)
		}
		var l list[networkObject]
		if err := s.get(cmd.Context(), path, &l, noAPI); err != nil {
			return err
		}
		tw := tabwriter.NewWriter(cmd.OutOrStdout(), 2, 8, 2, ' ', 0)
		fmt.Fprintln(tw, "TENANT\tNAME\tSUBNETS\tSTATUS\tPORTS\tFREE\tPROVIDER\tVNI\tAGE")
		for _, n := range l.Items {
			vni := "-"
			if n.Status.VNI != 0 {
				vni = fmt.Sprint(n.Status.VNI)
			}
			fmt.Fprintf(tw, "%s\t%s\t%s\t%s\t%d\t%d\t%s\t%s\t%s\n", n.tenant(), n.Metadata.Name, orDash(n.cidrs()), orDash(n.Status.Phase),
				n.Status.Ports, n.Status.FreeAddresses, orDash(n.Status.Provider), vni, age(n.Metadata.CreationTimestamp))
		}
		return tw.Flush()
	}
	return cmd
}

func newNetworkDescribeCommand() *cobra.Command {
	var t target
	var tenant *string
	cmd := &cobra.Command{
		Use: "describe NAME", Short: "Show a Network: its subnets, Ports, namespaces, Services and what is wrong", Args: cobra.ExactArgs(1),
		Long: "Without --tenant the Network of that name is looked for among all tenants.",
		ValidArgsFunction: completeFirst(func(cmd *cobra.Command, _ []string, _ string) ([]string, cobra.ShellCompDirective) {
			s, err := t.open()
			if err != nil {
				return nil, cobra.ShellCompDirectiveNoFileComp
			}
			defer s.Close()
			ctx, cancel := context.WithTimeout(cmd.Context(), 2*time.Second)
			defer cancel()
			path := hypernetes + "/networks"
			if *tenant != "" {
				path = homePath(*tenant, "networks")
			}
			var l list[networkObject]
			_ = s.Get(ctx, path, &l) // no completion is no failure
			var names []string
			for _, n := range l.Items {
				names = append(names, n.Metadata.Name)
			}
			return names, cobra.ShellCompDirectiveNoFileComp
		}),
	}
	t.add(cmd)
	tenant = tenantFlag(cmd, &t)
	output := readOutputFlag(cmd)
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		s, err := t.open()
		if err != nil {
			return err
		}
		defer s.Close()
		if *tenant == "" {
			if *tenant, err = s.tenantOfNetwork(cmd.Context(), args[0]); err != nil {
				return err
			}
		}
		path := homePath(*tenant, "networks/"+url.PathEscape(args[0]))
		missing := fmt.Sprintf("tenant %s has no Network %s; h8s network list --tenant %s shows those it has", *tenant, args[0], *tenant)
		if *output != "table" {
			return s.print(cmd, *output, path, missing)
		}
		var n networkObject
		if err := s.get(cmd.Context(), path, &n, missing); err != nil {
			return err
		}
		return s.describeNetwork(cmd.Context(), cmd.OutOrStdout(), n)
	}
	return cmd
}

func (s *session) describeNetwork(ctx context.Context, out io.Writer, n networkObject) error {
	tenant, name := n.tenant(), n.Metadata.Name
	var ports list[portObject]
	var bindings list[bindingObject]
	var events list[struct {
		Type, Reason, Message    string
		Count                    int
		LastTimestamp, EventTime time.Time
	}]
	home := homePrefix + tenant
	eventsPath := namespacePath("/api/v1", home, "events") + "?fieldSelector=" + url.QueryEscape("involvedObject.kind=Network,involvedObject.name="+name)
	if err := errors.Join(s.get(ctx, homePath(tenant, "ports")+"?labelSelector="+url.QueryEscape("hypernetes.io/network="+name), &ports, ""),
		s.get(ctx, homePath(tenant, "tenantnamespaces"), &bindings, ""), s.get(ctx, eventsPath, &events, "")); err != nil {
		return err
	}
	bindings.Items = slices.DeleteFunc(bindings.Items, func(b bindingObject) bool { return b.Spec.Network != name })
	w := bufio.NewWriter(out)
	row := func(k, v string) {
		if v != "" && v != "0" {
			fmt.Fprintf(w, "%-16s %s\n", k+":", v)
		}
	}
	row("Network", name)
	row("Tenant", tenant)
	row("Phase", orDash(n.Status.Phase))
	row("Provider", n.Status.Provider)
	row("Provider's ID", n.Status.ProviderNetworkID)
	row("VNI", fmt.Sprint(n.Status.VNI))
	row("MTU", fmt.Sprint(n.Status.MTU))
	row("Egress", n.Spec.Egress)
	row("Host access", orDash(n.Status.HostAccess))
	row("DNS servers", strings.Join(n.Spec.DNSServers, ", "))
	row("Free addresses", fmt.Sprint(n.Status.FreeAddresses))
	tw := tabwriter.NewWriter(w, 2, 8, 2, ' ', 0)
	fmt.Fprintln(w, "\nSubnets:")
	for _, sub := range n.Status.Subnets {
		fmt.Fprintf(tw, "  %s\t%s\tgateway %s\n", sub.Name, sub.CIDR, orDash(sub.Gateway))
	}
	_ = tw.Flush() // w keeps the error
	fmt.Fprintln(w, "\nNamespaces:")
	var services []string
	for _, b := range bindings.Items {
		fmt.Fprintf(tw, "  %s\t%s\t%s\n", b.Metadata.Name, orDash(b.Status.Phase), notReady(b.Status, bound))
		var l list[serviceObject]
		if err := s.get(ctx, namespacePath("/api/v1", b.Metadata.Name, "services"), &l, ""); err != nil {
			return err
		}
		for _, svc := range l.Items {
			services = append(services, fmt.Sprintf("  %s/%s\t%s\t%s\t%s", b.Metadata.Name, svc.Metadata.Name, svc.Spec.Type, svc.Spec.ClusterIP, svc.ports()))
		}
	}
	_ = tw.Flush()
	if len(services) > 0 {
		fmt.Fprintln(w, "\nServices:")
		for _, svc := range services {
			fmt.Fprintln(tw, svc)
		}
		_ = tw.Flush()
	}
	nodes := map[string]int{}
	if len(ports.Items) > 0 {
		fmt.Fprintln(w, "\nPorts:")
		for _, p := range ports.Items {
			pod := "-"
			if p.Spec.Pod != nil {
				pod = p.Spec.Pod.Namespace + "/" + p.Spec.Pod.Name
			} else if p.Spec.Retain {
				pod = "(claimed)"
			}
			if p.Spec.Node != "" {
				nodes[p.Spec.Node]++
			}
			fmt.Fprintf(tw, "  %s\t%s\t%s\t%s\t%s\n", strings.Join(p.Spec.Addresses, ","), orDash(p.Status.Phase), pod, orDash(p.Spec.Node), notReady(p.Status, ready))
		}
		_ = tw.Flush()
	}
	if len(nodes) > 0 {
		fmt.Fprintln(w, "\nNodes:")
		var names []string
		for k := range nodes {
			names = append(names, k)
		}
		slices.Sort(names)
		for _, k := range names {
			fmt.Fprintf(tw, "  %s\t%s\n", k, plural(nodes[k], "Port"))
		}
		_ = tw.Flush()
	}
	printConditions(w, n.Status.Conditions)
	if len(events.Items) > 0 {
		fmt.Fprintln(w, "\nEvents:")
		for _, e := range events.Items {
			at := e.LastTimestamp
			if at.IsZero() {
				at = e.EventTime
			}
			fmt.Fprintf(tw, "  %s\t%s\t%s\t%s\n", age(at), e.Type, e.Reason, e.Message)
		}
		_ = tw.Flush()
	}
	return w.Flush()
}

type serviceObject struct {
	Metadata meta
	Spec     struct {
		Type, ClusterIP          string
		Selector                 map[string]string
		PublishNotReadyAddresses bool
		Ports                    []struct {
			Name, Protocol string
			Port           int
			TargetPort     any
		}
	}
}

func (s serviceObject) ports() string {
	var out []string
	for _, p := range s.Spec.Ports {
		out = append(out, fmt.Sprintf("%d/%s", p.Port, p.Protocol))
	}
	return strings.Join(out, ",")
}
