package cli

import (
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"net/netip"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/containerd/errdefs"
	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"
	networkingv1 "k8s.io/api/networking/v1"

	"github.com/hypernetes/hypernetes/network/policy"
)

// answer is what h8s network check finds.
type answer struct {
	From    string `json:"from"`
	To      string `json:"to"`
	Allowed bool   `json:"allowed"`
	// Reasons hold for all ports: Networks, addresses, readiness.
	Reasons []string     `json:"reasons,omitempty"`
	Ports   []portAnswer `json:"ports,omitempty"`
}

type portAnswer struct {
	Port    string `json:"port"`
	Allowed bool   `json:"allowed"`
	Egress  string `json:"egress"`
	Ingress string `json:"ingress"`
}

func newNetworkCheckCommand() *cobra.Command {
	var t target
	var port, service string
	cmd := &cobra.Command{
		Use: "check [NAMESPACE/]POD_A [NAMESPACE/]POD_B", Short: "Say whether POD_A can open a connection to POD_B, and by which rule", Args: cobra.ExactArgs(2),
		Long: `Says whether POD_A can open a connection to POD_B and what decides it: the Networks of
their namespaces, NetworkPolicies of both sides, and whether POD_B is ready. Nothing is
sent. Without --port or --service all ports POD_B's containers name are looked at.
The exit code is 0 if there is a port they can talk on. Users of a tenant, who see only
their own namespaces, name it with --tenant.`,
		Example: "  h8s network check web/front-0 db/postgres-0 --port 5432\n  h8s network check web/front-0 web/back-0 --service back",
	}
	t.add(cmd)
	tenant, output := tenantFlag(cmd, &t), readOutputFlag(cmd)
	cmd.ValidArgsFunction = completePods(&t, tenant)
	cmd.Flags().StringVar(&port, "port", "", "port number, 53/UDP for another protocol than TCP")
	cmd.Flags().StringVar(&service, "service", "", "Service by which POD_A would reach POD_B, [NAMESPACE/]NAME, by default in POD_B's namespace")
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		from, err := parsePod(args[0])
		if err != nil {
			return err
		}
		to, err := parsePod(args[1])
		if err != nil {
			return err
		}
		if port != "" && service != "" {
			return usagef("--port beside --service %s: want one of them", service)
		}
		var on []checkPort
		if port != "" {
			p, err := parsePort(port)
			if err != nil {
				return err
			}
			on = append(on, p)
		}
		s, err := t.open()
		if err != nil {
			return err
		}
		defer s.Close()
		a, err := s.check(cmd.Context(), *tenant, from, to, on, service)
		if err != nil {
			return err
		}
		if *output != "table" {
			err = printObject(cmd.OutOrStdout(), *output, a)
		} else {
			err = a.print(cmd.OutOrStdout())
		}
		if err == nil && !a.Allowed {
			err = becausef("H8S_NO_TALK", "%s cannot talk to %s", a.From, a.To)
		}
		return err
	}
	return cmd
}

func (a answer) print(w io.Writer) error {
	word := map[bool]string{true: "yes", false: "no"}
	fmt.Fprintf(w, "%s to %s: %s\n", a.From, a.To, word[a.Allowed])
	for _, r := range a.Reasons {
		fmt.Fprintf(w, "  %s\n", r)
	}
	for _, p := range a.Ports {
		fmt.Fprintf(w, "  port %s: %s\n    egress of %s: %s\n    ingress of %s: %s\n", p.Port, word[p.Allowed], a.From, p.Egress, a.To, p.Ingress)
	}
	return nil
}

type podKey struct{ namespace, name string }

func (k podKey) String() string { return k.namespace + "/" + k.name }

func parsePod(arg string) (podKey, error) {
	namespace, name, ok := strings.Cut(arg, "/")
	if !ok {
		namespace, name = "default", arg
	}
	if namespace == "" || name == "" || strings.Contains(name, "/") {
		return podKey{}, usagef("%q: want NAMESPACE/POD, or POD of namespace default", arg)
	}
	return podKey{namespace, name}, nil
}

// completePods completes both arguments of check: with a tenant, with the Pods on its Ports.
func completePods(t *target, tenant *string) cobra.CompletionFunc {
	return func(cmd *cobra.Command, args []string, _ string) ([]string, cobra.ShellCompDirective) {
		if len(args) > 1 {
			return nil, cobra.ShellCompDirectiveNoFileComp
		}
		s, err := t.open()
		if err != nil {
			return nil, cobra.ShellCompDirectiveNoFileComp
		}
		defer s.Close()
		ctx, cancel := context.WithTimeout(cmd.Context(), 2*time.Second)
		defer cancel()
		var names []string
		if *tenant == "" {
			var l list[struct{ Metadata meta }]
			_ = s.Get(ctx, "/api/v1/pods", &l) // no completion is no failure
			for _, p := range l.Items {
				names = append(names, p.Metadata.Namespace+"/"+p.Metadata.Name)
			}
			return names, cobra.ShellCompDirectiveNoFileComp
		}
		var l list[portObject]
		_ = s.Get(ctx, homePath(*tenant, "ports"), &l)
		for _, p := range l.Items {
			if p.Spec.Pod != nil {
				names = append(names, p.Spec.Pod.Namespace+"/"+p.Spec.Pod.Name)
			}
		}
		slices.Sort(names)
		return slices.Compact(names), cobra.ShellCompDirectiveNoFileComp
	}
}

type checkPort struct {
	number   uint16
	protocol uint8
}

var protocols = map[string]uint8{"TCP": unix.IPPROTO_TCP, "UDP": unix.IPPROTO_UDP, "SCTP": unix.IPPROTO_SCTP}

func (p checkPort) String() string {
	for name, n := range protocols {
		if n == p.protocol {
			return fmt.Sprintf("%d/%s", p.number, name)
		}
	}
	return fmt.Sprint(p.number)
}

func parsePort(arg string) (checkPort, error) {
	number, protocol, ok := strings.Cut(arg, "/")
	if !ok {
		protocol = "TCP"
	}
	n, err := strconv.ParseUint(number, 10, 16)
	p, known := protocols[strings.ToUpper(protocol)]
	if err != nil || n == 0 || !known {
		return checkPort{}, usagef("--port %q: want 1 to 65535, with /UDP or /SCTP for other protocols than TCP", arg)
	}
	return checkPort{uint16(n), p}, nil
}

type podObject struct {
	Metadata meta
	Spec     struct {
		HostNetwork bool
		NodeName    string
		Containers  []podContainer
		// Sidecars are init containers that go on; only their ports matter here.
		InitContainers []podContainer
	}
	Status struct {
		Phase      string
		PodIPs     []struct{ IP string }
		Conditions []condition
	}
}

type podContainer struct {
	RestartPolicy string
	Ports         []struct {
		Name, Protocol string
		ContainerPort  int
	}
}

func (p podObject) key() string { return p.Metadata.Namespace + "/" + p.Metadata.Name }

func (p podObject) running() bool { return p.Status.Phase != "Succeeded" && p.Status.Phase != "Failed" }

// asPolicy is the Pod as policies see it.
func (p podObject) asPolicy() policy.Pod {
	out := policy.Pod{Namespace: p.Metadata.Namespace, Name: p.Metadata.Name, Labels: p.Metadata.Labels}
	for _, ip := range p.Status.PodIPs {
		if a, err := netip.ParseAddr(ip.IP); err == nil {
			out.Addresses = append(out.Addresses, a)
		}
	}
	containers := slices.Clone(p.Spec.Containers)
	for _, c := range p.Spec.InitContainers {
		if c.RestartPolicy == "Always" {
			containers = append(containers, c)
		}
	}
	for _, c := range containers {
		for _, q := range c.Ports {
			protocol, ok := protocols[q.Protocol]
			if !ok {
				protocol = unix.IPPROTO_TCP
			}
			if q.ContainerPort > 0 && q.ContainerPort < 1<<16 {
				out.Ports = append(out.Ports, policy.NamedPort{Name: q.Name, Protocol: protocol, Port: uint16(q.ContainerPort)})
			}
		}
	}
	return out
}

// networkOf names a Network; the zero one is the default network.
type networkOf struct{ tenant, network string }

func (n networkOf) String() string {
	if n == (networkOf{}) {
		return "the default network"
	}
	return fmt.Sprintf("Network %s of tenant %s", n.network, n.tenant)
}

// check gathers what decides and asks package policy.
func (s *session) check(ctx context.Context, tenant string, from, to podKey, on []checkPort, service string) (answer, error) {
	a := answer{From: from.String(), To: to.String()}
	src, err := s.pod(ctx, from)
	if err != nil {
		return a, err
	}
	dst, err := s.pod(ctx, to)
	if err != nil {
		return a, err
	}
	var bindings list[bindingObject]
	path := hypernetes + "/tenantnamespaces"
	if tenant != "" {
		path = homePath(tenant, "tenantnamespaces")
	}
	if err := s.get(ctx, path, &bindings, ""); err != nil {
		return a, err
	}
	of := map[string]networkOf{}
	for _, b := range bindings.Items {
		if b.Status.Phase == bound {
			of[b.Metadata.Name] = networkOf{strings.TrimPrefix(b.Metadata.Namespace, homePrefix), b.Spec.Network}
		}
	}
	here, there := of[from.namespace], of[to.namespace]
	if here != there {
		a.Reasons = append(a.Reasons, fmt.Sprintf("%s is on %s, %s on %s: Networks do not reach each other", from, here, to, there))
		return a, nil
	}
	a.Reasons = append(a.Reasons, "both are on "+here.String())
	able := true
	for _, p := range []podObject{src, dst} {
		if p.Spec.HostNetwork {
			a.Reasons = append(a.Reasons, p.key()+" has the node's own network; policies do not bind it")
		}
		if !p.running() {
			a.Reasons = append(a.Reasons, fmt.Sprintf("%s has ended (%s)", p.key(), p.Status.Phase))
			able = false
		} else if len(p.Status.PodIPs) == 0 {
			a.Reasons = append(a.Reasons, fmt.Sprintf("%s has no address yet (%s)", p.key(), p.Status.Phase))
			able = false
		}
	}
	isReady := slices.ContainsFunc(dst.Status.Conditions, func(c condition) bool { return c.Type == "Ready" && c.Status == "True" })
	if !isReady && able {
		a.Reasons = append(a.Reasons, to.String()+" is not ready")
	}
	if !able {
		return a, nil
	}
	if service != "" {
		var why string
		if on, why, err = s.servicePorts(ctx, service, dst, isReady); err != nil {
			return a, err
		}
		a.Reasons = append(a.Reasons, why)
		if len(on) == 0 {
			return a, nil
		}
	}
	if len(on) == 0 {
		for _, p := range dst.asPolicy().Ports {
			on = append(on, checkPort{p.Port, p.Protocol})
		}
	}
	if len(on) == 0 {
		return a, usagef("%s names no ports: say which with --port", to)
	}
	if here == (networkOf{}) || src.Spec.HostNetwork || dst.Spec.HostNetwork {
		if here == (networkOf{}) {
			a.Reasons = append(a.Reasons, "NetworkPolicies are not enforced on the default network")
		}
		a.Allowed = true
		return a, nil
	}
	state, err := s.policyState(ctx, of, here)
	if err != nil {
		return a, err
	}
	for _, p := range on {
		v, err := policy.Evaluate(state, src.asPolicy(), dst.asPolicy(), p.protocol, p.number)
		if err != nil {
			return a, err
		}
		a.Ports = append(a.Ports, portAnswer{p.String(), v.Allowed, v.Egress, v.Ingress})
		a.Allowed = a.Allowed || v.Allowed
	}
	problems, err := policy.Problems(state)
	for _, p := range problems {
		a.Reasons = append(a.Reasons, fmt.Sprintf("policy %s: %s", p.Policy, p.Message))
	}
	return a, err
}

func (s *session) pod(ctx context.Context, key podKey) (p podObject, err error) {
	return p, s.get(ctx, namespacePath("/api/v1", key.namespace, "pods/"+url.PathEscape(key.name)), &p,
		fmt.Sprintf("there is no Pod %s; h8s kubectl -n %s get pods shows those there are", key, key.namespace))
}

// policyState is what package policy needs of a Network.
func (s *session) policyState(ctx context.Context, of map[string]networkOf, network networkOf) (policy.State, error) {
	state := policy.State{Namespaces: map[string]map[string]string{}}
	for name, n := range of {
		if n != network {
			continue
		}
		ns, err := s.namespaceLabels(ctx, name, n)
		if err != nil {
			return state, err
		}
		var pods list[podObject]
		var policies list[*networkingv1.NetworkPolicy]
		err = errors.Join(s.get(ctx, namespacePath("/api/v1", name, "pods"), &pods, ""), s.get(ctx, namespacePath("/apis/networking.k8s.io/v1", name, "networkpolicies"), &policies, ""))
		if err != nil {
			return state, err
		}
		state.Namespaces[name] = ns
		for _, p := range pods.Items {
			if p.running() && !p.Spec.HostNetwork {
				state.Pods = append(state.Pods, p.asPolicy())
			}
		}
		state.Policies = append(state.Policies, policies.Items...)
	}
	return state, nil
}

// namespaceLabels are a Namespace's. Users of a tenant may not read Namespaces: to them,
// those that every bound Namespace has.
func (s *session) namespaceLabels(ctx context.Context, name string, of networkOf) (map[string]string, error) {
	var ns struct{ Metadata meta }
	err := s.get(ctx, "/api/v1/namespaces/"+url.PathEscape(name), &ns, "")
	if errdefs.IsPermissionDenied(err) {
		return map[string]string{"kubernetes.io/metadata.name": name, "hypernetes.io/tenant": of.tenant, "hypernetes.io/network": of.network}, nil
	}
	return ns.Metadata.Labels, err
}

// servicePorts are the Pod's ports behind a Service; nil with the reason if it does not
// lead to the Pod.
func (s *session) servicePorts(ctx context.Context, service string, to podObject, isReady bool) ([]checkPort, string, error) {
	namespace, name, ok := strings.Cut(service, "/")
	if !ok {
		namespace, name = to.Metadata.Namespace, service
	}
	var svc serviceObject
	if err := s.get(ctx, namespacePath("/api/v1", namespace, "services/"+url.PathEscape(name)), &svc, fmt.Sprintf("there is no Service %s/%s", namespace, name)); err != nil {
		return nil, "", err
	}
	key := namespace + "/" + name
	if len(svc.Spec.Selector) == 0 {
		return nil, fmt.Sprintf("Service %s has no selector: which Pods it leads to is written in its EndpointSlices", key), nil
	}
	if namespace != to.Metadata.Namespace {
		return nil, fmt.Sprintf("Service %s leads to Pods of its own namespace only", key), nil
	}
	for _, k := range slices.Sorted(maps.Keys(svc.Spec.Selector)) {
		if v := svc.Spec.Selector[k]; to.Metadata.Labels[k] != v {
			return nil, fmt.Sprintf("Service %s does not lead to %s: its selector wants %s=%s", key, to.key(), k, v), nil
		}
	}
	if !isReady && !svc.Spec.PublishNotReadyAddresses {
		return nil, fmt.Sprintf("Service %s does not lead to %s while that is not ready", key, to.key()), nil
	}
	var out []checkPort
	var words []string
	pod := to.asPolicy()
	for _, p := range svc.Spec.Ports {
		protocol, ok := protocols[p.Protocol]
		if !ok {
			protocol = unix.IPPROTO_TCP
		}
		number := p.Port
		switch target := p.TargetPort.(type) {
		case float64:
			number = int(target)
		case string:
			i := slices.IndexFunc(pod.Ports, func(q policy.NamedPort) bool { return q.Name == target && q.Protocol == protocol })
			if i < 0 {
				words = append(words, fmt.Sprintf("%d (no port called %s)", p.Port, target))
				continue
			}
			number = int(pod.Ports[i].Port)
		}
		if number < 1 || number >= 1<<16 {
			return nil, "", fmt.Errorf("service %s: target port %v: %w", key, p.TargetPort, errdefs.ErrInvalidArgument)
		}
		out = append(out, checkPort{uint16(number), protocol})
		words = append(words, fmt.Sprintf("%d to %d", p.Port, number))
	}
	return out, fmt.Sprintf("Service %s leads to it: %s", key, strings.Join(words, ", ")), nil
}

// tenantOfNetwork finds whose Network a name is.
func (s *session) tenantOfNetwork(ctx context.Context, name string) (string, error) {
	var l list[networkObject]
	if err := s.get(ctx, hypernetes+"/networks", &l, noAPI); err != nil {
		return "", err
	}
	var tenants []string
	for _, n := range l.Items {
		if n.Metadata.Name == name {
			tenants = append(tenants, n.tenant())
		}
	}
	slices.Sort(tenants)
	switch len(tenants) {
	case 0:
		return "", fmt.Errorf("no tenant has a Network %s; h8s network list shows those there are: %w", name, errdefs.ErrNotFound)
	case 1:
		return tenants[0], nil
	}
	return "", fmt.Errorf("tenants %s have a Network %s: say which with --tenant: %w", strings.Join(tenants, ", "), name, errdefs.ErrFailedPrecondition)
}
