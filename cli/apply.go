package cli

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/containerd/errdefs"
	"github.com/spf13/cobra"

	"github.com/hypernetes/hypernetes/cli/convert"
)

const convertLong = `Reads manifests and translates those of Hypernetes' ancestors: core v1 Network, Namespace
with spec.network, Stackube's Tenant and Network, and Deployments of API versions that are
gone. Everything else stays as it was written. -f takes files, folders (their *.yaml,
*.yml and *.json) and - for standard input.`

func newConvertCommand() *cobra.Command {
	var t target
	var files []string
	cmd := &cobra.Command{
		Use: "convert -f FILE", Short: "Translate manifests of the ancestors into what is served today", Args: noArgs,
		Long:    convertLong + "\n\nPrints the result; the notes on what was translated are its comments. The cluster is asked\nonly where a manifest does not say whose it is.",
		Example: "  h8s convert -f network.yaml --tenant blue > converted.yaml",
	}
	t.add(cmd)
	tenant := tenantFlag(cmd, &t)
	cmd.Flags().StringArrayVarP(&files, "filename", "f", nil, "file, folder or - (repeatable)")
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		r := &apiResolver{ctx: cmd.Context(), open: t.open}
		defer r.close()
		results, err := readManifests(cmd.InOrStdin(), files, *tenant, r)
		if err != nil {
			return err
		}
		return convert.Print(cmd.OutOrStdout(), results)
	}
	return cmd
}

func newApplyCommand() *cobra.Command {
	var t target
	var files []string
	var namespace string
	var dry, wait bool
	var timeout time.Duration
	cmd := &cobra.Command{
		Use: "apply -f FILE", Short: "Apply manifests, also those of the ancestors", Args: noArgs,
		Long: convertLong + `

Tenants, Networks and namespaces are applied first and waited for, what has Pods last.
Objects are applied server-side by field manager "h8s-apply".`,
		Example: "  h8s apply -f examples/tenant-network\n  cat app.yaml | h8s apply -f - --tenant blue --dry-run",
	}
	t.add(cmd)
	tenant := tenantFlag(cmd, &t)
	f := cmd.Flags()
	f.StringArrayVarP(&files, "filename", "f", nil, "file, folder or - (repeatable)")
	f.StringVar(&namespace, "namespace", "", "namespace of objects that name none (default \"default\")")
	f.BoolVar(&dry, "dry-run", false, "say what would be applied and change nothing")
	f.BoolVar(&wait, "wait", true, "wait for Tenants, Networks and namespaces to be ready")
	f.DurationVar(&timeout, "timeout", 2*time.Minute, "how long to wait for each")
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		s, err := t.open()
		if err != nil {
			return err
		}
		defer s.Close()
		if namespace == "" {
			if namespace = s.entry.Namespace; namespace == "" {
				namespace = "default"
			}
		}
		r := &apiResolver{ctx: cmd.Context(), session: s}
		results, err := readManifests(cmd.InOrStdin(), files, *tenant, r)
		if err != nil {
			return err
		}
		a := applier{session: s, out: cmd.OutOrStdout(), notes: cmd.ErrOrStderr(), namespace: namespace, dry: dry, wait: wait, timeout: timeout,
			resources: map[string][]apiResource{}, tenants: map[string]bool{}}
		return a.all(cmd.Context(), results)
	}
	return cmd
}

// readManifests reads and translates what -f names.
func readManifests(stdin io.Reader, files []string, tenant string, r convert.Resolver) ([]convert.Result, error) {
	if tenant != "" {
		if err := checkTenantName(tenant); err != nil {
			return nil, err
		}
	}
	if len(files) == 0 {
		return nil, usagef("nothing to read: -f FILE, or -f - for standard input")
	}
	var docs []convert.Document
	read := func(name string, f io.Reader) error {
		d, err := convert.Parse(name, f)
		docs = append(docs, d...)
		return err
	}
	for _, name := range files {
		if name == "-" {
			if err := read("standard input", stdin); err != nil {
				return nil, err
			}
			continue
		}
		names := []string{name}
		if st, err := os.Stat(name); err != nil {
			return nil, usagef("-f %s: %v", name, err)
		} else if st.IsDir() {
			names = nil
			for _, pattern := range []string{"*.yaml", "*.yml", "*.json"} {
				found, err := filepath.Glob(filepath.Join(name, pattern))
				if err != nil {
					return nil, err
				}
				names = append(names, found...)
			}
			slices.Sort(names)
			if len(names) == 0 {
				return nil, usagef("-f %s: no *.yaml, *.yml or *.json in this folder", name)
			}
		}
		for _, n := range names {
			b, err := os.ReadFile(n)
			if err != nil {
				return nil, usagef("-f %s: %v", n, err)
			}
			if err := read(n, bytes.NewReader(b)); err != nil {
				return nil, err
			}
		}
	}
	if len(docs) == 0 {
		return nil, usagef("-f %s: no objects there", strings.Join(files, ", -f "))
	}
	return convert.Convert(docs, tenant, r)
}

// apiResolver asks the cluster, and connects only if it has to.
type apiResolver struct {
	ctx     context.Context
	open    func() (*session, error)
	session *session
	opened  bool
}

var _ convert.Resolver = (*apiResolver)(nil)

func (r *apiResolver) connect() (*session, error) {
	if r.session == nil {
		s, err := r.open()
		if err != nil {
			return nil, err
		}
		r.session, r.opened = s, true
	}
	return r.session, nil
}

func (r *apiResolver) close() {
	if r.opened {
		r.session.Close()
	}
}

func (r *apiResolver) ByProject(id string) (string, error) {
	s, err := r.connect()
	if err != nil {
		return "", err
	}
	var l list[tenantObject]
	if err := s.get(r.ctx, hypernetes+"/tenants", &l, noAPI); err != nil {
		return "", err
	}
	for _, t := range l.Items {
		if t.Spec.Keystone != nil && t.Spec.Keystone.ProjectID == id {
			return t.Metadata.Name, nil
		}
	}
	return "", errdefs.ErrNotFound
}

func (r *apiResolver) ByNetwork(name string) (string, error) {
	s, err := r.connect()
	if err != nil {
		return "", err
	}
	return s.tenantOfNetwork(r.ctx, name)
}

type apiResource struct {
	Name, Kind string
	Namespaced bool
}

type applier struct {
	*session
	out, notes io.Writer
	namespace  string
	dry, wait  bool
	timeout    time.Duration
	resources  map[string][]apiResource
	tenants    map[string]bool // known to be there, or applied here
}

// rank is the order in which kinds are needed by others.
func rank(o convert.Object) int {
	if o.Str("apiVersion") == ourVersion {
		switch o.Str("kind") {
		case "Tenant":
			return 0
		case "Network":
			return 1
		case "TenantNamespace":
			return 2
		}
	}
	switch o.Str("kind") {
	case "Namespace", "CustomResourceDefinition":
		return 3
	case "Pod", "ReplicationController", "ReplicaSet", "Deployment", "StatefulSet", "DaemonSet", "Job", "CronJob":
		// Pods find what they need when they are made, such as the ConfigMap that says what is
		// injected, and the policies that keep them apart.
		return 5
	}
	return 4
}

func (a *applier) all(ctx context.Context, results []convert.Result) error {
	type item struct {
		object convert.Object
		source string
	}
	var items []item
	for _, r := range results {
		for _, n := range r.Notes {
			fmt.Fprintf(a.notes, "note: %s\n", n)
		}
		for _, o := range r.Objects {
			items = append(items, item{o, r.Source})
		}
	}
	slices.SortStableFunc(items, func(x, y item) int { return rank(x.object) - rank(y.object) })
	for _, i := range items {
		if err := a.one(ctx, i.object); err != nil {
			return fmt.Errorf("%s: %s: %w", i.source, i.object, err)
		}
	}
	return nil
}

func (a *applier) one(ctx context.Context, o convert.Object) error {
	if err := a.tenantOf(ctx, o); err != nil {
		return err
	}
	if o.Str("metadata", "name") == "" {
		return fmt.Errorf("metadata.generateName: objects that are applied need metadata.name: %w", errdefs.ErrInvalidArgument)
	}
	path, shown, err := a.path(ctx, o)
	if err != nil {
		return err
	}
	if a.dry {
		fmt.Fprintf(a.out, "%s would be applied\n", shown)
		return nil
	}
	if err := a.Apply(ctx, path, "h8s-apply", o); err != nil {
		return a.told(err)
	}
	fmt.Fprintf(a.out, "%s applied\n", shown)
	want := map[int]string{0: ready, 1: ready, 2: bound}[rank(o)]
	if want == "" || !a.wait {
		return nil
	}
	return a.waitFor(ctx, a.timeout, o.String(), path, phase(want))
}

// tenantOf refuses objects for tenants that are not there: the API would only say that
// some namespace is not.
func (a *applier) tenantOf(ctx context.Context, o convert.Object) error {
	if o.Str("apiVersion") != ourVersion {
		return nil
	}
	if o.Str("kind") == "Tenant" {
		a.tenants[o.Str("metadata", "name")] = true
		return nil
	}
	name := convert.Tenant(o.Str("metadata", "namespace"))
	if name == "" || a.tenants[name] {
		return nil
	}
	var t tenantObject
	err := a.Get(ctx, tenantPath(name), &t)
	switch {
	case errdefs.IsNotFound(err):
		return fmt.Errorf("there is no tenant %s; make it first: h8s tenant create %s: %w", name, name, errdefs.ErrNotFound)
	case err != nil && !errdefs.IsPermissionDenied(err): // a tenant's manager cannot see it
		return a.told(err)
	}
	a.tenants[name] = true
	return nil
}

// path finds an object's address by asking the server for its resources, once per group.
func (a *applier) path(ctx context.Context, o convert.Object) (path, shown string, err error) {
	group := o.Str("apiVersion")
	base := "/apis/" + group
	if !strings.Contains(group, "/") {
		base = "/api/" + group
	}
	known, ok := a.resources[group]
	if !ok {
		var l struct{ Resources []apiResource }
		if err := a.get(ctx, base, &l, fmt.Sprintf("apiVersion %s is not served by this cluster", group)); err != nil {
			return "", "", err
		}
		known = slices.DeleteFunc(l.Resources, func(r apiResource) bool { return strings.Contains(r.Name, "/") })
		a.resources[group] = known
	}
	i := slices.IndexFunc(known, func(r apiResource) bool { return r.Kind == o.Str("kind") })
	if i < 0 {
		return "", "", fmt.Errorf("kind %s is not served in apiVersion %s: %w", o.Str("kind"), group, errdefs.ErrNotFound)
	}
	name := o.Str("metadata", "name")
	shown = known[i].Name + "/" + name
	if known[i].Namespaced {
		ns := o.Str("metadata", "namespace")
		if ns == "" {
			ns = a.namespace
			m, ok := o["metadata"].(map[string]any)
			if !ok {
				return "", "", errors.New("metadata is no object")
			}
			m["namespace"] = ns
		}
		base += "/namespaces/" + url.PathEscape(ns)
		shown = ns + "/" + shown
	}
	return base + "/" + known[i].Name + "/" + url.PathEscape(name), shown, nil
}
