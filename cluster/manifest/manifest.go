// Package manifest owns the objects every cluster begins with: RuntimeClasses and
// their default, DNS, metrics, and the rights of the node's own components. It
// renders them from settings and applies them; it must not know when.
package manifest

import (
	"bytes"
	"context"
	"embed"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"slices"
	"strings"
	"text/template"
	"time"

	"github.com/containerd/errdefs"
	"sigs.k8s.io/yaml"

	"github.com/hypernetes/hypernetes/api/hypernetes/v1alpha1/crds"
)

//go:embed objects/*.yaml objects/snapshots/*.yaml
var objects embed.FS

// fieldManager owns the fields h8s applies.
const fieldManager = "h8s"

// Values are what the objects depend on.
type Values struct {
	NodeIP string
	// Server is the URL of the API server for other nodes, BootstrapGroup the group of
	// those who present a join token.
	Server         string
	BootstrapGroup string
	MetricsPort    int
	DNSServiceIP   string
	ClusterDomain  string
	// CA is the PEM bundle that signs metrics-server's certificate.
	CA []byte
	// CoreDNSImage is empty when there is no image; DNS is then left out.
	CoreDNSImage string
	// Forward is the resolver for names outside the cluster, empty if there is none.
	Forward  string
	Overhead Overhead
	// OpenStack says that there are Cinder's volumes too.
	OpenStack bool
}

// CABundle is CA as APIService wants it.
func (v Values) CABundle() string { return base64.StdEncoding.EncodeToString(v.CA) }

// Overhead is what a Pod's virtual machine costs beyond its containers.
type Overhead struct {
	CPU    string `json:"cpu"`
	Memory string `json:"memory"`
}

// DefaultOverhead holds where nothing was measured. Memory is the guest's own part
// (memory_overhead_mib of hyper.toml) and the most QEMU and the shim took beside the
// guest's RAM under emulation with Debian's kernel: below it the Pod's cgroup kills the
// VM when all of its RAM is in use. CPU is what an idle VM takes; more would only keep
// Pods from being scheduled.
var DefaultOverhead = Overhead{CPU: "20m", Memory: "256Mi"}

// LoadOverhead reads the measured overhead, or returns the default if the file is absent.
func LoadOverhead(path string) (Overhead, error) {
	b, err := os.ReadFile(path)
	if errors.Is(err, fs.ErrNotExist) {
		return DefaultOverhead, nil
	}
	if err != nil {
		return Overhead{}, err
	}
	o := DefaultOverhead
	if err := json.Unmarshal(b, &o); err != nil {
		return Overhead{}, fmt.Errorf("overhead %s: %w", path, err)
	}
	return o, nil
}

// Object is one object as decoded YAML.
type Object map[string]any

func (o Object) str(keys ...string) string {
	var v any = map[string]any(o)
	for _, k := range keys {
		m, ok := v.(map[string]any)
		if !ok {
			return ""
		}
		v = m[k]
	}
	s, _ := v.(string)
	return s
}

// Kind is the object's kind.
func (o Object) Kind() string { return o.str("kind") }

// Name is the object's name.
func (o Object) Name() string { return o.str("metadata", "name") }

// Path is the object's URL path.
func (o Object) Path() (string, error) {
	r, ok := resources[o.Kind()]
	if !ok {
		return "", fmt.Errorf("kind %q is not known to package manifest", o.Kind())
	}
	path := "/apis/" + o.str("apiVersion")
	if !strings.Contains(o.str("apiVersion"), "/") {
		path = "/api/" + o.str("apiVersion")
	}
	if r.namespaced {
		path += "/namespaces/" + o.str("metadata", "namespace")
	}
	return path + "/" + r.resource + "/" + o.Name(), nil
}

// Render returns the objects in the order they are to be applied.
func Render(v Values) ([]Object, error) {
	out, err := definitions()
	if err != nil {
		return nil, err
	}
	names := []string{"rbac", "join", "tenancy", "storage-rights", "storage", "runtimeclasses", "metrics"}
	if v.CoreDNSImage != "" {
		names = append(names, "coredns")
	}
	for _, name := range names {
		t, err := template.ParseFS(objects, "objects/"+name+".yaml")
		if err != nil {
			return nil, err
		}
		var buf bytes.Buffer
		if err := t.Execute(&buf, v); err != nil {
			return nil, err
		}
		parts, err := parse(buf.String())
		if err != nil {
			return nil, fmt.Errorf("objects/%s.yaml: %w", name, err)
		}
		out = append(out, parts...)
	}
	return out, nil
}

// definitions are those of our own objects, and of Kubernetes' snapshots as upstream
// publishes them (github.com/kubernetes-csi/external-snapshotter/client/config/crd).
func definitions() ([]Object, error) {
	snapshots, err := fs.Sub(objects, "objects/snapshots")
	if err != nil {
		return nil, err
	}
	var out []Object
	for _, dir := range []fs.FS{crds.FS, snapshots} {
		files, err := fs.ReadDir(dir, ".")
		if err != nil {
			return nil, err
		}
		for _, f := range files {
			b, err := fs.ReadFile(dir, f.Name())
			if err != nil {
				return nil, err
			}
			parts, err := parse(string(b))
			if err != nil {
				return nil, fmt.Errorf("%s: %w", f.Name(), err)
			}
			out = append(out, parts...)
		}
	}
	return out, nil
}

func parse(text string) ([]Object, error) {
	var out []Object
	for part := range strings.SplitSeq(strings.TrimPrefix(text, "---\n"), "\n---\n") {
		o := Object{}
		if err := yaml.Unmarshal([]byte(part), &o); err != nil {
			return nil, err
		}
		out = append(out, o)
	}
	return out, nil
}

// resources maps the kinds used here; asking the server for its resources would cost
// a dozen requests on the critical path.
var resources = map[string]struct {
	resource   string
	namespaced bool
}{
	"CustomResourceDefinition":       {"customresourcedefinitions", false},
	"Namespace":                      {"namespaces", false},
	"Node":                           {"nodes", false},
	"Role":                           {"roles", true},
	"RuntimeClass":                   {"runtimeclasses", false},
	"MutatingAdmissionPolicy":        {"mutatingadmissionpolicies", false},
	"MutatingAdmissionPolicyBinding": {"mutatingadmissionpolicybindings", false},
	"ClusterRole":                    {"clusterroles", false},
	"ClusterRoleBinding":             {"clusterrolebindings", false},
	"RoleBinding":                    {"rolebindings", true},
	"ServiceAccount":                 {"serviceaccounts", true},
	"ConfigMap":                      {"configmaps", true},
	"Service":                        {"services", true},
	"EndpointSlice":                  {"endpointslices", true},
	"Deployment":                     {"deployments", true},
	"APIService":                     {"apiservices", false},
	"CSIDriver":                      {"csidrivers", false},
	"StorageClass":                   {"storageclasses", false},
	"VolumeSnapshotClass":            {"volumesnapshotclasses", false},
}

// ControlPlane is what a Node is said to be that runs the control plane.
func ControlPlane(node string) Object {
	return Object{"apiVersion": "v1", "kind": "Node", "metadata": map[string]any{
		"name": node, "labels": map[string]any{"node-role.kubernetes.io/control-plane": ""},
	}}
}

// Applier applies an object server-side, or deletes one; one that is not there is no error.
type Applier interface {
	Apply(ctx context.Context, path, manager string, object any) error
	Delete(ctx context.Context, path string) error
}

// Apply applies the objects and repeats what fails for reasons that pass (namespaces
// and roles are made by the API server just after it is ready) until ctx ends.
func Apply(ctx context.Context, api Applier, objs []Object) error {
	tick := time.NewTicker(100 * time.Millisecond)
	defer tick.Stop()
	pending := slices.Clone(objs)
	for {
		var last, fatal error
		pending = slices.DeleteFunc(pending, func(o Object) bool {
			if fatal != nil {
				return false
			}
			path, err := o.Path()
			if err == nil {
				err = api.Apply(ctx, path, fieldManager, o)
			}
			if errdefs.IsInvalidArgument(err) && o.Kind() == "CSIDriver" {
				// One of an older version, most of whose fields cannot be changed. Kubelets try
				// again what they tried without it.
				if err = api.Delete(ctx, path); err == nil {
					err = api.Apply(ctx, path, fieldManager, o)
				}
			}
			if err == nil {
				return true
			}
			last = fmt.Errorf("%s %s: %w", o.Kind(), o.Name(), err)
			if errdefs.IsInvalidArgument(err) {
				fatal = last
			}
			return false
		})
		if len(pending) == 0 || fatal != nil {
			return fatal
		}
		select {
		case <-ctx.Done():
			return errors.Join(ctx.Err(), last)
		case <-tick.C:
		}
	}
}
