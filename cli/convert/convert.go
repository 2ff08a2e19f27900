// Package convert translates manifests of Hypernetes' ancestors into what is served
// today: core v1 Network, Namespace with spec.network, Stackube's Tenant and Network,
// and Deployments of API versions that are gone. It owns reading several documents too.
// It must not talk to a server; whom a manifest belongs to is asked through a Resolver.
package convert

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"regexp"
	"slices"
	"strings"

	"github.com/containerd/errdefs"
	"sigs.k8s.io/yaml"
)

// Bounds of what is read.
const (
	maxBytes     = 16 << 20
	maxDocuments = 10000
)

// The group and version of our objects.
const apiVersion = "hypernetes.io/v1alpha1"

// Object is a decoded document.
type Object map[string]any

// Str is a string field, "" if there is none.
func (o Object) Str(keys ...string) string {
	s, _ := o.at(keys...).(string)
	return s
}

func (o Object) at(keys ...string) any {
	var v any = map[string]any(o)
	for _, k := range keys {
		m, ok := v.(map[string]any)
		if !ok {
			return nil
		}
		v = m[k]
	}
	return v
}

func (o Object) mapAt(keys ...string) map[string]any {
	m, _ := o.at(keys...).(map[string]any)
	return m
}

// String names the object for people.
func (o Object) String() string {
	name := o.Str("metadata", "name")
	if name == "" {
		name = o.Str("metadata", "generateName") + "…"
	}
	return o.Str("kind") + " " + name
}

// Document is one of the input.
type Document struct {
	// Source says where it came from: file and number.
	Source string
	// Raw is the document as it was written; nil if it was part of a List.
	Raw    []byte
	Object Object
}

// Result is what became of a Document.
type Result struct {
	Document
	// Objects are what is to be applied: the document itself if it is not Changed.
	Objects []Object
	Changed bool
	// Notes say what was translated, added and left out.
	Notes []string
}

// Resolver finds tenants.
type Resolver interface {
	// ByProject is the tenant that has a Keystone project; errdefs.ErrNotFound if none.
	ByProject(id string) (string, error)
	// ByNetwork is the tenant that has a Network of this name; errdefs.ErrNotFound if
	// none, errdefs.ErrFailedPrecondition if there are several.
	ByNetwork(name string) (string, error)
}

// Parse splits and decodes YAML or JSON of any number of documents. Lists are taken apart.
func Parse(source string, r io.Reader) ([]Document, error) {
	text, err := io.ReadAll(io.LimitReader(r, maxBytes+1))
	if err != nil {
		return nil, fmt.Errorf("%s: %w", source, err)
	}
	if len(text) > maxBytes {
		return nil, fmt.Errorf("%s: more than %d MiB: %w", source, maxBytes>>20, errdefs.ErrInvalidArgument)
	}
	parts := [][]byte{}
	if trimmed := bytes.TrimSpace(text); len(trimmed) > 0 && trimmed[0] == '{' {
		parts = splitJSON(trimmed)
	}
	if len(parts) == 0 {
		parts = splitYAML(text)
	}
	var out []Document
	for i, part := range parts {
		where := source
		if len(parts) > 1 {
			where = fmt.Sprintf("%s, document %d", source, i+1)
		}
		o := Object{}
		if err := yaml.UnmarshalStrict(part, (*map[string]any)(&o)); err != nil {
			return nil, fmt.Errorf("%s: %w: %w", where, err, errdefs.ErrInvalidArgument)
		}
		if len(o) == 0 {
			continue // empty, or comments only
		}
		if o.Str("kind") == "List" {
			items, _ := o["items"].([]any)
			for j, item := range items {
				m, ok := item.(map[string]any)
				if !ok {
					return nil, fmt.Errorf("%s: items[%d]: want an object: %w", where, j, errdefs.ErrInvalidArgument)
				}
				out = append(out, Document{Source: fmt.Sprintf("%s, item %d", where, j+1), Object: m})
			}
		} else {
			out = append(out, Document{Source: where, Raw: part, Object: o})
		}
		if len(out) > maxDocuments {
			return nil, fmt.Errorf("%s: more than %d documents: %w", source, maxDocuments, errdefs.ErrInvalidArgument)
		}
	}
	for _, d := range out {
		for _, field := range []string{"apiVersion", "kind"} {
			if d.Object.Str(field) == "" {
				return nil, fmt.Errorf("%s: no %s: is this a Kubernetes manifest? %w", d.Source, field, errdefs.ErrInvalidArgument)
			}
		}
		if d.Object.Str("metadata", "name") == "" && d.Object.Str("metadata", "generateName") == "" {
			return nil, fmt.Errorf("%s: %s without metadata.name: %w", d.Source, d.Object.Str("kind"), errdefs.ErrInvalidArgument)
		}
	}
	return out, nil
}

// splitJSON takes a stream of JSON objects apart; nil if it is none (YAML may begin with
// a brace as well).
func splitJSON(text []byte) [][]byte {
	var out [][]byte
	d := json.NewDecoder(bytes.NewReader(text))
	for {
		var raw json.RawMessage
		err := d.Decode(&raw)
		if errors.Is(err, io.EOF) {
			return out
		}
		if err != nil {
			return nil
		}
		out = append(out, raw)
	}
}

var separator = regexp.MustCompile(`(?m)^---([ \t].*)?\r?$\n?`)

func splitYAML(text []byte) [][]byte {
	var out [][]byte
	at := 0
	for _, m := range separator.FindAllIndex(text, -1) {
		out = append(out, text[at:m[0]])
		at = m[1]
	}
	out = append(out, text[at:])
	return slices.DeleteFunc(out, func(b []byte) bool { return len(bytes.TrimSpace(b)) == 0 })
}

// Convert translates documents. tenant, if given, is whose they are; otherwise they or
// the resolver say it.
func Convert(docs []Document, tenant string, r Resolver) ([]Result, error) {
	c := converter{docs: docs, tenant: tenant, resolver: r}
	var out []Result
	for _, d := range docs {
		res := Result{Document: d}
		if err := c.one(&res); err != nil {
			return nil, fmt.Errorf("%s: %s: %w", d.Source, d.Object, err)
		}
		if len(res.Objects) == 0 {
			res.Objects = []Object{d.Object}
		}
		out = append(out, res)
	}
	return out, nil
}

type converter struct {
	docs     []Document
	tenant   string
	resolver Resolver
}

func (c *converter) one(r *Result) error {
	o := r.Object
	switch kind, group := o.Str("kind"), o.Str("apiVersion"); {
	case kind == "Network" && group == "v1":
		return c.coreNetwork(r)
	case kind == "Namespace" && group == "v1" && (c.tenant != "" || o.at("spec", "network") != nil):
		return c.namespace(r)
	case kind == "Tenant" && group == stackube:
		return c.stackubeTenant(r)
	case kind == "Network" && group == stackube:
		return c.stackubeNetwork(r)
	case kind == "NetworkPolicy" && group == "extensions/v1beta1":
		r.become(renamed(o, "networking.k8s.io/v1"), "%s: extensions/v1beta1 is not served any more; became networking.k8s.io/v1", o)
		return nil
	case workloads[kind] && (gone[group] || group == "apps/v1" && o.at("spec", "selector") == nil):
		return c.workload(r)
	}
	return nil
}

const stackube = "stackube.kubernetes.io/v1"

var (
	workloads = map[string]bool{"Deployment": true, "DaemonSet": true, "ReplicaSet": true, "StatefulSet": true}
	gone      = map[string]bool{"apps/v1beta1": true, "apps/v1beta2": true, "extensions/v1beta1": true}
	projectID = regexp.MustCompile(`^[0-9a-f]{32}$`)
)

func (r *Result) become(o Object, format string, args ...any) {
	r.Changed = true
	r.Objects = append(r.Objects, o)
	r.note(format, args...)
}

func (r *Result) note(format string, args ...any) {
	r.Notes = append(r.Notes, fmt.Sprintf(format, args...))
}

// deep copies a JSON value.
func deep(v any) any {
	switch v := v.(type) {
	case map[string]any:
		out := make(map[string]any, len(v))
		for k, x := range v {
			out[k] = deep(x)
		}
		return out
	case []any:
		out := make([]any, len(v))
		for i, x := range v {
			out[i] = deep(x)
		}
		return out
	}
	return v
}

func renamed(o Object, group string) Object {
	out := Object(deep(map[string]any(o)).(map[string]any))
	out["apiVersion"] = group
	delete(out, "status")
	return out
}

// object makes one of ours with the old one's labels and annotations.
func object(kind, namespace string, from Object, spec map[string]any) Object {
	meta := map[string]any{"name": from.Str("metadata", "name")}
	if namespace != "" {
		meta["namespace"] = namespace
	}
	for _, k := range []string{"labels", "annotations"} {
		m, _ := deep(from.mapAt("metadata", k)).(map[string]any)
		delete(m, lastApplied) // a copy of the old object, passwords and all
		if len(m) > 0 {
			meta[k] = m
		}
	}
	return Object{"apiVersion": apiVersion, "kind": kind, "metadata": meta, "spec": spec}
}

const lastApplied = "kubectl.kubernetes.io/last-applied-configuration"

// home is a tenant's home namespace.
func home(tenant string) string { return "tenant-" + tenant }

// Tenant is the tenant whose home namespace this is, "" if it is none.
func Tenant(namespace string) string {
	t, _ := strings.CutPrefix(namespace, "tenant-")
	if t == namespace {
		return ""
	}
	return t
}

// tenantOf finds whose a Network is.
func (c *converter) tenantOf(o Object) (string, error) {
	if c.tenant != "" {
		return c.tenant, nil
	}
	id := o.Str("spec", "tenantID")
	if id == "" {
		return "", fmt.Errorf("spec.tenantID is empty; say whose it is with --tenant: %w", errdefs.ErrInvalidArgument)
	}
	if !projectID.MatchString(id) {
		return id, nil
	}
	t, err := c.resolver.ByProject(id)
	if errdefs.IsNotFound(err) {
		return "", fmt.Errorf("spec.tenantID %s: no tenant has this Keystone project; make it (h8s tenant create NAME --project-id %s) or say whose it is with --tenant: %w", id, id, errdefs.ErrNotFound)
	}
	if err != nil {
		return "", fmt.Errorf("spec.tenantID %s: %w; --tenant says whose it is without asking", id, err)
	}
	return t, nil
}

// only says which fields of a spec are not carried over.
func (r *Result) only(known ...string) {
	var left []string
	for k := range r.Object.mapAt("spec") {
		if !slices.Contains(known, k) {
			left = append(left, "spec."+k)
		}
	}
	if len(left) > 0 {
		slices.Sort(left)
		r.note("%s: left out, as nothing answers to it: %s", r.Object, strings.Join(left, ", "))
	}
}

func (c *converter) coreNetwork(r *Result) error {
	tenant, err := c.tenantOf(r.Object)
	if err != nil {
		return err
	}
	spec := map[string]any{}
	known := []string{"tenantID", "subnets", "providerNetworkID"}
	for _, k := range known {
		if v := r.Object.at("spec", k); v != nil && v != "" {
			spec[k] = deep(v)
		}
	}
	r.become(object("Network", home(tenant), r.Object, spec),
		"%s: core v1 has no Network; became networks.hypernetes.io %s in %s", r.Object, r.Object.Str("metadata", "name"), home(tenant))
	r.only(known...)
	return nil
}

func (c *converter) namespace(r *Result) error {
	network, ok := r.Object.at("spec", "network").(string)
	if !ok && r.Object.at("spec", "network") != nil {
		return fmt.Errorf("spec.network %v: want the name of a Network: %w", r.Object.at("spec", "network"), errdefs.ErrInvalidArgument)
	}
	if network == "" {
		network = "default"
	}
	tenant := c.tenant
	if tenant == "" {
		// The Network of this name that comes with it, else the one there is.
		for _, d := range c.docs {
			if d.Object.Str("kind") != "Network" || d.Object.Str("metadata", "name") != network {
				continue
			}
			switch d.Object.Str("apiVersion") {
			case "v1":
				t, err := c.tenantOf(d.Object)
				if err != nil {
					return fmt.Errorf("spec.network %s: %w", network, err)
				}
				tenant = t
			case apiVersion:
				tenant = Tenant(d.Object.Str("metadata", "namespace"))
			case stackube:
				tenant = d.Object.Str("metadata", "namespace")
			}
		}
	}
	if tenant == "" {
		t, err := c.resolver.ByNetwork(network)
		switch {
		case errdefs.IsNotFound(err):
			return fmt.Errorf("spec.network %s: there is no such Network; apply it before or with this, or say whose it is with --tenant: %w", network, errdefs.ErrNotFound)
		case errdefs.IsFailedPrecondition(err):
			return fmt.Errorf("spec.network %s: several tenants have a Network of this name (%w); say whose it is with --tenant", network, err)
		case err != nil:
			return fmt.Errorf("spec.network %s: %w; --tenant says whose it is without asking", network, err)
		}
		tenant = t
	}
	bare := Object{"kind": "Namespace", "metadata": map[string]any{"name": r.Object.Str("metadata", "name")}}
	r.become(object("TenantNamespace", home(tenant), bare, map[string]any{"network": network}),
		"%s: became tenantnamespaces.hypernetes.io %s in %s; the controller makes the Namespace, bound to Network %s", r.Object, r.Object.Str("metadata", "name"), home(tenant), network)
	for _, k := range []string{"labels", "annotations"} {
		if len(r.Object.mapAt("metadata", k)) > 0 {
			r.note("%s: metadata.%s left out: those of a tenant's Namespace are the operator's", r.Object, k)
		}
	}
	return nil
}

func (c *converter) stackubeTenant(r *Result) error {
	o := r.Object
	name := o.Str("metadata", "name")
	// Without a defaultNetwork: Stackube's own default, 10.244.0.0/16, is the range of this
	// cluster's Pods, which no tenant may have.
	spec := map[string]any{}
	if user := o.Str("spec", "username"); user != "" {
		spec["owners"] = []any{name + ":" + user}
	}
	id := o.Str("spec", "tenantID")
	if projectID.MatchString(id) {
		spec["keystone"] = map[string]any{"projectID": id}
	}
	r.become(object("Tenant", "", o, spec), "%s: Stackube's became tenants.hypernetes.io %s", o, name)
	if id != "" && !projectID.MatchString(id) {
		r.note("%s: spec.tenantID %q left out: it is no Keystone project ID (32 hexadecimal digits)", o, id)
	}
	if o.at("spec", "password") != nil {
		r.note("%s: spec.password dropped: no object holds passwords here", o)
	}
	if user := o.Str("spec", "username"); user != "" {
		r.note("%s: user %s gets credentials by: h8s tenant kubeconfig %s --user %s --role manager", o, user, name, user)
	}
	network := "default"
	for _, d := range c.docs {
		if d.Object.Str("kind") == "Network" && d.Object.Str("apiVersion") == stackube && d.Object.Str("metadata", "namespace") == name &&
			(network == "default" || d.Object.Str("metadata", "name") == name) {
			network = d.Object.Str("metadata", "name")
		}
	}
	bare := Object{"metadata": map[string]any{"name": name}}
	r.become(object("TenantNamespace", home(name), bare, map[string]any{"network": network}),
		"%s: its namespace of the same name became tenantnamespaces.hypernetes.io %s in %s, on Network %s", o, name, home(name), network)
	r.only("username", "password", "tenantID")
	return nil
}

func (c *converter) stackubeNetwork(r *Result) error {
	o := r.Object
	tenant := c.tenant
	if tenant == "" {
		tenant = o.Str("metadata", "namespace") // one namespace, one tenant
	}
	if tenant == "" {
		return fmt.Errorf("no metadata.namespace, which names the tenant; say whose it is with --tenant: %w", errdefs.ErrInvalidArgument)
	}
	spec := map[string]any{}
	if id := o.Str("spec", "networkID"); id != "" {
		spec["providerNetworkID"] = id
		if o.Str("spec", "cidr") != "" {
			r.note("%s: spec.cidr and spec.gateway left out: those of network %s at the provider hold", o, id)
		}
	} else {
		subnet := map[string]any{"cidr": o.Str("spec", "cidr")}
		if g := o.Str("spec", "gateway"); g != "" {
			subnet["gateway"] = g
		}
		spec["subnets"] = map[string]any{"default": subnet}
	}
	r.become(object("Network", home(tenant), o, spec), "%s: Stackube's became networks.hypernetes.io %s in %s", o, o.Str("metadata", "name"), home(tenant))
	r.only("cidr", "gateway", "networkID")
	return nil
}

// workload makes a Deployment (or its like) of an old API version apps/v1, which wants a
// selector and labels to be selected by.
func (c *converter) workload(r *Result) error {
	o := r.Object
	out := renamed(o, "apps/v1")
	if was := o.Str("apiVersion"); was != "apps/v1" {
		r.note("%s: %s is not served any more; became apps/v1", o, was)
	}
	spec, ok := out["spec"].(map[string]any)
	template, ok2 := out.at("spec", "template").(map[string]any)
	if !ok || !ok2 {
		return fmt.Errorf("spec.template: want an object: %w", errdefs.ErrInvalidArgument)
	}
	meta, ok := template["metadata"].(map[string]any)
	if !ok {
		meta = map[string]any{}
		template["metadata"] = meta
	}
	labels, _ := meta["labels"].(map[string]any)
	if spec["selector"] == nil {
		if len(labels) == 0 {
			labels = map[string]any{"app": o.Str("metadata", "name")}
			meta["labels"] = labels
			r.note("%s: spec.template.metadata.labels added: %s", o, pairs(labels))
		}
		spec["selector"] = map[string]any{"matchLabels": deep(labels)}
		r.note("%s: spec.selector added, the template's labels: %s", o, pairs(labels))
	}
	for _, k := range []string{"rollbackTo", "templateGeneration"} {
		if spec[k] != nil {
			delete(spec, k)
			r.note("%s: spec.%s left out: apps/v1 has none", o, k)
		}
	}
	r.Changed, r.Objects = true, []Object{out}
	return nil
}

func pairs(m map[string]any) string {
	var out []string
	for _, k := range slices.Sorted(maps.Keys(m)) {
		out = append(out, fmt.Sprintf("%s=%v", k, m[k]))
	}
	return strings.Join(out, ",")
}

// Print writes results as one stream of YAML documents; what is not changed stays as it
// was written. Notes become comments.
func Print(w io.Writer, results []Result) error {
	first := true
	for _, r := range results {
		for i, o := range r.Objects {
			if !first {
				if _, err := io.WriteString(w, "---\n"); err != nil {
					return err
				}
			}
			first = false
			text := r.Raw
			if r.Changed || text == nil {
				var err error
				if text, err = yaml.Marshal(map[string]any(o)); err != nil {
					return err
				}
			}
			if i == 0 {
				for _, n := range r.Notes {
					if _, err := fmt.Fprintf(w, "# %s\n", strings.ReplaceAll(n, "\n", " ")); err != nil {
						return err
					}
				}
			}
			if _, err := fmt.Fprintf(w, "%s\n", bytes.TrimRight(text, "\r\n")); err != nil {
				return err
			}
		}
	}
	return nil
}
