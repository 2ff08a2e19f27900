package cli

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"net/netip"
	"os"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/containerd/errdefs"
	"github.com/spf13/cobra"

	"github.com/hypernetes/hypernetes/cli/usage"
)

// newTenantCommand is `h8s tenant`.
func newTenantCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use: "tenant", Short: "Make tenants, their users and quotas, and remove them",
		Long: "A tenant is a customer of the cluster: users who may touch their own namespaces and\nNetworks, and nothing else.",
	}
	cmd.AddCommand(newTenantCreateCommand(), newTenantListCommand(), newTenantDescribeCommand(),
		newTenantKubeconfigCommand(), newTenantQuotaCommand(), newTenantDeleteCommand())
	return cmd
}

type tenantOptions struct {
	description, projectID, podSecurity string
	owners, runtimeClasses              []string
	cidrs, gateways                     []string
	quota                               map[string]string
}

func newTenantCreateCommand() *cobra.Command {
	var t target
	var o tenantOptions
	var wait bool
	var timeout time.Duration
	cmd := &cobra.Command{
		Use: "create NAME", Short: "Make a tenant with its home namespace and first Network", Args: cobra.ExactArgs(1),
		Long: `Makes a tenant. Its home namespace tenant-NAME holds its Networks; the first of them,
"default", comes with it. Other tenants may have the same addresses.`,
		Example: `  h8s tenant create blue
  h8s tenant create red --cidr 192.168.0.0/24 --gateway 192.168.0.1 --quota namespaces=3,cpu=8,memory=16Gi
  h8s tenant create green --cidr 10.1.0.0/16 --cidr fd00:1::/64 --owner ann@example.org`,
	}
	t.add(cmd)
	f := cmd.Flags()
	f.StringVar(&o.description, "description", "", "what the tenant is, for people")
	f.StringArrayVar(&o.owners, "owner", nil, "user name that has the role manager (repeatable)")
	f.StringVar(&o.projectID, "project-id", "", "Keystone project ID, 32 hexadecimal digits")
	f.StringSliceVar(&o.cidrs, "cidr", nil, "addresses of the first Network (repeatable, or with commas between; default 10.0.0.0/16)")
	f.StringSliceVar(&o.gateways, "gateway", nil, "gateway inside one of --cidr (repeatable; default its first address)")
	f.StringVar(&o.podSecurity, "pod-security", "", "Pod Security Standard of its namespaces: privileged, baseline or restricted")
	f.StringSliceVar(&o.runtimeClasses, "runtime-class", nil, "RuntimeClasses its Pods may use, the default first (repeatable, or with commas between)")
	f.StringToStringVar(&o.quota, "quota", nil, "bounds, see h8s tenant quota --help")
	f.BoolVar(&wait, "wait", true, "wait until the tenant and its Network are ready")
	f.DurationVar(&timeout, "timeout", time.Minute, "how long to wait")
	_ = cmd.RegisterFlagCompletionFunc("pod-security", cobra.FixedCompletions([]string{"privileged", "baseline", "restricted"}, cobra.ShellCompDirectiveNoFileComp)) // the flag is there
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		object, err := o.object(args[0])
		if err != nil {
			return err
		}
		s, err := t.open()
		if err != nil {
			return err
		}
		defer s.Close()
		err = s.Create(cmd.Context(), hypernetes+"/tenants?fieldManager=h8s", object, nil)
		if errdefs.IsConflict(err) {
			return fmt.Errorf("tenant %s is there already; h8s tenant describe %s shows it: %w", args[0], args[0], errdefs.ErrConflict)
		}
		if err != nil {
			return s.told(err)
		}
		if wait {
			if err := s.waitFor(cmd.Context(), timeout, "tenant "+args[0], tenantPath(args[0]), phase(ready)); err != nil {
				return err
			}
			path := homePath(args[0], "networks/default")
			if err := s.waitFor(cmd.Context(), timeout, "Network default of tenant "+args[0], path, phase(ready)); err != nil {
				return err
			}
		}
		fmt.Fprintf(cmd.OutOrStdout(), "tenant %s created\n", args[0])
		fmt.Fprintf(cmd.ErrOrStderr(), "Its first user: h8s tenant kubeconfig %s --user NAME --role manager -o FILE\n", args[0])
		return nil
	}
	return cmd
}

var (
	tenantName = regexp.MustCompile(`^[a-z0-9]([-a-z0-9]{0,38}[a-z0-9])?$`)
	project    = regexp.MustCompile(`^[0-9a-f]{32}$`)
)

func checkTenantName(name string) error {
	if !tenantName.MatchString(name) {
		return usagef("tenant name %q: want 1 to 40 of a-z, 0-9 and -, with a letter or digit at both ends", name)
	}
	return nil
}

// object is the Tenant asked for.
func (o tenantOptions) object(name string) (map[string]any, error) {
	if err := checkTenantName(name); err != nil {
		return nil, err
	}
	spec := map[string]any{}
	if o.description != "" {
		spec["description"] = o.description
	}
	if len(o.owners) > 0 {
		spec["owners"] = o.owners
	}
	if o.projectID != "" {
		if !project.MatchString(o.projectID) {
			return nil, usagef("--project-id %q: want 32 hexadecimal digits, as openstack project show prints", o.projectID)
		}
		spec["keystone"] = map[string]any{"projectID": o.projectID}
	}
	if o.podSecurity != "" {
		if err := usage.OneOf("--pod-security", o.podSecurity, "privileged", "baseline", "restricted"); err != nil {
			return nil, err
		}
		spec["podSecurity"] = o.podSecurity
	}
	if len(o.runtimeClasses) > 0 {
		spec["runtimeClasses"] = o.runtimeClasses
	}
	subnets, err := o.subnets()
	if err != nil {
		return nil, err
	}
	if subnets != nil {
		spec["defaultNetwork"] = map[string]any{"subnets": subnets}
	}
	if len(o.quota) > 0 {
		quota, err := parseQuota(o.quota)
		if err != nil {
			return nil, err
		}
		spec["quota"] = quota
	}
	return map[string]any{"apiVersion": ourVersion, "kind": "Tenant", "metadata": map[string]any{"name": name}, "spec": spec}, nil
}

func (o tenantOptions) subnets() (map[string]any, error) {
	if len(o.cidrs) == 0 {
		if len(o.gateways) > 0 {
			return nil, usagef("--gateway %s without --cidr", o.gateways[0])
		}
		return nil, nil
	}
	out := map[string]any{}
	gateways := slices.Clone(o.gateways)
	for i, c := range o.cidrs {
		p, err := netip.ParsePrefix(c)
		if err != nil || p != p.Masked() {
			return nil, usagef("--cidr %q: want a network like 192.168.0.0/24 without host bits", c)
		}
		s := map[string]any{"cidr": c}
		for j, g := range gateways {
			a, err := netip.ParseAddr(g)
			if err != nil {
				return nil, usagef("--gateway %q: want an IP address", g)
			}
			if p.Contains(a) {
				s["gateway"] = g
				gateways = slices.Delete(gateways, j, j+1)
				break
			}
		}
		name := "default"
		if i > 0 {
			name = fmt.Sprintf("default-%d", i+1)
		}
		out[name] = s
	}
	if len(gateways) > 0 {
		return nil, usagef("--gateway %s: want an address inside one of --cidr %s", gateways[0], strings.Join(o.cidrs, ", "))
	}
	return out, nil
}

// counts are the keys of a quota that count objects, with their defaults.
var counts = []struct {
	key, field string
	standard   int
}{
	{"namespaces", "namespaces", 10}, {"networks", "networks", 5}, {"ports", "ports", 500},
	{"floatingips", "floatingIPs", 10}, {"loadbalancers", "loadBalancers", 10},
}

var quantity = regexp.MustCompile(`^[0-9]+(\.[0-9]+)?([eE][0-9]+|[numkMGTPE]|[KMGTPE]i)?$`)

// parseQuota translates NAME=VALUE into spec.quota; an empty value takes the bound away
// (nil, which a merge patch deletes).
func parseQuota(in map[string]string) (map[string]any, error) {
	out := map[string]any{}
	for _, k := range slices.Sorted(maps.Keys(in)) {
		v := in[k]
		if i := slices.IndexFunc(counts, func(c struct {
			key, field string
			standard   int
		}) bool {
			return c.key == strings.ToLower(k)
		}); i >= 0 {
			if v == "" {
				out[counts[i].field] = nil
				continue
			}
			n, err := strconv.ParseInt(v, 10, 32)
			if err != nil || n < 0 {
				return nil, usagef("quota %s=%q: want a number from 0", k, v)
			}
			out[counts[i].field] = n
			continue
		}
		field, resource := "perNamespace", k
		if r, ok := strings.CutPrefix(k, "container.limit."); ok {
			field, resource = "containerDefaults", r
		} else if r, ok := strings.CutPrefix(k, "container.request."); ok {
			field, resource = "containerRequests", r
		}
		if resource == "" || strings.ContainsAny(resource, " \t=,") {
			return nil, usagef("quota %q: want a name; see h8s tenant quota --help", k)
		}
		if v != "" && !quantity.MatchString(v) {
			return nil, usagef("quota %s=%q: want a quantity like 8, 500m or 16Gi", k, v)
		}
		m, _ := out[field].(map[string]any)
		if m == nil {
			m = map[string]any{}
			out[field] = m
		}
		m[resource] = v
		if v == "" {
			m[resource] = nil
		}
	}
	return out, nil
}

func newTenantListCommand() *cobra.Command {
	var t target
	cmd := &cobra.Command{Use: "list", Aliases: []string{"ls"}, Short: "List the tenants", Args: noArgs}
	t.add(cmd)
	output := readOutputFlag(cmd)
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		s, err := t.open()
		if err != nil {
			return err
		}
		defer s.Close()
		if *output != "table" {
			return s.print(cmd, *output, hypernetes+"/tenants", "")
		}
		var l list[tenantObject]
		if err := s.get(cmd.Context(), hypernetes+"/tenants", &l, noAPI); err != nil {
			return err
		}
		tw := tabwriter.NewWriter(cmd.OutOrStdout(), 2, 8, 2, ' ', 0)
		fmt.Fprintln(tw, "NAME\tPHASE\tNETWORKS\tNAMESPACES\tPROJECT\tAGE\tDESCRIPTION")
		for _, i := range l.Items {
			projectID := ""
			if i.Spec.Keystone != nil {
				projectID = i.Spec.Keystone.ProjectID
			}
			fmt.Fprintf(tw, "%s\t%s\t%d\t%d\t%s\t%s\t%s\n", i.Metadata.Name, orDash(i.Status.Phase), i.Status.Networks, i.Status.Namespaces,
				orDash(projectID), age(i.Metadata.CreationTimestamp), i.Spec.Description)
		}
		return tw.Flush()
	}
	return cmd
}

const noAPI = "this cluster does not know tenants; h8s status shows whether it is up to date"

// print shows what the API has at path.
func (s *session) print(cmd *cobra.Command, format, path, missing string) error {
	var v map[string]any
	if err := s.get(cmd.Context(), path, &v, missing); err != nil {
		return err
	}
	return printObject(cmd.OutOrStdout(), format, v)
}

func newTenantDescribeCommand() *cobra.Command {
	var t target
	cmd := &cobra.Command{
		Use: "describe NAME", Short: "Show a tenant: what it has, what it may have, and what is wrong", Args: cobra.ExactArgs(1),
		ValidArgsFunction: completeFirst(completeTenants(&t)),
	}
	t.add(cmd)
	output := readOutputFlag(cmd)
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		s, err := t.open()
		if err != nil {
			return err
		}
		defer s.Close()
		o, err := s.tenant(cmd.Context(), args[0])
		if err != nil {
			return err
		}
		if *output != "table" {
			return s.print(cmd, *output, tenantPath(args[0]), "")
		}
		return s.describeTenant(cmd.Context(), cmd.OutOrStdout(), o)
	}
	return cmd
}

func (s *session) describeTenant(ctx context.Context, out io.Writer, o tenantObject) error {
	name := o.Metadata.Name
	var networks list[networkObject]
	var bindings list[bindingObject]
	if err := errors.Join(s.get(ctx, homePath(name, "networks"), &networks, ""), s.get(ctx, homePath(name, "tenantnamespaces"), &bindings, "")); err != nil {
		return err
	}
	w := bufio.NewWriter(out)
	row := func(k, v string) {
		if v != "" {
			fmt.Fprintf(w, "%-16s %s\n", k+":", v)
		}
	}
	row("Tenant", name)
	row("Description", o.Spec.Description)
	row("Phase", orDash(o.Status.Phase))
	row("Home namespace", o.Status.HomeNamespace)
	row("Owners", strings.Join(o.Spec.Owners, ", "))
	if o.Spec.Keystone != nil {
		row("Keystone", "project "+o.Spec.Keystone.ProjectID)
	}
	row("Runtime classes", strings.Join(o.Spec.RuntimeClasses, ", "))
	row("Pod security", o.Spec.PodSecurity)
	fmt.Fprintln(w, "\nNetworks:")
	tw := tabwriter.NewWriter(w, 2, 8, 2, ' ', 0)
	for _, n := range networks.Items {
		fmt.Fprintf(tw, "  %s\t%s\t%s\t%d ports\n", n.Metadata.Name, orDash(n.Status.Phase), n.cidrs(), n.Status.Ports)
	}
	_ = tw.Flush() // w keeps the error
	fmt.Fprintln(w, "\nNamespaces:")
	for _, b := range bindings.Items {
		fmt.Fprintf(tw, "  %s\t%s\ton %s\t%s\n", b.Metadata.Name, orDash(b.Status.Phase), b.Spec.Network, notReady(b.Status, bound))
	}
	_ = tw.Flush()
	printConditions(w, o.Status.Conditions)
	return w.Flush()
}

// notReady is what is wrong with an object that is not in the phase it should be in.
func notReady(s objectStatus, want string) string {
	if s.Phase == want {
		return ""
	}
	return s.why()
}

func printConditions(w io.Writer, conditions []condition) {
	if len(conditions) == 0 {
		return
	}
	fmt.Fprintln(w, "\nConditions:")
	tw := tabwriter.NewWriter(w, 2, 8, 2, ' ', 0)
	for _, c := range conditions {
		fmt.Fprintf(tw, "  %s\t%s\t%s\t%s\n", c.Type, c.Status, c.Reason, c.Message)
	}
	_ = tw.Flush() // the caller sees the error of w
}

func newTenantQuotaCommand() *cobra.Command {
	var t target
	cmd := &cobra.Command{
		Use: "quota NAME [KEY=VALUE...]", Short: "Show or set a tenant's quota", Args: cobra.MinimumNArgs(1),
		Long: `Without KEY=VALUE shows what a tenant may have and has; with them sets bounds. An
empty VALUE takes a bound away.

  namespaces, networks, ports, floatingips, loadbalancers
                         how many in all (ports: NICs of Pods and claimed addresses)
  cpu, memory, pods, requests.storage, ...
                         of each namespace, as in a ResourceQuota
  container.limit.cpu, container.request.memory, ...
                         of containers that state none`,
		Example:           "  h8s tenant quota blue\n  h8s tenant quota blue networks=3 cpu=16 memory=64Gi container.limit.memory=",
		ValidArgsFunction: completeFirst(completeTenants(&t)),
	}
	t.add(cmd)
	output := readOutputFlag(cmd)
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		set := map[string]string{}
		for _, a := range args[1:] {
			k, v, ok := strings.Cut(a, "=")
			if !ok || k == "" {
				return usagef("%q: want KEY=VALUE", a)
			}
			set[k] = v
		}
		patch, err := parseQuota(set)
		if err != nil {
			return err
		}
		s, err := t.open()
		if err != nil {
			return err
		}
		defer s.Close()
		o, err := s.tenant(cmd.Context(), args[0])
		if err != nil {
			return err
		}
		if len(patch) > 0 {
			if err := s.Merge(cmd.Context(), tenantPath(args[0]), map[string]any{"spec": map[string]any{"quota": patch}}); err != nil {
				return s.told(err)
			}
			if o, err = s.tenant(cmd.Context(), args[0]); err != nil {
				return err
			}
		}
		if *output != "table" {
			return printObject(cmd.OutOrStdout(), *output, o.Spec.Quota)
		}
		return s.printQuota(cmd.Context(), cmd.OutOrStdout(), o)
	}
	return cmd
}

func (s *session) printQuota(ctx context.Context, out io.Writer, o tenantObject) error {
	name := o.Metadata.Name
	used := map[string]string{"namespaces": strconv.Itoa(o.Status.Namespaces), "networks": strconv.Itoa(o.Status.Networks)}
	type any1 struct{ Metadata meta }
	for _, r := range []string{"ports", "floatingips"} {
		var l list[any1]
		if err := s.get(ctx, homePath(name, r), &l, ""); err != nil {
			return err
		}
		used[r] = strconv.Itoa(len(l.Items))
	}
	if n, err := s.loadBalancers(ctx, name); err == nil {
		used["loadbalancers"] = strconv.Itoa(n)
	} else if !errdefs.IsPermissionDenied(err) { // the claims are the operator's
		return err
	}
	tw := tabwriter.NewWriter(out, 2, 8, 2, ' ', 0)
	fmt.Fprintln(tw, "QUOTA\tUSED\tMOST\tOF")
	for _, c := range counts {
		most := strconv.Itoa(c.standard)
		if v, ok := o.Spec.Quota[c.field]; ok {
			most = fmt.Sprint(v)
		}
		fmt.Fprintf(tw, "%s\t%s\t%s\tthe tenant\n", c.key, orDash(used[c.key]), most)
	}
	for _, g := range []struct{ field, prefix, of string }{
		{"perNamespace", "", "each namespace"},
		{"containerDefaults", "container.limit.", "a container that states none"},
		{"containerRequests", "container.request.", "a container that states none"},
	} {
		m, _ := o.Spec.Quota[g.field].(map[string]any)
		for _, k := range slices.Sorted(maps.Keys(m)) {
			fmt.Fprintf(tw, "%s\t\t%v\t%s\n", g.prefix+k, m[k], g.of)
		}
	}
	return tw.Flush()
}

// loadBalancers counts the claims of external addresses by Services of a tenant.
func (s *session) loadBalancers(ctx context.Context, tenant string) (int, error) {
	var bindings list[bindingObject]
	var leases list[struct {
		Metadata meta
		Spec     struct{ HolderIdentity string }
	}]
	if err := errors.Join(s.get(ctx, homePath(tenant, "tenantnamespaces"), &bindings, ""),
		s.get(ctx, namespacePath("/apis/coordination.k8s.io/v1", claimNamespace, "leases"), &leases, "")); err != nil {
		return 0, err
	}
	n := 0
	for _, l := range leases.Items {
		parts := strings.Split(l.Spec.HolderIdentity, "/")
		if strings.HasPrefix(l.Metadata.Name, "address-") && len(parts) == 4 && parts[0] == "Service" &&
			slices.ContainsFunc(bindings.Items, func(b bindingObject) bool { return b.Metadata.Name == parts[1] }) {
			n++
		}
	}
	return n, nil
}

func newTenantDeleteCommand() *cobra.Command {
	var t target
	var yes bool
	var timeout time.Duration
	cmd := &cobra.Command{
		Use: "delete NAME", Short: "Remove a tenant and everything it has", Args: cobra.ExactArgs(1),
		Long:              "Says what will go, asks, and waits until it is gone. What keeps it from going is shown\nmeanwhile. This cannot be undone.",
		ValidArgsFunction: completeFirst(completeTenants(&t)),
	}
	t.add(cmd)
	cmd.Flags().BoolVarP(&yes, "yes", "y", false, "do not ask")
	cmd.Flags().DurationVar(&timeout, "timeout", 5*time.Minute, "how long to wait")
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		s, err := t.open()
		if err != nil {
			return err
		}
		defer s.Close()
		o, err := s.tenant(cmd.Context(), args[0])
		if err != nil {
			return err
		}
		if err := s.inventory(cmd.Context(), cmd.ErrOrStderr(), o); err != nil {
			return err
		}
		if !yes {
			if err := confirmName(cmd, args[0]); err != nil {
				return err
			}
		}
		if err := s.Delete(cmd.Context(), tenantPath(args[0])); err != nil {
			return s.told(err)
		}
		return s.waitGone(cmd.Context(), cmd.ErrOrStderr(), cmd.OutOrStdout(), args[0], timeout)
	}
	return cmd
}

// inventory says what goes with a tenant.
func (s *session) inventory(ctx context.Context, w io.Writer, o tenantObject) error {
	name := o.Metadata.Name
	fmt.Fprintf(w, "tenant %s and with it:\n", name)
	var bindings list[bindingObject]
	if err := s.get(ctx, homePath(name, "tenantnamespaces"), &bindings, ""); err != nil {
		return err
	}
	for _, b := range bindings.Items {
		type counted struct{ Metadata meta }
		var pods, claims list[counted]
		if err := errors.Join(s.get(ctx, namespacePath("/api/v1", b.Metadata.Name, "pods"), &pods, ""),
			s.get(ctx, namespacePath("/api/v1", b.Metadata.Name, "persistentvolumeclaims"), &claims, "")); err != nil {
			return err
		}
		fmt.Fprintf(w, "  namespace %s with %s and %s\n", b.Metadata.Name, plural(len(pods.Items), "Pod"), plural(len(claims.Items), "volume claim"))
	}
	for _, r := range []struct{ resource, word string }{{"networks", "Network"}, {"ports", "Port"}, {"floatingips", "floating IP"}} {
		var l list[struct{ Metadata meta }]
		if err := s.get(ctx, homePath(name, r.resource), &l, ""); err != nil {
			return err
		}
		if len(l.Items) > 0 {
			fmt.Fprintf(w, "  %s\n", plural(len(l.Items), r.word))
		}
	}
	return nil
}

func plural(n int, word string) string {
	if n == 1 {
		return "1 " + word
	}
	return fmt.Sprintf("%d %ss", n, word)
}

// confirmName wants the name typed in.
func confirmName(cmd *cobra.Command, name string) error {
	in, ok := cmd.InOrStdin().(*os.File)
	if ok && !isTerminal(in) {
		return usagef("nobody to ask: this is no terminal; --yes goes ahead")
	}
	fmt.Fprintf(cmd.ErrOrStderr(), "This cannot be undone. Type the tenant's name to go on: ")
	line, err := bufio.NewReader(io.LimitReader(cmd.InOrStdin(), 1<<10)).ReadString('\n')
	if err != nil && !errors.Is(err, io.EOF) {
		return err
	}
	if strings.TrimSpace(line) != name {
		return fmt.Errorf("nothing was removed: %q is not %s: %w", strings.TrimSpace(line), name, errdefs.ErrInvalidArgument)
	}
	return nil
}

// waitGone waits for a deleted tenant and tells what blocks it.
func (s *session) waitGone(ctx context.Context, progress, out io.Writer, name string, timeout time.Duration) error {
	ctx, cancel := context.WithTimeout(ctx, timeout)
	defer cancel()
	tick := time.NewTicker(pollEvery)
	defer tick.Stop()
	last := ""
	for {
		var o tenantObject
		err := s.Get(ctx, tenantPath(name), &o)
		if errdefs.IsNotFound(err) {
			fmt.Fprintf(out, "tenant %s is gone\n", name)
			return nil
		}
		if err == nil {
			if why := o.Status.why(); why != last && why != "" {
				fmt.Fprintf(progress, "! %s\n", why)
				last = why
			}
		}
		select {
		case <-ctx.Done():
			if errors.Is(ctx.Err(), context.DeadlineExceeded) {
				return becausef("H8S_NOT_READY", "tenant %s is not gone after %s: %s", name, timeout, orDash(last))
			}
			return ctx.Err()
		case <-tick.C:
		}
	}
}
