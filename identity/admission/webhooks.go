package admission

import (
	"encoding/base64"
	"strings"

	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"sigs.k8s.io/yaml"

	v1alpha1 "github.com/hypernetes/hypernetes/api/hypernetes/v1alpha1"
)

// Paths the webhook serves.
const (
	pathMutatePod     = "/mutate/pods"
	pathMutateVolumes = "/mutate/volumes"
	pathInjectPod     = "/inject/pods"
	pathValidatePod   = "/validate/pods"
	pathValidate      = "/validate/objects"
	pathCertificate   = "/validate/certificates"
)

const webhookName = "hypernetes.io"

// webhooks are the configurations that send the API server to address. Every refusal
// depends on them, so a webhook that cannot be reached refuses (Fail); only injection into
// the Pods of the default network does not, because no namespace without a tenant should
// depend on a controller.
func webhooks(address string, ca []byte) ([]*unstructured.Unstructured, error) {
	rule := func(groups, versions, operations, resources string) []any {
		return []any{map[string]any{"apiGroups": []any{groups}, "apiVersions": []any{versions},
			"operations": list(operations), "resources": list(resources), "scope": "*"}}
	}
	var everyTenant, noTenant map[string]any
	if err := yaml.Unmarshal([]byte(tenants), &everyTenant); err != nil {
		return nil, err
	}
	if err := yaml.Unmarshal([]byte(`{matchExpressions: [{key: `+v1alpha1.LabelTenant+`, operator: DoesNotExist}, `+notSystem+`]}`), &noTenant); err != nil {
		return nil, err
	}
	hook := func(name, path, failure string, rules []any, more map[string]any) any {
		h := map[string]any{
			"name": name + "." + webhookName, "failurePolicy": failure, "sideEffects": "None", "timeoutSeconds": int64(5),
			"matchPolicy": "Equivalent", "admissionReviewVersions": []any{"v1"}, "rules": rules,
			"clientConfig": map[string]any{"url": "https://" + address + path, "caBundle": base64.StdEncoding.EncodeToString(ca)},
		}
		for k, v := range more {
			h[k] = v
		}
		return h
	}
	condition := func(name, expression string) []any {
		return []any{map[string]any{"name": name, "expression": expression}}
	}
	configuration := func(kind string, hooks ...any) *unstructured.Unstructured {
		u := &unstructured.Unstructured{Object: map[string]any{"webhooks": hooks}}
		u.SetAPIVersion(admissionGroup + "/v1")
		u.SetKind(kind)
		u.SetName(webhookName)
		return u
	}
	pods := rule("", "v1", "CREATE", "pods")
	return []*unstructured.Unstructured{
		configuration("MutatingWebhookConfiguration",
			hook("pods", pathMutatePod, "Fail", pods, map[string]any{"namespaceSelector": everyTenant, "reinvocationPolicy": "IfNeeded"}),
			hook("volumes", pathMutateVolumes, "Fail", pods, map[string]any{"namespaceSelector": noTenant, "matchConditions": condition("flexvolume", flexCondition)}),
			hook("injection", pathInjectPod, "Ignore", pods, map[string]any{"namespaceSelector": noTenant, "reinvocationPolicy": "IfNeeded",
				"matchConditions": condition("asks",
					`(has(object.metadata.ownerReferences) && object.metadata.ownerReferences.exists(o, o.kind == "ReplicaSet"))`+
						` || (has(object.metadata.annotations) && object.metadata.annotations.exists(k, k.startsWith("initializer.kubernetes.io/")))`)})),
		configuration("ValidatingWebhookConfiguration",
			hook("pods", pathValidatePod, "Fail", pods, map[string]any{"namespaceSelector": everyTenant}),
			// Not the controllers' own writes, which must go on while the webhook is away, and not
			// the nodes', which a policy bounds: no Pod should wait for a controller to start.
			hook("objects", pathValidate, "Fail",
				append(rule(v1alpha1.GroupVersion.Group, "*", "CREATE,UPDATE", "tenants,tenantnamespaces,networks,ports,floatingips,addresspools"),
					rule(v1alpha1.GroupVersion.Group, "*", "DELETE", "networks")...),
				map[string]any{"matchConditions": condition("others",
					`!(request.userInfo.username == "`+ControllerUser+`" && "`+ControllerGroup+`" in request.userInfo.groups)`+
						` && !("`+KubestackGroup+`" in request.userInfo.groups)`+
						` && !("system:serviceaccounts:kube-system" in request.userInfo.groups)`+
						` && request.userInfo.username != "system:kube-controller-manager"`)}),
			hook("certificates", pathCertificate, "Fail", rule("certificates.k8s.io", "v1", "CREATE", "certificatesigningrequests"),
				map[string]any{"matchConditions": condition("tenants", `request.userInfo.groups.exists(g, g.startsWith("h8s:tenant:"))`)})),
	}, nil
}

func list(words string) []any {
	var l []any
	for w := range strings.SplitSeq(words, ",") {
		l = append(l, w)
	}
	return l
}
