package admission

import (
	"bytes"
	"embed"
	"fmt"
	"io/fs"
	"net/netip"
	"strings"
	"text/template"

	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"sigs.k8s.io/yaml"

	v1alpha1 "github.com/hypernetes/hypernetes/api/hypernetes/v1alpha1"
)

//go:embed policies/*.yaml
var policyFiles embed.FS

const admissionGroup = "admissionregistration.k8s.io"

const (
	// ControllerUser and ControllerGroup are the identity of h8s-controller, KubestackPrefix
	// and KubestackGroup that of a node's daemon, whose name ends with its node's.
	ControllerUser  = "h8s:controller"
	ControllerGroup = "h8s:controllers"
	KubestackPrefix = "h8s:kubestack:"
	KubestackGroup  = "h8s:kubestacks"
	// CSIControllerUser and CSIControllerGroup keep volumes, CSINodePrefix and CSINodeGroup are
	// a node's volume plugin.
	CSIControllerUser  = "h8s:csi-controller"
	CSIControllerGroup = "h8s:csi-controllers"
	CSINodePrefix      = "h8s:csi-node:"
	CSINodeGroup       = "h8s:csi-nodes"
)

// trusted is who writes on behalf of the cluster: our controller, Kubernetes' own
// controllers, and operators, which are those who may change Tenants.
const trusted = `(request.userInfo.username == "` + ControllerUser + `" && "` + ControllerGroup + `" in request.userInfo.groups)` +
	` || request.userInfo.username == "system:kube-controller-manager"` +
	` || "system:masters" in request.userInfo.groups` +
	` || "system:serviceaccounts:kube-system" in request.userInfo.groups` +
	` || authorizer.group("hypernetes.io").resource("tenants").check("update").allowed()`

// nodeOf is the node whose kubestack asks, or empty.
var nodeOf = fmt.Sprintf(`'%s' in request.userInfo.groups && request.userInfo.username.startsWith('%s')`+
	` ? request.userInfo.username.substring(%d) : ''`, KubestackGroup, KubestackPrefix, len(KubestackPrefix))

// csiNodeOf is the node whose volume plugin asks, or empty.
var csiNodeOf = fmt.Sprintf(`'%s' in request.userInfo.groups && request.userInfo.username.startsWith('%s')`+
	` ? request.userInfo.username.substring(%d) : ''`, CSINodeGroup, CSINodePrefix, len(CSINodePrefix))

// csiController says whether a keeper of volumes asks.
const csiController = `(request.userInfo.username == '` + CSIControllerUser + `' && '` + CSIControllerGroup + `' in request.userInfo.groups)`

// tenants selects the namespaces of tenants; the cluster's own are never matched, whatever
// labels they have.
const tenants = `{matchExpressions: [{key: ` + v1alpha1.LabelTenant + `, operator: Exists}, ` + notSystem + `]}`

const notSystem = `{key: kubernetes.io/metadata.name, operator: NotIn, values: [kube-system, ` + v1alpha1.SystemNamespace + `]}`

// capabilities that containers have in Pod Security's baseline.
const capabilities = `["AUDIT_WRITE", "CHOWN", "DAC_OVERRIDE", "FOWNER", "FSETID", "KILL", "MKNOD", "NET_BIND_SERVICE",` +
	` "SETFCAP", "SETGID", "SETPCAP", "SETUID", "SYS_CHROOT"]`

// neverEndpoints are no addresses of anybody's.
var neverEndpoints = []string{
	"0.0.0.0/8", "127.0.0.0/8", "169.254.0.0/16", "224.0.0.0/4", "240.0.0.0/4", "::/127", "fe80::/10", "ff00::/8",
}

// policies renders the embedded policies, each with its binding.
func policies(o Options) ([]*unstructured.Unstructured, error) {
	var forbidden []string
	for _, cidr := range neverEndpoints {
		forbidden = append(forbidden, `"`+cidr+`"`)
	}
	for _, p := range append(append([]netip.Prefix{}, o.ServiceCIDRs...), o.ReservedCIDRs...) {
		forbidden = append(forbidden, `"`+p.Masked().String()+`"`)
	}
	values := map[string]string{
		"Trusted": trusted, "NodeOf": nodeOf, "CSINodeOf": csiNodeOf, "CSIController": csiController, "Tenants": tenants, "Capabilities": strings.ReplaceAll(capabilities, `"`, `'`),
		"Forbidden": "[" + strings.Join(forbidden, ", ") + "]",
	}
	var objects []*unstructured.Unstructured
	err := fs.WalkDir(policyFiles, "policies", func(path string, entry fs.DirEntry, err error) error {
		if err != nil || entry.IsDir() {
			return err
		}
		t, err := template.ParseFS(policyFiles, path)
		if err != nil {
			return err
		}
		var text bytes.Buffer
		if err := t.Option("missingkey=error").Execute(&text, values); err != nil {
			return err
		}
		for _, document := range strings.Split(text.String(), "\n---\n") {
			u := &unstructured.Unstructured{}
			if err := yaml.UnmarshalStrict([]byte(document), &u.Object); err != nil {
				return fmt.Errorf("%s: %w", path, err)
			}
			u.SetAPIVersion(admissionGroup + "/v1")
			if err := unstructured.SetNestedField(u.Object, "Fail", "spec", "failurePolicy"); err != nil {
				return err
			}
			objects = append(objects, u, binding(u))
		}
		return nil
	})
	return objects, err
}

// binding puts a policy into effect everywhere, for every object of its kind of parameter.
func binding(policy *unstructured.Unstructured) *unstructured.Unstructured {
	spec := map[string]any{"policyName": policy.GetName()}
	if policy.GetKind() == "ValidatingAdmissionPolicy" {
		spec["validationActions"] = []any{"Deny"}
	}
	if _, found, _ := unstructured.NestedMap(policy.Object, "spec", "paramKind"); found {
		spec["paramRef"] = map[string]any{"selector": map[string]any{}, "parameterNotFoundAction": "Deny"}
	}
	u := &unstructured.Unstructured{Object: map[string]any{"spec": spec}}
	u.SetAPIVersion(policy.GetAPIVersion())
	u.SetKind(policy.GetKind() + "Binding")
	u.SetName(policy.GetName())
	return u
}
