package cli

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net/url"
	"os"
	"slices"
	"strings"
	"time"

	"github.com/containerd/errdefs"
	"github.com/spf13/cobra"
	"sigs.k8s.io/yaml"

	"github.com/hypernetes/hypernetes/cluster/apiclient"
	"github.com/hypernetes/hypernetes/cluster/kubeconfig"
)

// target is how commands that talk to the API server find it: the node's own
// administrator, or any kubeconfig.
type target struct{ node, file string }

func (t *target) add(cmd *cobra.Command) {
	addNodeFlag(cmd, &t.node)
	cmd.Flags().StringVar(&t.file, "kubeconfig", "", "kubeconfig of another user or cluster than the node's administrator")
}

// session is a client and what it was made from.
type session struct {
	*apiclient.Client
	entry kubeconfig.Entry
}

func (t *target) open() (*session, error) {
	path := t.file
	if path == "" {
		if err := needRoot(); err != nil {
			return nil, err
		}
		_, l, err := find(t.node)
		if err != nil {
			return nil, err
		}
		path = l.Kubeconfig()
		if _, err := os.Stat(path); errors.Is(err, fs.ErrNotExist) {
			return nil, notRunning(l)
		}
	}
	e, err := kubeconfig.Load(path)
	if err != nil {
		return nil, err
	}
	api, err := apiclient.New(apiclient.Config{Server: e.Server, CA: e.CA, Cert: e.Cert, Key: e.Key, Token: e.Token})
	if err != nil {
		return nil, fmt.Errorf("kubeconfig %s: %w", path, err)
	}
	return &session{api, e}, nil
}

// told makes an error of the API server one for people.
func (s *session) told(err error) error {
	if err == nil || apiclient.Answered(err) || errors.Is(err, context.Canceled) {
		return err
	}
	var e *url.Error
	if errors.As(err, &e) {
		return becausef("H8S_NOT_RUNNING", "the API server at %s does not answer: %w", s.entry.Server, e.Err)
	}
	return err
}

// get reads path; missing is what a 404 means.
func (s *session) get(ctx context.Context, path string, out any, missing string) error {
	err := s.Get(ctx, path, out)
	if errdefs.IsNotFound(err) && missing != "" {
		return fmt.Errorf("%s: %w", missing, errdefs.ErrNotFound)
	}
	return s.told(err)
}

// meta, condition and the objects below are what these commands read of the API. The
// types of package v1alpha1 would bring Kubernetes' machinery into every command.
type meta struct {
	Name              string
	Namespace         string
	UID               string
	Generation        int64
	Labels            map[string]string
	CreationTimestamp time.Time
	DeletionTimestamp *time.Time
}

type condition struct{ Type, Status, Reason, Message string }

type objectStatus struct {
	ObservedGeneration int64
	Phase              string
	Conditions         []condition
}

// why is what the conditions say is wrong.
func (s objectStatus) why() string {
	var out []string
	for _, c := range s.Conditions {
		bad := c.Status == "False" && c.Type != "DeletionBlocked" || c.Status == "True" && c.Type == "DeletionBlocked"
		if bad && c.Message != "" && !slices.Contains(out, c.Message) {
			out = append(out, c.Message)
		}
	}
	return strings.Join(out, "; ")
}

type subnet struct {
	Name    string `json:"name,omitempty"`
	CIDR    string `json:"cidr"`
	Gateway string `json:"gateway,omitempty"`
}

type tenantObject struct {
	Metadata meta
	Spec     struct {
		Description    string
		Owners         []string
		Keystone       *struct{ ProjectID string }
		Quota          map[string]any
		RuntimeClasses []string
		PodSecurity    string
	}
	Status struct {
		objectStatus
		HomeNamespace        string
		Networks, Namespaces int
	}
}

type networkObject struct {
	Metadata meta
	Spec     struct {
		TenantID, Provider, ProviderNetworkID, Egress string
		DNSServers                                    []string
		Subnets                                       map[string]subnet
	}
	Status struct {
		objectStatus
		Tenant, Provider, ProviderNetworkID string
		HostAccess                          string
		VNI, MTU, Ports, FreeAddresses      int
		Subnets                             []subnet
	}
}

func (n networkObject) tenant() string {
	if n.Status.Tenant != "" {
		return n.Status.Tenant
	}
	return strings.TrimPrefix(n.Metadata.Namespace, homePrefix)
}

func (n networkObject) cidrs() string {
	var out []string
	for _, s := range n.Status.Subnets {
		out = append(out, s.CIDR)
	}
	if len(out) == 0 {
		for _, s := range n.Spec.Subnets {
			out = append(out, s.CIDR)
		}
		slices.Sort(out)
	}
	return strings.Join(out, ",")
}

type bindingObject struct {
	Metadata meta
	Spec     struct{ Network string }
	Status   objectStatus
}

type portObject struct {
	Metadata meta
	Spec     struct {
		Network, MAC, Node string
		Addresses          []string
		Retain             bool
		Pod                *struct{ Namespace, Name, Interface string }
	}
	Status objectStatus
}

type list[T any] struct{ Items []T }

// Names of package v1alpha1.
const (
	hypernetes     = "/apis/hypernetes.io/v1alpha1"
	ourVersion     = "hypernetes.io/v1alpha1"
	homePrefix     = "tenant-"
	claimNamespace = "h8s-system"
	ready          = "Active"
	bound          = "Bound"
)

func tenantPath(name string) string { return hypernetes + "/tenants/" + url.PathEscape(name) }

// homePath is a collection in a tenant's home namespace.
func homePath(tenant, resource string) string {
	return hypernetes + "/namespaces/" + url.PathEscape(homePrefix+tenant) + "/" + resource
}

func namespacePath(api, namespace, resource string) string {
	return api + "/namespaces/" + url.PathEscape(namespace) + "/" + resource
}

func (s *session) tenant(ctx context.Context, name string) (t tenantObject, err error) {
	return t, s.get(ctx, tenantPath(name), &t, fmt.Sprintf("there is no tenant %s; h8s tenant list shows those there are, h8s tenant create %s makes it", name, name))
}

// readOutputFlag adds -o for commands that show objects of the API.
func readOutputFlag(cmd *cobra.Command) *string {
	output := new(string)
	words := []string{"table", "json", "yaml"}
	cmd.Flags().StringVarP(output, "output", "o", "table", "table, json or yaml")
	_ = cmd.RegisterFlagCompletionFunc("output", cobra.FixedCompletions(words, cobra.ShellCompDirectiveNoFileComp)) // the flag is there
	check := cmd.PreRunE
	cmd.PreRunE = func(cmd *cobra.Command, args []string) error {
		if !slices.Contains(words, *output) {
			return becausef("H8S_USAGE", "output %q: want table, json or yaml: %w", *output, errdefs.ErrInvalidArgument)
		}
		if check != nil {
			return check(cmd, args)
		}
		return nil
	}
	return output
}

func printObject(w io.Writer, format string, v any) error {
	if format == "json" {
		return printJSON(w, v)
	}
	b, err := yaml.Marshal(v)
	if err != nil {
		return err
	}
	_, err = w.Write(b)
	return err
}

// pollEvery is how often objects that are waited for are looked at.
const pollEvery = 250 * time.Millisecond

// waitFor looks at an object until done. What it has last is in the error.
func (s *session) waitFor(ctx context.Context, timeout time.Duration, what, path string, done func(objectStatus, meta) bool) error {
	ctx, cancel := context.WithTimeout(ctx, timeout)
	defer cancel()
	tick := time.NewTicker(pollEvery)
	defer tick.Stop()
	last := "not there yet"
	for {
		var o struct {
			Metadata meta
			Status   objectStatus
		}
		err := s.Get(ctx, path, &o)
		switch {
		case err == nil && done(o.Status, o.Metadata):
			return nil
		case err == nil:
			last = strings.TrimSuffix(o.Status.Phase+": "+o.Status.why(), ": ")
			if o.Status.Phase == "" {
				last = "no controller has looked at it: h8s status shows whether h8s-controller runs"
			}
		case ctx.Err() == nil && !errdefs.IsNotFound(err) && !errdefs.IsUnavailable(err) && apiclient.Answered(err):
			return err
		}
		select {
		case <-ctx.Done():
			if errors.Is(ctx.Err(), context.DeadlineExceeded) {
				return becausef("H8S_NOT_READY", "%s is not ready after %s: %s", what, timeout, last)
			}
			return ctx.Err()
		case <-tick.C:
		}
	}
}

// phase is done when the controller has seen the latest and says so.
func phase(want string) func(objectStatus, meta) bool {
	return func(s objectStatus, m meta) bool {
		return s.Phase == want && s.ObservedGeneration >= m.Generation && m.DeletionTimestamp == nil
	}
}

// completeTenants offers the names of tenants.
func completeTenants(t *target) cobra.CompletionFunc {
	return func(cmd *cobra.Command, args []string, _ string) ([]string, cobra.ShellCompDirective) {
		s, err := t.open()
		if err != nil {
			return nil, cobra.ShellCompDirectiveNoFileComp
		}
		defer s.Close()
		ctx, cancel := context.WithTimeout(cmd.Context(), 2*time.Second)
		defer cancel()
		var l list[tenantObject]
		_ = s.Get(ctx, hypernetes+"/tenants", &l) // no completion is no failure
		var names []string
		for _, i := range l.Items {
			names = append(names, i.Metadata.Name)
		}
		return names, cobra.ShellCompDirectiveNoFileComp
	}
}

// completeFirst completes the first argument only.
func completeFirst(f cobra.CompletionFunc) cobra.CompletionFunc {
	return func(cmd *cobra.Command, args []string, to string) ([]string, cobra.ShellCompDirective) {
		if len(args) > 0 {
			return nil, cobra.ShellCompDirectiveNoFileComp
		}
		return f(cmd, args, to)
	}
}

// age in one unit, as kubectl's.
func age(since time.Time) string {
	d := time.Since(since)
	switch {
	case since.IsZero():
		return "-"
	case d < 2*time.Minute:
		return fmt.Sprintf("%ds", int(d.Seconds()))
	case d < 2*time.Hour:
		return fmt.Sprintf("%dm", int(d.Minutes()))
	case d < 48*time.Hour:
		return fmt.Sprintf("%dh", int(d.Hours()))
	}
	return fmt.Sprintf("%dd", int(d.Hours()/24))
}

func orDash(s string) string {
	if s == "" {
		return "-"
	}
	return s
}

// usagef is a mistake in the command line.
func usagef(format string, args ...any) error {
	return becausef("H8S_USAGE", "%s: %w", fmt.Sprintf(format, args...), errdefs.ErrInvalidArgument)
}
