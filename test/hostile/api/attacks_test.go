package api

import (
	"context"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"strings"
	"testing"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/apimachinery/pkg/util/intstr"
	"sigs.k8s.io/controller-runtime/pkg/client"

	v1alpha1 "github.com/hypernetes/hypernetes/api/hypernetes/v1alpha1"
)

// Paths of the API, and what the defences are called.
const (
	own   = "/apis/hypernetes.io/v1alpha1"
	home  = own + "/namespaces/tenant-blue"
	web   = "/api/v1/namespaces/blue-web"
	slice = "/apis/discovery.k8s.io/v1/namespaces/blue-web/endpointslices"
	rbac  = "/apis/rbac.authorization.k8s.io/v1/namespaces/blue-web/rolebindings"
	csrs  = "/apis/certificates.k8s.io/v1/certificatesigningrequests"

	vap      = "ValidatingAdmissionPolicyBinding/"
	mutating = "MutatingWebhookConfiguration/hypernetes.io"
	webhook  = "ValidatingWebhookConfiguration/hypernetes.io"
)

// attack is one attempt. Attempts are dry runs, so that they can be made again and again.
type attack struct {
	number int
	name   string
	try    func(ctx context.Context, w *world) error
	// says is what the refusal must name.
	says string
	// defences are what has to be taken away for it to go through.
	defences []string
	// alone says that the defence holds while the webhook and the controller are away.
	alone bool
}

// send makes a dry run of a request.
func send(ctx context.Context, u user, verb, path, body string) error {
	c := u.set.CoreV1().RESTClient()
	r := c.Verb(verb).AbsPath(path)
	switch verb {
	case "PATCH":
		r = c.Patch(types.MergePatchType).AbsPath(path)
		r = r.Param("dryRun", "All")
	case "POST", "PUT", "DELETE":
		r = r.Param("dryRun", "All").SetHeader("Content-Type", "application/json")
	}
	if body != "" {
		r = r.Body([]byte(body))
	}
	return r.Do(ctx).Error()
}

func patch(u func(*world) user, path, body string) func(context.Context, *world) error {
	return func(ctx context.Context, w *world) error { return send(ctx, u(w), "PATCH", path, body) }
}

func post(u func(*world) user, path string, body any) func(context.Context, *world) error {
	return func(ctx context.Context, w *world) error {
		text, ok := body.(string)
		if !ok {
			b, err := json.Marshal(body)
			if err != nil {
				return err
			}
			text = string(b)
		}
		return send(ctx, u(w), "POST", path, text)
	}
}

func remove(u func(*world) user, path string) func(context.Context, *world) error {
	return func(ctx context.Context, w *world) error { return send(ctx, u(w), "DELETE", path, "") }
}

// connect counts as gone through if the API server got as far as looking for an address;
// none of those named has one, so that nothing is dialled.
func connect(u func(*world) user, path string) func(context.Context, *world) error {
	return func(ctx context.Context, w *world) error {
		err := send(ctx, u(w), "GET", path, "")
		if err != nil && strings.Contains(err.Error(), "ValidatingAdmissionPolicy") {
			return err
		}
		return nil
	}
}

func ann(w *world) user        { return w.ann }
func node(w *world) user       { return w.node }
func kubestack(w *world) user  { return w.kubestack }
func csiNode(w *world) user    { return w.csiNode }
func keeper(w *world) user     { return w.keeper }
func deputy(w *world) user     { return w.deputy }
func controller(w *world) user { return w.controller }
func kcm(w *world) user        { return w.endpoints }
func admin(w *world) user      { return w.admin }

func service(spec string) string {
	return `{"apiVersion":"v1","kind":"Service","metadata":{"name":"evil"},"spec":` + spec + `}`
}

func tenantPod(change func(*corev1.Pod)) any {
	return pod("evil", func(p *corev1.Pod) {
		p.APIVersion, p.Kind = "v1", "Pod"
		p.Spec.RuntimeClassName = new("hyper")
		change(p)
	})
}

// inline gives a Pod a volume of its own by a driver.
func inline(driver string) func(*corev1.Pod) {
	return func(p *corev1.Pod) {
		p.Spec.Volumes = []corev1.Volume{{Name: "v", VolumeSource: corev1.VolumeSource{CSI: &corev1.CSIVolumeSource{Driver: driver}}}}
	}
}

func binding(kind, name string) string {
	return `{"apiVersion":"rbac.authorization.k8s.io/v1","kind":"RoleBinding","metadata":{"name":"evil"},
		"roleRef":{"apiGroup":"rbac.authorization.k8s.io","kind":"ClusterRole","name":"far-too-much"},
		"subjects":[{"apiGroup":"rbac.authorization.k8s.io","kind":"` + kind + `","name":"` + name + `"}]}`
}

func network(name, spec string) string {
	return `{"apiVersion":"hypernetes.io/v1alpha1","kind":"Network","metadata":{"name":"` + name + `"},"spec":` + spec + `}`
}

func certificate(t testing.TB, signer, name string, organisations ...string) string {
	return `{"apiVersion":"certificates.k8s.io/v1","kind":"CertificateSigningRequest","metadata":{"name":"evil"},
		"spec":{"signerName":"` + signer + `","usages":["client auth"],"request":"` + base64.StdEncoding.EncodeToString(request(t, name, organisations...)) + `"}}`
}

func claim(address string, change func(*v1alpha1.Port)) any {
	return port(address, func(p *v1alpha1.Port) {
		p.APIVersion, p.Kind = "hypernetes.io/v1alpha1", "Port"
		change(p)
	})
}

func endpoints(addresses string) string {
	return `{"apiVersion":"discovery.k8s.io/v1","kind":"EndpointSlice","metadata":{"name":"evil","labels":{"kubernetes.io/service-name":"web"}},
		"addressType":"IPv4","endpoints":[{"addresses":["` + addresses + `"]}],"ports":[{"port":10250}]}`
}

func attacks(t testing.TB) []attack {
	httpGet := func(host string) *corev1.Probe {
		return &corev1.Probe{ProbeHandler: corev1.ProbeHandler{HTTPGet: &corev1.HTTPGetAction{Host: host, Port: portNumber(80)}}}
	}
	both := []string{mutating, vap + "pods.hypernetes.io"}
	pods := []string{vap + "pods.hypernetes.io"}
	ports := []string{vap + "ports.hypernetes.io"}
	volumes := []string{vap + "volumes.hypernetes.io"}
	namespaces := []string{vap + "namespaces.hypernetes.io"}
	services := []string{vap + "services.hypernetes.io"}
	return []attack{
		// 3: the node or the API server dials an address that the tenant chose.
		{3, "probe of another host", post(ann, web+"/pods", tenantPod(func(p *corev1.Pod) { p.Spec.Containers[0].LivenessProbe = httpGet("100.64.0.1") })), "host", both, false},
		{3, "probe dialled by the node", post(ann, web+"/pods", tenantPod(func(p *corev1.Pod) {
			p.Spec.RuntimeClassName = new("runc")
			p.Spec.Containers[0].ReadinessProbe = httpGet("")
		})), "readinessProbe.httpGet", both, false},
		{3, "hook dialled by the node", post(ann, web+"/pods", tenantPod(func(p *corev1.Pod) {
			p.Spec.RuntimeClassName = new("runc")
			p.Spec.Containers[0].Lifecycle = &corev1.Lifecycle{PreStop: &corev1.LifecycleHandler{HTTPGet: &corev1.HTTPGetAction{Port: portNumber(80)}}}
		})), "preStop.httpGet", both, false},
		{3, "pods/proxy", connect(ann, web+"/pods/web/proxy/"), "port-forward", []string{vap + "proxy.hypernetes.io"}, true},
		{3, "pods/proxy by an operator", connect(admin, web+"/pods/web/proxy/"), "port-forward", []string{vap + "proxy.hypernetes.io"}, true},
		{3, "services/proxy", connect(ann, web+"/services/web/proxy/"), "port-forward", []string{vap + "proxy.hypernetes.io"}, true},
		{3, "nodes/proxy", connect(ann, "/api/v1/nodes/ghost/proxy/pods"), "nodes/proxy of ghost", []string{vap + "node-proxy.hypernetes.io"}, true},
		{3, "Network on the nodes' addresses", post(ann, home+"/networks", network("evil", `{"subnets":{"a":{"cidr":"100.64.0.0/24"}}}`)), "100.64.0.0/24", []string{webhook}, false},
		{3, "Network on the Services' addresses", post(ann, home+"/networks", network("evil", `{"subnets":{"a":{"cidr":"10.96.0.0/16"}}}`)), "Service range", []string{webhook}, false},
		{3, "Network routed to the nodes", post(ann, home+"/networks", network("evil", `{"hostAccess":"Routed","subnets":{"a":{"cidr":"10.7.0.0/16"}}}`)), "spec.hostAccess: Routed", []string{webhook}, false},
		{3, "endpoint on a node", post(ann, slice, endpoints("100.64.0.1")), "100.64.0.1", []string{vap + "endpoints.hypernetes.io"}, true},
		{3, "endpoint on a Service", post(ann, slice, endpoints("10.96.0.1")), "10.96.0.1", []string{vap + "endpoints.hypernetes.io"}, true},
		{3, "Endpoints on a node, mirrored", post(ann, web+"/endpoints", `{"apiVersion":"v1","kind":"Endpoints","metadata":{"name":"web"},"subsets":[{"addresses":[{"ip":"100.64.0.1"}],"ports":[{"port":1}]}]}`), "100.64.0.1", []string{vap + "endpoints.hypernetes.io"}, true},
		{3, "volume the node mounts from a chosen address", post(ann, web+"/pods", tenantPod(func(p *corev1.Pod) {
			p.Spec.Volumes = []corev1.Volume{{Name: "v", VolumeSource: corev1.VolumeSource{NFS: &corev1.NFSVolumeSource{Server: "100.64.0.1", Path: "/"}}}}
		})), "spec.volumes: v", pods, false},
		{3, "volume of a driver that is the operator's", post(ann, web+"/pods", tenantPod(inline("cinder.csi.openstack.org"))), "spec.volumes: v: csi", pods, false},

		// 4: CVE-2020-8554.
		{4, "externalIPs of the world", post(ann, web+"/services", service(`{"externalIPs":["8.8.8.8"],"ports":[{"port":53}]}`)), "spec.externalIPs: 8.8.8.8", services, true},
		{4, "externalIPs of a neighbour's VIP", post(ann, web+"/services", service(`{"externalIPs":["198.51.100.7"],"ports":[{"port":80}]}`)), "spec.externalIPs: 198.51.100.7", services, true},
		{4, "externalIPs added later", patch(ann, web+"/services/web", `{"spec":{"externalIPs":["8.8.8.8"]}}`), "spec.externalIPs", services, true},
		{4, "load balancer status", patch(ann, web+"/services/lb/status", `{"status":{"loadBalancer":{"ingress":[{"ip":"198.51.100.7"}]}}}`), "status.loadBalancer", []string{vap + "services-status.hypernetes.io"}, true},
		{4, "load balancer status by a node", patch(node, web+"/services/lb/status", `{"status":{"loadBalancer":{"ingress":[{"ip":"198.51.100.7"}]}}}`), "status.loadBalancer", []string{vap + "services-status.hypernetes.io"}, true},
		{4, "NodePort", post(ann, web+"/services", service(`{"type":"NodePort","ports":[{"port":80}]}`)), "spec.type: NodePort", services, true},
		{4, "node port of a load balancer", post(ann, web+"/services", service(`{"type":"LoadBalancer","ports":[{"port":80,"nodePort":30080}]}`)), "spec.ports[].nodePort: 30080", services, true},
		{4, "somebody else's load balancer", post(ann, web+"/services", service(`{"type":"LoadBalancer","loadBalancerClass":"cloud.example/lb","ports":[{"port":80}]}`)), "spec.loadBalancerClass: cloud.example/lb", services, true},
		{4, "Service given to kube-proxy", func(ctx context.Context, w *world) error {
			s := &corev1.Service{ObjectMeta: metav1.ObjectMeta{Name: "web", Namespace: "blue-web"}}
			label := client.RawPatch(types.MergePatchType, []byte(`{"metadata":{"labels":{"service.kubernetes.io/service-proxy-name":"other"}}}`))
			if err := w.ann.Patch(ctx, s, label, client.DryRunAll); err != nil {
				return err
			}
			if s.Labels[v1alpha1.LabelServiceProxy] == v1alpha1.ServiceProxy {
				return errors.New("denied: service-proxy-name was put back")
			}
			return nil
		}, "service-proxy-name",
			[]string{vap + "services.hypernetes.io", "MutatingAdmissionPolicyBinding/services.hypernetes.io"}, true},
		{4, "Service given to kube-proxy through its status", patch(controller, web+"/services/web/status", `{"metadata":{"labels":{"service.kubernetes.io/service-proxy-name":null}}}`), "service-proxy-name", services, true},

		// 6: another tenant's network, by the namespace.
		{6, "a Namespace of one's own", post(ann, "/api/v1/namespaces", `{"apiVersion":"v1","kind":"Namespace","metadata":{"name":"evil"}}`), "TenantNamespace", namespaces, true},
		{6, "joining by label (CVE-2024-39690)", patch(ann, "/api/v1/namespaces/plain", `{"metadata":{"labels":{"hypernetes.io/tenant":"red"}}}`), "Namespaces", namespaces, true},
		{6, "joining by label, a deputy", patch(deputy, "/api/v1/namespaces/plain", `{"metadata":{"labels":{"hypernetes.io/tenant":"red"}}}`), "hypernetes.io/tenant", namespaces, true},
		{6, "another Network by label, a deputy", patch(deputy, "/api/v1/namespaces/blue-web", `{"metadata":{"labels":{"hypernetes.io/network":"other"}}}`), "hypernetes.io/network", namespaces, true},
		{6, "leaving by label, a deputy", patch(deputy, "/api/v1/namespaces/blue-web", `{"metadata":{"labels":{"hypernetes.io/tenant":null}}}`), "hypernetes.io/tenant", namespaces, true},
		{6, "labels through namespaces/status (GHSA-2ww6-hf35-mfjm)", patch(deputy, "/api/v1/namespaces/plain/status", `{"metadata":{"labels":{"hypernetes.io/tenant":"red"}}}`), "hypernetes.io/tenant", namespaces, true},
		{6, "labels through namespaces/finalize (GHSA-2ww6-hf35-mfjm)", finalize(deputy, "plain", `"hypernetes.io/tenant":"red"`), "hypernetes.io/tenant", namespaces, true},
		{6, "owner of a namespace (CVE-2024-39690)", patch(deputy, "/api/v1/namespaces/red-web", `{"metadata":{"ownerReferences":[{"apiVersion":"hypernetes.io/v1alpha1","kind":"Tenant","name":"blue","uid":"x"}]}}`), "ownerReferences", namespaces, true},
		{6, "adoption of a namespace (CVE-2022-46167)", patch(deputy, "/api/v1/namespaces/plain", `{"metadata":{"ownerReferences":[{"apiVersion":"hypernetes.io/v1alpha1","kind":"Tenant","name":"blue","uid":"x"}]}}`), "ownerReferences", namespaces, true},
		{6, "weaker Pod Security by label", patch(deputy, "/api/v1/namespaces/blue-web", `{"metadata":{"labels":{"pod-security.kubernetes.io/enforce":"baseline"}}}`), "pod-security", namespaces, true},
		{6, "annotations of a Namespace (CVE-2025-55205)", patch(deputy, "/api/v1/namespaces/plain", `{"metadata":{"annotations":{"hypernetes.io/tenant":"red"}}}`), "hypernetes.io/tenant", namespaces, true},
		{6, "deletion of a neighbour's Namespace", remove(deputy, "/api/v1/namespaces/red-web"), "TenantNamespace", namespaces, true},
		{6, "a neighbour's namespace by TenantNamespace (CVE-2026-22872)", post(ann, home+"/tenantnamespaces", `{"apiVersion":"hypernetes.io/v1alpha1","kind":"TenantNamespace","metadata":{"name":"red-web"},"spec":{"network":"default"}}`), "the name is taken", []string{webhook}, false},
		{6, "binding said to be done", patch(ann, home+"/tenantnamespaces/blue-web/status", `{"status":{"phase":"Bound","networkUID":"x"}}`), "status of tenantnamespaces", []string{vap + "status.hypernetes.io"}, true},
		{6, "VNI of a neighbour", patch(ann, home+"/networks/default/status", `{"status":{"vni":4097}}`), "status of networks", []string{vap + "status.hypernetes.io"}, true},
		{6, "VNI of a neighbour, by a node", patch(kubestack, home+"/networks/default/status", `{"status":{"vni":4097}}`), "status of networks", []string{vap + "status.hypernetes.io"}, true},
		{6, "Network of another tenant", post(ann, home+"/networks", network("evil", `{"tenantID":"red","subnets":{"a":{"cidr":"10.7.0.0/16"}}}`)), "spec.tenantID: red", []string{webhook}, false},
		{6, "Network outside a home namespace", post(ann, "/apis/hypernetes.io/v1alpha1/namespaces/blue-web/networks", network("evil", `{"subnets":{"a":{"cidr":"10.7.0.0/16"}}}`)), "metadata.namespace", []string{webhook}, false},
		{6, "Pods in the home namespace, in no Network", post(ann, "/api/v1/namespaces/tenant-blue/pods", func() any {
			p := tenantPod(func(p *corev1.Pod) { p.Namespace = "tenant-blue" })
			return p
		}()), "home namespace", pods, false},
		{6, "RuntimeClass of others", post(ann, web+"/pods", tenantPod(func(p *corev1.Pod) { p.Spec.RuntimeClassName = new("other") })), "spec.runtimeClassName: other", []string{mutating, vap + "runtime-classes.hypernetes.io"}, false},
		{6, "host network", post(ann, web+"/pods", tenantPod(func(p *corev1.Pod) { p.Spec.HostNetwork = true })), "spec.hostNetwork", pods, false},
		{6, "host path", post(ann, web+"/pods", tenantPod(func(p *corev1.Pod) {
			p.Spec.Volumes = []corev1.Volume{{Name: "v", VolumeSource: corev1.VolumeSource{HostPath: &corev1.HostPathVolumeSource{Path: "/"}}}}
		})), "hostPath", pods, false},
		{6, "privileged without a VM", post(ann, web+"/pods", tenantPod(func(p *corev1.Pod) {
			p.Spec.RuntimeClassName = new("runc")
			p.Spec.Containers[0].SecurityContext = &corev1.SecurityContext{Privileged: new(true)}
		})), "VM around the Pod", pods, false},
		{6, "privileged debugging without a VM", patch(ann, web+"/pods/plain/ephemeralcontainers", `{"spec":{"ephemeralContainers":[{"name":"d","image":"x","securityContext":{"privileged":true}}]}}`), "VM around the Pod", pods, true},

		// 7: what a Pod says about itself, and what a node says about others.
		{7, "address by annotation, later", patch(ann, web+"/pods/web", `{"metadata":{"annotations":{"hypernetes.io/address":"10.0.0.1"}}}`), "hypernetes.io/address", []string{vap + "annotations.hypernetes.io"}, true},
		{7, "Networks by annotation, later", patch(ann, web+"/pods/web", `{"metadata":{"annotations":{"hypernetes.io/networks":"[]"}}}`), "hypernetes.io/networks", []string{vap + "annotations.hypernetes.io"}, true},
		{7, "annotation taken off", patch(ann, web+"/pods/web", `{"metadata":{"annotations":{"hypernetes.io/address":null}}}`), "hypernetes.io/address", []string{vap + "annotations.hypernetes.io"}, true},
		{7, "annotation through pods/status, by a node", patch(deputy, web+"/pods/web/status", `{"metadata":{"annotations":{"hypernetes.io/address":"10.0.0.1"}}}`), "", []string{vap + "annotations.hypernetes.io", vap + "pods-status.hypernetes.io"}, true},
		{7, "address of a neighbour in pods/status", patch(ann, web+"/pods/web/status", `{"status":{"podIP":"10.0.0.77","podIPs":[{"ip":"10.0.0.77"}]}}`), "status of pod web", []string{vap + "pods-status.hypernetes.io"}, true},
		{7, "Network of another tenant by annotation", post(ann, web+"/pods", tenantPod(func(p *corev1.Pod) {
			p.Annotations = map[string]string{v1alpha1.AnnotationNetworks: `[{"name":"red-net"}]`}
		})), "no Network of that name", []string{webhook}, false},
		{7, "node chosen by the Pod", post(ann, web+"/pods", tenantPod(func(p *corev1.Pod) { p.Spec.NodeName = "n1" })), "spec.nodeName", pods, false},
		{7, "node chosen by a binding", func(ctx context.Context, w *world) error {
			return send(ctx, w.ann, "POST", web+"/pods/web/binding", `{"apiVersion":"v1","kind":"Binding","metadata":{"name":"web"},"target":{"kind":"Node","name":"n1"}}`)
		}, "scheduler", []string{vap + "binding.hypernetes.io"}, true},
		{7, "Port plugged on a node by a tenant", post(ann, home+"/ports", claim("10.0.0.30", func(p *v1alpha1.Port) { p.Spec.Node = "n1" })), "spec.node, spec.pod", ports, false},
		{7, "Port taken from a Pod by a tenant", patch(ann, home+"/ports/default.10-0-0-20", `{"spec":{"pod":null,"node":null}}`), "spec.node, spec.pod", ports, false},
		{7, "Port of a Pod deleted by a tenant", remove(ann, home+"/ports/default.10-0-0-20"), "blue-web/web", ports, false},
		{7, "Port for another node", post(kubestack, home+"/ports", claim("10.0.0.31", func(p *v1alpha1.Port) {
			p.Spec.Node, p.Spec.Pod = "n2", &v1alpha1.PodRef{Namespace: "blue-web", Name: "web", UID: "u"}
		})), "node n1", ports, true},
		{7, "Port taken from another node", patch(kubestack, home+"/ports/default.10-0-0-21", `{"spec":{"node":"n1"}}`), "node n1", ports, true},
		{7, "Port of another node deleted", remove(kubestack, home+"/ports/default.10-0-0-21"), "node n1", ports, true},
		{7, "status of another node's Port", patch(kubestack, home+"/ports/default.10-0-0-21/status", `{"status":{"phase":"Failed"}}`), "status of ports", []string{vap + "status.hypernetes.io"}, true},
		{7, "volume of a node deleted", remove(ann, own+"/localvolumes/v1"), "PersistentVolumeClaim", volumes, true},
		{7, "volume made by hand", post(deputy, own+"/localvolumes", localVolume("v3", "n1")), "PersistentVolumeClaim", volumes, true},
		{7, "status of another node's volume", patch(csiNode, own+"/localvolumes/v2/status", `{"status":{"phase":"Failed"}}`), "own node", volumes, true},
		{7, "another node's volume let go", patch(csiNode, own+"/localvolumes/v2", `{"metadata":{"finalizers":[]}}`), "own node", volumes, true},
		{7, "volume deleted by its node", remove(csiNode, own+"/localvolumes/v1"), "keeper", volumes, true},
		{7, "volume grown by its node", patch(csiNode, own+"/localvolumes/v1", `{"spec":{"sizeBytes":2097152}}`), "spec", volumes, true},
		{7, "room of another node", patch(csiNode, own+"/localstores/n2/status", `{"status":{"availableBytes":1}}`), "own node", volumes, true},
		{7, "status of a volume by its keeper", patch(keeper, own+"/localvolumes/v1/status", `{"status":{"phase":"Ready"}}`), "status", volumes, true},
		{7, "a Port's port at the provider, by its node", patch(kubestack, home+"/ports/default.10-0-0-20/status", `{"status":{"providerPortID":"60f43890-b711-45b5-87d1-8a6e1181473d"}}`), "providerPortID", []string{vap + "status.hypernetes.io"}, true},

		// 12: identities.
		{12, "certificate of a group of the cluster", post(ann, csrs, certificate(t, "kubernetes.io/kube-apiserver-client", "blue:ann", "system:nodes")), "system:nodes", []string{webhook}, false},
		{12, "certificate of another tenant", post(ann, csrs, certificate(t, "kubernetes.io/kube-apiserver-client", "blue:bob", "h8s:tenant:red:manager")), "h8s:tenant:red:manager", []string{webhook}, false},
		{12, "certificate of our controller", post(ann, csrs, certificate(t, "kubernetes.io/kube-apiserver-client", "h8s:controller", "h8s:controllers")), "common name", []string{webhook}, false},
		{12, "certificate of a kubelet", post(ann, csrs, certificate(t, "kubernetes.io/kube-apiserver-client-kubelet", "system:node:n1", "system:nodes")), "signer", []string{webhook, vap + "certificates.hypernetes.io"}, false},
		{12, "rights for everybody", post(ann, rbac, binding("Group", "system:authenticated")), "subjects: system:authenticated", []string{vap + "rolebindings.hypernetes.io"}, true},
		{12, "rights for the anonymous", post(ann, rbac, binding("User", "system:anonymous")), "subjects: system:anonymous", []string{vap + "rolebindings.hypernetes.io"}, true},
		{12, "rights for another tenant", post(ann, rbac, binding("Group", "h8s:tenant:red:member")), "subjects: h8s:tenant:red:member", []string{vap + "rolebindings.hypernetes.io"}, true},

		// 14: addresses.
		{14, "the gateway's address", post(ann, home+"/ports", claim("10.0.0.1", func(*v1alpha1.Port) {})), "gateway", []string{webhook}, false},
		{14, "an address outside", post(ann, home+"/ports", claim("192.0.2.1", func(*v1alpha1.Port) {})), "outside Network default", []string{webhook}, false},
		{14, "the broadcast address", post(ann, home+"/ports", claim("10.0.255.255", func(*v1alpha1.Port) {})), "broadcast", []string{webhook}, false},
		{14, "a multicast MAC address", post(ann, home+"/ports", claim("10.0.0.32", func(p *v1alpha1.Port) { p.Spec.MAC = "01:00:5e:00:00:01" })), "spec.mac: 01:00:5e:00:00:01", ports, false},
		{14, "a vendor's MAC address", post(ann, home+"/ports", claim("10.0.0.33", func(p *v1alpha1.Port) { p.Spec.MAC = "00:16:3e:00:00:01" })), "spec.mac", ports, false},
		{14, "the gateway by annotation", post(ann, web+"/pods", tenantPod(func(p *corev1.Pod) {
			p.Annotations = map[string]string{v1alpha1.AnnotationAddress: "10.0.0.1"}
		})), "gateway", []string{webhook}, false},
		{14, "numbers not given back", patch(ann, home+"/networks/default", `{"metadata":{"finalizers":null}}`), "metadata.finalizers", []string{vap + "finalizers.hypernetes.io"}, false},
		{14, "a Network in use deleted", remove(ann, home+"/networks/default"), "namespace blue-web", []string{webhook}, false},
	}
}

func portNumber(n int) intstr.IntOrString { return intstr.FromInt(n) }

// finalize replaces a Namespace through its finalize subresource, with a label more.
func finalize(u func(*world) user, name, label string) func(context.Context, *world) error {
	return func(ctx context.Context, w *world) error {
		return send(ctx, u(w), "PUT", "/api/v1/namespaces/"+name+"/finalize",
			fmt.Sprintf(`{"apiVersion":"v1","kind":"Namespace","metadata":{"name":%q,"labels":{"kubernetes.io/metadata.name":%q,%s}},"spec":{"finalizers":["kubernetes"]}}`, name, name, label))
	}
}

func TestAttacks(t *testing.T) {
	w := newWorld(t)
	all := attacks(t)
	ctx := t.Context()
	w.start(t)
	// Policies first, webhooks last; the last attack of each is refused once all are there.
	if !t.Run("defended", func(t *testing.T) {
		for _, a := range all {
			t.Run(fmt.Sprintf("%d/%s", a.number, a.name), func(t *testing.T) {
				eventually(t, "not refused", func() error { return refused(a.try(ctx, w), a.says) })
			})
		}
	}) {
		t.Log("some attack was not refused")
	}
	t.Run("allowed", w.allowed)
	t.Run("repaired", w.repaired)
	w.stop()
	t.Run("controller away", func(t *testing.T) {
		for _, a := range all {
			if !a.alone {
				continue
			}
			t.Run(fmt.Sprintf("%d/%s", a.number, a.name), func(t *testing.T) {
				if err := refused(a.try(ctx, w), a.says); err != nil {
					t.Error(err)
				}
			})
		}
		// What only the webhook can decide is refused altogether.
		for _, f := range []func(context.Context, *world) error{
			post(ann, home+"/networks", network("fine", `{"subnets":{"a":{"cidr":"10.7.0.0/16"}}}`)),
			post(ann, web+"/pods", tenantPod(func(*corev1.Pod) {})),
		} {
			if err := f(ctx, w); err == nil || !strings.Contains(err.Error(), "failed calling webhook") {
				t.Errorf("without the webhook: %v", err)
			}
		}
		// The default network goes on.
		p := pod("p", func(p *corev1.Pod) { p.Namespace, p.APIVersion, p.Kind = "plain", "v1", "Pod" })
		if err := post(admin, "/api/v1/namespaces/plain/pods", p)(ctx, w); err != nil {
			t.Errorf("a Pod of the default network: %v", err)
		}
		// Nor do nodes wait for a controller.
		if err := post(kubestack, home+"/ports", claim("10.0.0.40", func(p *v1alpha1.Port) {
			p.Spec.Node, p.Spec.Retain, p.Spec.Pod = "n1", false, &v1alpha1.PodRef{Namespace: "blue-web", Name: "web", UID: "u"}
		}))(ctx, w); err != nil {
			t.Errorf("a node's claim: %v", err)
		}
	})
	t.Run("undefended", func(t *testing.T) {
		// The webhook is away and would refuse everything: its part of the defence goes with its
		// configuration.
		w.off(t, webhook)
		w.off(t, mutating)
		for _, a := range all {
			t.Run(fmt.Sprintf("%d/%s", a.number, a.name), func(t *testing.T) {
				for _, d := range a.defences {
					if d != webhook && d != mutating {
						defer w.off(t, d)()
					}
				}
				eventually(t, "without its defence it does not go through, so this proves nothing", func() error { return a.try(ctx, w) })
			})
		}
	})
}
