package api

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"

	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	eventsv1 "k8s.io/api/events/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"sigs.k8s.io/controller-runtime/pkg/client"

	v1alpha1 "github.com/hypernetes/hypernetes/api/hypernetes/v1alpha1"
)

// allowed is what must not be refused: a policy that refuses everything defends nothing.
func (w *world) allowed(t *testing.T) {
	ctx := t.Context()
	for _, tt := range []struct {
		name string
		try  func(context.Context, *world) error
	}{
		{"a Pod", post(ann, web+"/pods", tenantPod(func(*corev1.Pod) {}))},
		{"a Pod with an exec probe and runc", post(ann, web+"/pods", tenantPod(func(p *corev1.Pod) {
			p.Spec.RuntimeClassName = new("runc")
			p.Spec.Containers[0].LivenessProbe = &corev1.Probe{ProbeHandler: corev1.ProbeHandler{Exec: &corev1.ExecAction{Command: []string{"true"}}}}
		}))},
		{"privileged in its VM", post(ann, web+"/pods", tenantPod(func(p *corev1.Pod) {
			p.Spec.Containers[0].SecurityContext = &corev1.SecurityContext{Privileged: new(true)}
		}))},
		{"a Pod with a volume of its own", post(ann, web+"/pods", tenantPod(inline("block.hypernetes.io")))},
		{"a Pod with an address", post(ann, web+"/pods", tenantPod(func(p *corev1.Pod) {
			p.Annotations = map[string]string{v1alpha1.AnnotationAddress: "10.0.0.50", v1alpha1.AnnotationNetworks: `[{"name":"default"}]`}
		}))},
		{"a Pod with a Port", post(ann, web+"/pods", tenantPod(func(p *corev1.Pod) {
			p.Annotations = map[string]string{v1alpha1.AnnotationAddress: "port/default.10-0-0-22"}
		}))},
		{"a Service", post(ann, web+"/services", service(`{"ports":[{"port":80}]}`))},
		{"endpoints in the Network", post(ann, slice, endpoints("10.0.0.50"))},
		{"endpoints of the endpoint controller", post(kcm, slice, strings.Replace(endpoints("10.0.0.50"), `"labels":{`, `"labels":{"endpointslice.kubernetes.io/managed-by":"endpointslice-controller.k8s.io",`, 1))},
		{"a Network", post(ann, home+"/networks", network("net2", `{"tenantID":"blue","subnets":{"a":{"cidr":"192.168.0.0/24","gateway":"192.168.0.1"}}}`))},
		{"a Network routed by an operator", post(admin, home+"/networks", network("net2", `{"hostAccess":"Routed","subnets":{"a":{"cidr":"192.168.0.0/24"}}}`))},
		{"a TenantNamespace of a Network to come", post(ann, home+"/tenantnamespaces", `{"apiVersion":"hypernetes.io/v1alpha1","kind":"TenantNamespace","metadata":{"name":"ns1"},"spec":{"network":"net1"}}`)},
		{"a Port", post(ann, home+"/ports", claim("10.0.0.51", func(p *v1alpha1.Port) { p.Spec.MAC = "02:00:00:00:00:01" }))},
		{"a Port's end", remove(ann, home+"/ports/default.10-0-0-22")},
		{"a node takes a Port", patch(kubestack, home+"/ports/default.10-0-0-22", `{"spec":{"node":"n1","pod":{"namespace":"blue-web","name":"w","uid":"u","sandbox":"s","interface":"eth0"}}}`)},
		{"a node releases a Port", patch(kubestack, home+"/ports/default.10-0-0-20", `{"spec":{"node":null,"pod":null}}`)},
		{"a node deletes a Port", remove(kubestack, home+"/ports/default.10-0-0-20")},
		{"a node says a Port is active", patch(kubestack, home+"/ports/default.10-0-0-20/status", `{"status":{"phase":"Active"}}`)},
		{"the keeper makes a volume", post(keeper, own+"/localvolumes", localVolume("v3", "n1"))},
		{"the keeper grows a volume", patch(keeper, own+"/localvolumes/v1", `{"spec":{"sizeBytes":2097152}}`)},
		{"the keeper deletes a volume", remove(keeper, own+"/localvolumes/v1")},
		{"a node says a volume is ready", patch(csiNode, own+"/localvolumes/v1/status", `{"status":{"phase":"Ready","sizeBytes":1048576}}`)},
		{"a node lets a volume go", patch(csiNode, own+"/localvolumes/v1", `{"metadata":{"finalizers":[]}}`)},
		{"a node says what it has", post(csiNode, own+"/localstores", `{"apiVersion":"hypernetes.io/v1alpha1","kind":"LocalStore","metadata":{"name":"n1"}}`)},
		{"an operator deletes a volume", remove(admin, own+"/localvolumes/v2")},
		{"the controller makes a Namespace", post(controller, "/api/v1/namespaces", `{"apiVersion":"v1","kind":"Namespace","metadata":{"name":"ns1","labels":{"hypernetes.io/tenant":"blue"}}}`)},
		{"the controller gives an address", patch(controller, web+"/services/lb/status", `{"status":{"loadBalancer":{"ingress":[{"ip":"198.51.100.7"}]}}}`)},
		{"the controller's status", patch(controller, home+"/networks/default/status", `{"status":{"vni":4097}}`)},
		{"labels of others", patch(deputy, "/api/v1/namespaces/plain", `{"metadata":{"labels":{"team":"x"}}}`)},
		{"rights for a member", post(ann, rbac, binding("Group", "h8s:tenant:blue:member"))},
		{"rights for a user", post(ann, rbac, binding("User", "blue:bob"))},
		{"rights for service accounts", post(ann, rbac, binding("Group", "system:serviceaccounts:blue-web"))},
		{"a colleague's certificate", post(ann, csrs, certificate(t, "kubernetes.io/kube-apiserver-client", "blue:bob", "h8s:tenant:blue:member"))},
		{"a Service elsewhere with a node port", post(admin, "/api/v1/namespaces/plain/services", service(`{"type":"NodePort","ports":[{"port":80}]}`))},
	} {
		t.Run(tt.name, func(t *testing.T) {
			if err := tt.try(ctx, w); err != nil {
				t.Error(err)
			}
		})
	}
	t.Run("changed", w.changed)
	t.Run("injected", w.injected)
	t.Run("quota", func(t *testing.T) {
		for i := range 2 {
			n := &v1alpha1.Network{ObjectMeta: metav1.ObjectMeta{Name: fmt.Sprintf("more%d", i), Namespace: "tenant-blue"},
				Spec: v1alpha1.NetworkSpec{Subnets: map[string]v1alpha1.Subnet{"a": {CIDR: "10.9.0.0/24"}}}}
			if err := w.ann.Create(ctx, n); err != nil {
				t.Fatal(err)
			}
			defer w.admin.Delete(context.WithoutCancel(ctx), n)
		}
		eventually(t, "a fourth Network", func() error {
			return refused(post(ann, home+"/networks", network("net4", `{"subnets":{"a":{"cidr":"10.7.0.0/16"}}}`))(ctx, w), "3 of 3 Networks used")
		})
	})
}

// changed is what admission writes into objects.
func (w *world) changed(t *testing.T) {
	ctx := t.Context()
	p := pod("shaped", func(p *corev1.Pod) {
		p.Spec.Containers[0].LivenessProbe = &corev1.Probe{ProbeHandler: corev1.ProbeHandler{TCPSocket: &corev1.TCPSocketAction{Port: portNumber(80)}}}
	})
	if err := w.ann.Create(ctx, p, client.DryRunAll); err != nil {
		t.Fatal(err)
	}
	if p.Spec.RuntimeClassName == nil || *p.Spec.RuntimeClassName != "hyper-large" {
		t.Errorf("runtimeClassName %v, want the tenant's first", p.Spec.RuntimeClassName)
	}
	if probe := p.Spec.Containers[0].LivenessProbe; probe.TCPSocket != nil || probe.Exec == nil || probe.Exec.Command[0] != "/.h8s/probe" {
		t.Errorf("probe %+v", probe)
	}
	s := &corev1.Service{ObjectMeta: metav1.ObjectMeta{Name: "new", Namespace: "blue-web"}, Spec: corev1.ServiceSpec{Type: corev1.ServiceTypeLoadBalancer, Ports: []corev1.ServicePort{{Port: 80}}}}
	if err := w.ann.Create(ctx, s, client.DryRunAll); err != nil {
		t.Fatal(err)
	}
	if s.Labels[v1alpha1.LabelServiceProxy] != v1alpha1.ServiceProxy || s.Spec.AllocateLoadBalancerNodePorts == nil || *s.Spec.AllocateLoadBalancerNodePorts || s.Spec.Ports[0].NodePort != 0 {
		t.Errorf("service %v %+v", s.Labels, s.Spec)
	}
	claimed := port("10.0.0.60", func(*v1alpha1.Port) {})
	if err := w.ann.Create(ctx, claimed, client.DryRunAll); err != nil {
		t.Fatal(err)
	}
	if claimed.Labels[v1alpha1.LabelNetwork] != "default" {
		t.Errorf("labels of a Port: %v", claimed.Labels)
	}
}

const fragment = `containers:
- name: logging-agent
  image: h8s.local/logtail:1
  livenessProbe: {httpGet: {port: 8080}}
  volumeMounts: [{name: varlog, mountPath: /var/log}]
volumes:
- name: varlog
  emptyDir: {}
`

func (w *world) injected(t *testing.T) {
	ctx := t.Context()
	for _, namespace := range []string{"blue-web", "plain"} {
		t.Run(namespace, func(t *testing.T) {
			set := w.deployment(t, namespace, "hello", map[string]string{"initializer.kubernetes.io/logging-agent": "true"})
			config := &corev1.ConfigMap{ObjectMeta: metav1.ObjectMeta{Name: "logging-agent-initializer", Namespace: namespace}, Data: map[string]string{"config": fragment}}
			if err := w.admin.Create(ctx, config); err != nil {
				t.Fatal(err)
			}
			create := func() *corev1.Pod {
				p := pod("", func(p *corev1.Pod) {
					p.Namespace, p.GenerateName = namespace, "hello-"
					p.OwnerReferences = []metav1.OwnerReference{*metav1.NewControllerRef(set, appsv1.SchemeGroupVersion.WithKind("ReplicaSet"))}
				})
				if err := w.admin.Create(ctx, p); err != nil {
					t.Fatal(err)
				}
				return p
			}
			p := create()
			if len(p.Spec.Containers) != 2 || !slices.ContainsFunc(p.Spec.Volumes, func(v corev1.Volume) bool { return v.Name == "varlog" }) {
				t.Fatalf("not injected: %+v", p.Spec)
			}
			// The injected container is a container like others.
			if namespace == "blue-web" && p.Spec.Containers[1].LivenessProbe.Exec == nil {
				t.Errorf("the injected probe is dialled by the node: %+v", p.Spec.Containers[1].LivenessProbe)
			}

			config.Data["config"] = "containers: [{name: logging-agent, img: x}]"
			if err := w.admin.Update(ctx, config); err != nil {
				t.Fatal(err)
			}
			if p := create(); len(p.Spec.Containers) != 1 {
				t.Errorf("a malformed configuration was injected: %+v", p.Spec)
			}
			eventually(t, "event on the Deployment", func() error {
				var l eventsv1.EventList
				if err := w.admin.List(ctx, &l, client.InNamespace(namespace)); err != nil {
					return err
				}
				for _, e := range l.Items {
					if e.Reason == "InjectionFailed" && e.Type == corev1.EventTypeWarning && e.Regarding.Kind == "Deployment" && e.Regarding.Name == "hello" && strings.Contains(e.Note, "img") {
						return nil
					}
				}
				return fmt.Errorf("none among %d", len(l.Items))
			})

			// What is injected has no more rights than what is written.
			if namespace == "blue-web" {
				config.Data["config"] = "containers: [{name: a, image: b, volumeMounts: [{name: v, mountPath: /v}]}]\nvolumes: [{name: v, hostPath: {path: /}}]\n"
				if err := w.admin.Update(ctx, config); err != nil {
					t.Fatal(err)
				}
				err := w.admin.Create(ctx, pod("", func(p *corev1.Pod) {
					p.GenerateName = "hello-"
					p.OwnerReferences = []metav1.OwnerReference{*metav1.NewControllerRef(set, appsv1.SchemeGroupVersion.WithKind("ReplicaSet"))}
				}))
				if err := refused(err, "hostPath"); err != nil {
					t.Error(err)
				}
			}
		})
	}
}

// deployment makes a Deployment and its ReplicaSet, as the controllers would.
func (w *world) deployment(t *testing.T, namespace, name string, annotations map[string]string) *appsv1.ReplicaSet {
	labels := map[string]string{"app": name}
	template := corev1.PodTemplateSpec{ObjectMeta: metav1.ObjectMeta{Labels: labels}, Spec: pod("", func(*corev1.Pod) {}).Spec}
	d := &appsv1.Deployment{ObjectMeta: metav1.ObjectMeta{Name: name, Namespace: namespace, Annotations: annotations},
		Spec: appsv1.DeploymentSpec{Selector: &metav1.LabelSelector{MatchLabels: labels}, Template: template}}
	if err := w.admin.Create(t.Context(), d); err != nil {
		t.Fatal(err)
	}
	s := &appsv1.ReplicaSet{ObjectMeta: metav1.ObjectMeta{Name: name + "-1", Namespace: namespace,
		OwnerReferences: []metav1.OwnerReference{*metav1.NewControllerRef(d, appsv1.SchemeGroupVersion.WithKind("Deployment"))}},
		Spec: appsv1.ReplicaSetSpec{Selector: &metav1.LabelSelector{MatchLabels: labels}, Template: template}}
	if err := w.admin.Create(t.Context(), s); err != nil {
		t.Fatal(err)
	}
	return s
}

// repaired: a defence that somebody deletes or weakens comes back.
func (w *world) repaired(t *testing.T) {
	ctx := t.Context()
	get := func(kind, name string) (*unstructured.Unstructured, error) {
		u := &unstructured.Unstructured{}
		u.SetAPIVersion("admissionregistration.k8s.io/v1")
		u.SetKind(kind)
		return u, w.admin.Get(ctx, client.ObjectKey{Name: name}, u)
	}
	for _, kind := range []string{"ValidatingAdmissionPolicy", "ValidatingAdmissionPolicyBinding", "MutatingAdmissionPolicy", "MutatingAdmissionPolicyBinding"} {
		u, err := get(kind, "services.hypernetes.io")
		if err != nil {
			t.Fatal(err)
		}
		if err := w.admin.Delete(ctx, u); err != nil {
			t.Fatal(err)
		}
		eventually(t, kind+" deleted", func() error { _, err := get(kind, "services.hypernetes.io"); return err })
	}
	u, err := get("ValidatingWebhookConfiguration", "hypernetes.io")
	if err != nil {
		t.Fatal(err)
	}
	if err := w.admin.Delete(ctx, u); err != nil {
		t.Fatal(err)
	}
	eventually(t, "webhook deleted", func() error { _, err := get("ValidatingWebhookConfiguration", "hypernetes.io"); return err })

	// A condition that never holds turns a policy off without deleting anything.
	u, err = get("ValidatingAdmissionPolicy", "proxy.hypernetes.io")
	if err != nil {
		t.Fatal(err)
	}
	b, err := json.Marshal(map[string]any{"spec": map[string]any{"matchConditions": []any{map[string]any{"name": "never", "expression": "false"}}}})
	if err != nil {
		t.Fatal(err)
	}
	if err := w.admin.Patch(ctx, u, client.RawPatch("application/merge-patch+json", b)); err != nil {
		t.Fatal(err)
	}
	eventually(t, "policy weakened", func() error {
		u, err := get("ValidatingAdmissionPolicy", "proxy.hypernetes.io")
		if err != nil {
			return err
		}
		if _, found, _ := unstructured.NestedSlice(u.Object, "spec", "matchConditions"); found {
			return errors.New("it is still weak")
		}
		return nil
	})
	eventually(t, "policy in effect again", func() error {
		return refused(connect(ann, web+"/pods/web/proxy/")(ctx, w), "port-forward")
	})
}
