package controller

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"os"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/go-logr/logr"
	authorizationv1 "k8s.io/api/authorization/v1"
	coordinationv1 "k8s.io/api/coordination/v1"
	corev1 "k8s.io/api/core/v1"
	eventsv1 "k8s.io/api/events/v1"
	rbacv1 "k8s.io/api/rbac/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/api/meta"
	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/client-go/rest"
	"k8s.io/klog/v2"
	"k8s.io/utils/ptr"
	ctrl "sigs.k8s.io/controller-runtime"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/yaml"

	v1alpha1 "github.com/hypernetes/hypernetes/api/hypernetes/v1alpha1"
	"github.com/hypernetes/hypernetes/network/claim"
	"github.com/hypernetes/hypernetes/test/controlplane"
)

func TestMain(m *testing.M) {
	if os.Getenv(childWrites) != "" {
		if err := child(os.Args[1]); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		return
	}
	out := io.Discard
	if os.Getenv("H8S_TEST_LOG") != "" {
		out = os.Stderr
	}
	ctrl.SetLogger(logr.FromSlogHandler(slog.NewTextHandler(out, nil)))
	klog.SetSlogLogger(slog.New(slog.NewTextHandler(out, nil)))
	os.Exit(m.Run())
}

// cluster is an API server with the controllers, which have the rights that
// cluster/manifest gives them and no others.
type cluster struct {
	t     *testing.T
	cfg   *rest.Config
	admin client.Client
	stop  func()
	// patience is how long things may take; two minutes if less.
	patience time.Duration
	// options changes those the controllers run with.
	options func(*Options)
}

func start(t *testing.T) *cluster { return startWith(t, nil) }

func startWith(t *testing.T, options func(*Options)) *cluster {
	t.Helper()
	c := &cluster{t: t, cfg: controlplane.Start(t), options: options}
	var err error
	if c.admin, err = client.New(c.cfg, client.Options{Scheme: controlplane.Scheme()}); err != nil {
		t.Fatal(err)
	}
	c.rights()
	var wg sync.WaitGroup
	wg.Go(func() { c.finalizeNamespaces(t.Context()) })
	t.Cleanup(func() { c.stop(); wg.Wait() })
	c.run()
	return c
}

// rights are those of the cluster's own components, as nodes apply them.
func (c *cluster) rights() {
	c.t.Helper()
	text, err := os.ReadFile("../cluster/manifest/objects/tenancy.yaml")
	if err != nil {
		c.t.Fatal(err)
	}
	for _, doc := range strings.Split(string(text), "\n---\n") {
		o := &unstructured.Unstructured{}
		if err := yaml.Unmarshal([]byte(doc), o); err != nil {
			c.t.Fatal(err)
		}
		c.create(o)
	}
}

func testOptions() Options {
	return Options{
		ServiceCIDRs: "10.96.0.0/12,fd00:10:96::/108", ReservedCIDRs: "100.64.0.0/24", ClusterDomain: "cluster.local", FabricMTU: 1500,
		PortGrace: 500 * time.Millisecond, Retry: 500 * time.Millisecond, Sweep: 500 * time.Millisecond,
	}
}

// run starts the controllers; stop ends them.
func (c *cluster) run() {
	c.t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	cfg := controlplane.As(c.cfg, "h8s:controller", "h8s:controllers", "system:authenticated")
	address := controlplane.Address(c.t)
	if err := prepare(ctx, cfg); err != nil {
		c.t.Fatal(err)
	}
	o := testOptions()
	o.HealthAddress, o.LeaderElect = address, true
	if c.options != nil {
		c.options(&o)
	}
	m, err := New(ctx, cfg, o)
	if err != nil {
		c.t.Fatal(err)
	}
	var wg sync.WaitGroup
	wg.Go(func() {
		if err := m.Start(ctx); err != nil {
			c.t.Error(err)
		}
	})
	c.stop = sync.OnceFunc(func() { cancel(); wg.Wait() })
	for _, path := range []string{"/readyz", "/healthz", "/metrics"} {
		c.eventually(path, func() error {
			resp, err := http.Get("http://" + address + path)
			if err != nil {
				return err
			}
			defer resp.Body.Close()
			if body, _ := io.ReadAll(resp.Body); resp.StatusCode != http.StatusOK || len(body) == 0 {
				return fmt.Errorf("%s: %s", resp.Status, body)
			}
			return nil
		})
	}
}

// finalizeNamespaces does what Kubernetes' namespace controller does.
func (c *cluster) finalizeNamespaces(ctx context.Context) {
	for ctx.Err() == nil {
		list := &corev1.NamespaceList{}
		_ = c.admin.List(ctx, list)
		for i := range list.Items {
			ns := &list.Items[i]
			if ns.DeletionTimestamp.IsZero() || ns.Annotations["test/hold"] != "" {
				continue
			}
			for _, o := range []client.Object{&corev1.Pod{}, &corev1.Service{}, &rbacv1.RoleBinding{}, &corev1.ResourceQuota{}, &corev1.LimitRange{}} {
				_ = c.admin.DeleteAllOf(ctx, o, client.InNamespace(ns.Name), client.GracePeriodSeconds(0))
			}
			ns.Spec.Finalizers = nil
			_ = c.admin.SubResource("finalize").Update(ctx, ns)
		}
		select {
		case <-ctx.Done():
		case <-time.After(50 * time.Millisecond):
		}
	}
}

func (c *cluster) eventually(what string, f func() error) {
	c.t.Helper()
	deadline := time.Now().Add(max(c.patience, 2*time.Minute))
	for {
		err := f()
		if err == nil {
			return
		}
		if time.Now().After(deadline) {
			c.t.Fatalf("%s: %v", what, err)
		}
		time.Sleep(20 * time.Millisecond) // between two questions
	}
}

func (c *cluster) create(objs ...client.Object) {
	c.t.Helper()
	for _, o := range objs {
		if err := c.admin.Create(context.Background(), o); err != nil {
			c.t.Fatalf("%T %s: %v", o, o.GetName(), err)
		}
	}
}

func (c *cluster) get(o client.Object) error {
	return c.admin.Get(context.Background(), client.ObjectKeyFromObject(o), o)
}

// update changes an object, whoever else does.
func (c *cluster) update(o client.Object, f func()) {
	c.t.Helper()
	c.eventually("update "+o.GetName(), func() error {
		if err := c.get(o); err != nil {
			return err
		}
		f()
		return c.admin.Update(context.Background(), o)
	})
}

func (c *cluster) delete(objs ...client.Object) {
	c.t.Helper()
	for _, o := range objs {
		if err := c.admin.Delete(context.Background(), o, client.GracePeriodSeconds(0)); err != nil {
			c.t.Fatal(err)
		}
	}
}

func (c *cluster) gone(o client.Object) {
	c.t.Helper()
	c.eventually(fmt.Sprintf("%T %s is there still", o, o.GetName()), func() error {
		if err := c.get(o); !apierrors.IsNotFound(err) {
			return fmt.Errorf("%v, %+v", err, o)
		}
		return nil
	})
}

// says waits for a condition whose message contains text.
func (c *cluster) says(o client.Object, conditions func() []metav1.Condition, kind string, status metav1.ConditionStatus, reason, text string) {
	c.t.Helper()
	c.eventually(o.GetName(), func() error {
		if err := c.get(o); err != nil {
			return err
		}
		x := meta.FindStatusCondition(conditions(), kind)
		if x == nil || x.Status != status || x.Reason != reason || !strings.Contains(x.Message, text) {
			return fmt.Errorf("want %s %s %s %q, have %+v", kind, status, reason, text, conditions())
		}
		return nil
	})
}

func (c *cluster) event(o client.Object, reason string, texts ...string) {
	c.t.Helper()
	c.eventually("event "+reason, func() error {
		list := &eventsv1.EventList{}
		if err := c.admin.List(context.Background(), list); err != nil {
			return err
		}
		for _, e := range list.Items {
			if e.Regarding.Name == o.GetName() && e.Reason == reason && !slices.ContainsFunc(texts, func(text string) bool { return !strings.Contains(e.Note, text) }) {
				return nil
			}
		}
		return fmt.Errorf("none of %s that says %q", o.GetName(), texts)
	})
}

func tenantOf(name string) *v1alpha1.Tenant {
	return &v1alpha1.Tenant{ObjectMeta: metav1.ObjectMeta{Name: name}}
}

func (c *cluster) tenant(name string) *v1alpha1.Tenant {
	c.t.Helper()
	t := tenantOf(name)
	c.create(t)
	c.active(t)
	return t
}

func (c *cluster) active(t *v1alpha1.Tenant) {
	c.t.Helper()
	c.says(t, func() []metav1.Condition { return t.Status.Conditions }, "Ready", "True", "Active", "")
}

func networkOf(tenant, name, cidr string) *v1alpha1.Network {
	return &v1alpha1.Network{
		ObjectMeta: metav1.ObjectMeta{Namespace: v1alpha1.Home(tenant), Name: name},
		Spec:       v1alpha1.NetworkSpec{Subnets: map[string]v1alpha1.Subnet{"a": {CIDR: cidr}}},
	}
}

func (c *cluster) networkSays(n *v1alpha1.Network, phase, reason, text string) {
	c.t.Helper()
	status := metav1.ConditionFalse
	if phase == v1alpha1.NetworkActive {
		status = metav1.ConditionTrue
	}
	c.says(n, func() []metav1.Condition { return n.Status.Conditions }, "Ready", status, reason, text)
	if n.Status.Phase != phase {
		c.t.Errorf("phase %s, want %s", n.Status.Phase, phase)
	}
}

func spaceOf(tenant, name, network string) *v1alpha1.TenantNamespace {
	return &v1alpha1.TenantNamespace{
		ObjectMeta: metav1.ObjectMeta{Namespace: v1alpha1.Home(tenant), Name: name},
		Spec:       v1alpha1.TenantNamespaceSpec{Network: network},
	}
}

func (c *cluster) spaceSays(s *v1alpha1.TenantNamespace, phase, reason, text string) {
	c.t.Helper()
	status := metav1.ConditionFalse
	if reason == "Bound" {
		status = metav1.ConditionTrue
	}
	c.says(s, func() []metav1.Condition { return s.Status.Conditions }, "Ready", status, reason, text)
	if s.Status.Phase != phase {
		c.t.Errorf("phase %s, want %s", s.Status.Phase, phase)
	}
}

func (c *cluster) space(tenant, name string) *v1alpha1.TenantNamespace {
	c.t.Helper()
	s := spaceOf(tenant, name, "default")
	c.create(s)
	c.spaceSays(s, v1alpha1.NamespaceBound, "Bound", "")
	return s
}

func namespaceOf(name string) *corev1.Namespace {
	return &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: name}}
}

func podOf(namespace, name string) *corev1.Pod {
	return &corev1.Pod{
		ObjectMeta: metav1.ObjectMeta{Namespace: namespace, Name: name},
		Spec:       corev1.PodSpec{Containers: []corev1.Container{{Name: "a", Image: "a"}}, AutomountServiceAccountToken: ptr.To(false)},
	}
}

func (c *cluster) port(n *v1alpha1.Network, address string, pod *corev1.Pod, node string) *v1alpha1.Port {
	c.t.Helper()
	p := &v1alpha1.Port{
		ObjectMeta: metav1.ObjectMeta{Namespace: n.Namespace, Name: v1alpha1.PortName(n.Name, address), Labels: map[string]string{v1alpha1.LabelNetwork: n.Name}},
		Spec:       v1alpha1.PortSpec{Network: n.Name, NetworkUID: string(n.UID), Addresses: []string{address}, Node: node},
	}
	if pod != nil {
		p.Spec.Pod = &v1alpha1.PodRef{Namespace: pod.Namespace, Name: pod.Name, UID: string(pod.UID), Sandbox: "s", Interface: "eth0"}
	}
	c.create(p)
	return p
}

func TestTenant(t *testing.T) {
	c := start(t)
	blue := tenantOf("blue")
	blue.Spec.Owners = []string{"olga"}
	blue.Spec.Quota.PerNamespace = corev1.ResourceList{"pods": resource.MustParse("7")}
	blue.Spec.Quota.ContainerDefaults = corev1.ResourceList{"memory": resource.MustParse("64Mi")}
	c.create(blue)
	c.active(blue)
	c.event(blue, "Active")
	n := networkOf("blue", "default", "")
	c.networkSays(n, v1alpha1.NetworkActive, "Active", "")
	if n.Status.VNI < 4097 || n.Status.MTU != 1450 || n.Status.Tenant != "blue" || n.Status.Subnets[0].Gateway != "10.0.0.1" || n.Status.FreeAddresses != 65533 {
		t.Errorf("%+v", n.Status)
	}
	red := c.tenant("red")
	web := c.space("blue", "web")
	ns := namespaceOf("web")
	if err := c.get(ns); err != nil {
		t.Fatal(err)
	}
	for k, v := range map[string]string{v1alpha1.LabelTenant: "blue", v1alpha1.LabelNetwork: "default", "pod-security.kubernetes.io/enforce": "baseline"} {
		if ns.Labels[k] != v {
			t.Errorf("label %s=%q, want %q", k, ns.Labels[k], v)
		}
	}
	quota := &corev1.ResourceQuota{ObjectMeta: metav1.ObjectMeta{Namespace: "web", Name: "h8s-tenant"}}
	if err := c.get(quota); err != nil || quota.Spec.Hard.Pods().Value() != 7 || !quota.Spec.Hard.Name("services.nodeports", resource.DecimalSI).IsZero() {
		t.Errorf("%v %v", err, quota.Spec.Hard)
	}
	if err := c.get(&corev1.LimitRange{ObjectMeta: quota.ObjectMeta}); err != nil {
		t.Error(err)
	}
	home := &corev1.ResourceQuota{ObjectMeta: metav1.ObjectMeta{Namespace: "tenant-blue", Name: "h8s-tenant"}}
	if err := c.get(home); err != nil || home.Spec.Hard.Name("count/networks.hypernetes.io", resource.DecimalSI).Value() != 5 {
		t.Errorf("%v %v", err, home.Spec.Hard)
	}
	c.eventually("counts", func() error {
		if err := c.get(blue); err != nil || blue.Status.Networks != 1 || blue.Status.Namespaces != 1 {
			return fmt.Errorf("%v, %+v", err, blue.Status)
		}
		return nil
	})

	t.Run("rights", func(t *testing.T) {
		may := func(user string, groups []string, verb, group, res, ns, name string) bool {
			t.Helper()
			res, sub, _ := strings.Cut(res, "/")
			r := &authorizationv1.SubjectAccessReview{Spec: authorizationv1.SubjectAccessReviewSpec{
				User: user, Groups: append(groups, "system:authenticated"),
				ResourceAttributes: &authorizationv1.ResourceAttributes{Verb: verb, Group: group, Resource: res, Subresource: sub, Namespace: ns, Name: name},
			}}
			if err := c.admin.Create(t.Context(), r); err != nil {
				t.Fatal(err)
			}
			return r.Status.Allowed
		}
		const h, r = "hypernetes.io", "rbac.authorization.k8s.io"
		for _, x := range []struct {
			role                       string
			verb, group, res, ns, name string
			want                       bool
		}{
			{"reader", "list", "", "pods", "web", "", true},
			{"reader", "get", "", "pods/log", "web", "", true},
			{"reader", "list", h, "networks", "tenant-blue", "", true},
			{"reader", "get", h, "tenants", "", "blue", true},
			{"reader", "list", "", "secrets", "web", "", false},
			{"reader", "create", "", "pods", "web", "", false},
			{"member", "create", "", "pods", "web", "", true},
			{"member", "create", "", "pods/exec", "web", "", true},
			{"member", "get", "", "secrets", "web", "", true},
			{"member", "create", "apps", "deployments", "web", "", true},
			{"member", "get", "node.k8s.io", "runtimeclasses", "", "hyper", true},
			{"member", "create", "", "pods/proxy", "web", "", false},
			{"member", "get", "", "pods/proxy", "web", "", false},
			{"member", "get", "", "services/proxy", "web", "", false},
			{"member", "update", "", "services/status", "web", "", false},
			{"member", "update", "", "pods/status", "web", "", false},
			{"member", "create", "", "endpoints", "web", "", false},
			{"member", "create", "discovery.k8s.io", "endpointslices", "web", "", false},
			{"member", "impersonate", "", "serviceaccounts", "web", "", false},
			{"member", "create", r, "rolebindings", "web", "", false},
			{"member", "create", h, "networks", "tenant-blue", "", false},
			{"member", "create", "certificates.k8s.io", "certificatesigningrequests", "", "", false},
			{"manager", "create", r, "rolebindings", "web", "", true},
			{"manager", "create", h, "networks", "tenant-blue", "", true},
			{"manager", "create", h, "tenantnamespaces", "tenant-blue", "", true},
			{"manager", "create", h, "floatingips", "tenant-blue", "", true},
			{"manager", "create", h, "ports", "tenant-blue", "", true},
			{"manager", "create", "certificates.k8s.io", "certificatesigningrequests", "", "", true},
			{"manager", "update", h, "ports", "tenant-blue", "", false},
			{"manager", "update", h, "ports/status", "tenant-blue", "", false},
			{"manager", "update", h, "tenantnamespaces/status", "tenant-blue", "", false},
			{"manager", "update", h, "networks/status", "tenant-blue", "", false},
			{"manager", "update", h, "floatingips/status", "tenant-blue", "", false},
			{"manager", "update", h, "tenantnamespaces/finalizers", "tenant-blue", "", false},
			{"manager", "create", r, "rolebindings", "tenant-blue", "", false},
			{"manager", "create", "", "pods", "tenant-blue", "", false},
			{"manager", "update", "", "resourcequotas", "web", "", false},
			{"manager", "update", "", "limitranges", "web", "", false},
			{"manager", "bind", r, "clusterroles", "", "cluster-admin", false},
			{"manager", "escalate", r, "roles", "web", "", false},
			{"manager", "get", h, "tenants", "", "red", false},
			{"manager", "list", h, "tenants", "", "", false},
			{"manager", "update", h, "tenants", "", "blue", false},
			{"manager", "list", h, "networks", "tenant-red", "", false},
			{"manager", "list", "", "nodes", "", "", false},
			{"manager", "list", "", "pods", "default", "", false},
			{"manager", "list", "coordination.k8s.io", "leases", "h8s-system", "", false},
			{"manager", "list", "certificates.k8s.io", "certificatesigningrequests", "", "", false},
			{"manager", "update", "certificates.k8s.io", "certificatesigningrequests/approval", "", "", false},
			{"manager", "create", "admissionregistration.k8s.io", "validatingadmissionpolicybindings", "", "", false},
		} {
			has := func() bool {
				return may("blue:ann", []string{"h8s:tenant:blue:" + x.role}, x.verb, x.group, x.res, x.ns, x.name)
			}
			if !x.want {
				if has() {
					t.Errorf("%+v: allowed", x)
				}
				continue
			}
			// The API server hears of what was bound a moment later.
			c.eventually(fmt.Sprintf("%+v", x), func() error {
				if !has() {
					return errors.New("not allowed")
				}
				return nil
			})
		}
		for _, verb := range []string{"get", "list", "watch", "create", "update", "patch", "delete"} {
			for _, res := range []string{"namespaces", "namespaces/status", "namespaces/finalize"} {
				for _, ns := range []string{"", "web", "tenant-blue"} {
					if may("blue:ann", []string{"h8s:tenant:blue:manager"}, verb, "", res, ns, ns) {
						t.Errorf("a manager may %s %s in %q", verb, res, ns)
					}
				}
			}
		}
		if !may("olga", nil, "create", h, "networks", "tenant-blue", "") || may("olga", nil, "create", h, "networks", "tenant-red", "") {
			t.Error("owner")
		}
		for _, sa := range []string{"web", "tenant-blue"} {
			if may("system:serviceaccount:"+sa+":default", []string{"system:serviceaccounts", "system:serviceaccounts:" + sa}, "list", "", "pods", "web", "") {
				t.Error("a namespace's default ServiceAccount has rights")
			}
		}

		ann, err := client.New(controlplane.As(c.cfg, "blue:ann", "h8s:tenant:blue:manager", "system:authenticated"), client.Options{Scheme: controlplane.Scheme()})
		if err != nil {
			t.Fatal(err)
		}
		binding := func(name, role string) *rbacv1.RoleBinding {
			return &rbacv1.RoleBinding{
				ObjectMeta: metav1.ObjectMeta{Namespace: "web", Name: name},
				RoleRef:    rbacv1.RoleRef{APIGroup: r, Kind: "ClusterRole", Name: role},
				Subjects:   []rbacv1.Subject{{Kind: "ServiceAccount", Namespace: "web", Name: "robot"}},
			}
		}
		if err := ann.Create(t.Context(), binding("robot", "h8s:tenant-member")); err != nil {
			t.Errorf("a manager binds a role of the tenant's: %v", err)
		}
		for _, role := range []string{"cluster-admin", "system:aggregate-to-edit", "system:node", "h8s:controller", "h8s:home-manager"} {
			if err := ann.Create(t.Context(), binding("grab", role)); !apierrors.IsForbidden(err) {
				t.Errorf("a manager binds %s: %v", role, err)
			}
		}
		grab := &rbacv1.Role{ObjectMeta: metav1.ObjectMeta{Namespace: "web", Name: "grab"},
			Rules: []rbacv1.PolicyRule{{Verbs: []string{"get"}, APIGroups: []string{""}, Resources: []string{"pods/proxy"}}}}
		if err := ann.Create(t.Context(), grab); !apierrors.IsForbidden(err) {
			t.Errorf("a manager makes a role with more than it has: %v", err)
		}
		// (edit itself is empty without a controller manager.)
		// What it takes away from others comes back.
		rb := &rbacv1.RoleBinding{ObjectMeta: metav1.ObjectMeta{Namespace: "web", Name: "h8s:reader"}}
		if err := ann.Delete(t.Context(), rb); err != nil {
			t.Fatal(err)
		}
		c.eventually("the reader's binding", func() error { return c.get(rb) })
	})

	t.Run("namespaces", func(t *testing.T) {
		later := spaceOf("blue", "later", "net9")
		c.create(later)
		c.spaceSays(later, v1alpha1.NamespacePending, "NoNetwork", "net9")
		if err := c.get(namespaceOf("later")); !apierrors.IsNotFound(err) {
			t.Errorf("a Namespace without a Network: %v", err)
		}
		c.create(networkOf("blue", "net9", "10.0.0.0/24"))
		c.spaceSays(later, v1alpha1.NamespaceBound, "Bound", "")

		c.create(namespaceOf("ops"))
		for _, tenant := range []string{"blue", "red"} {
			s := spaceOf(tenant, "ops", "default")
			c.create(s)
			c.spaceSays(s, v1alpha1.NamespaceFailed, "NamespaceTaken", "choose another name")
			c.event(s, "NamespaceTaken")
			c.delete(s)
			c.gone(s)
		}
		taken := spaceOf("red", "web", "default")
		c.create(taken)
		c.spaceSays(taken, v1alpha1.NamespaceFailed, "NamespaceTaken", "not this tenant's")
		c.delete(taken)
		c.gone(taken)
		for _, name := range []string{"ops", "web"} {
			if err := c.get(namespaceOf(name)); err != nil {
				t.Errorf("somebody else's Namespace is gone: %v", err)
			}
		}

		// Labels that lie change nothing and do not stay.
		if err := c.get(ns); err != nil {
			t.Fatal(err)
		}
		c.update(ns, func() {
			ns.Labels[v1alpha1.LabelTenant], ns.Labels[v1alpha1.LabelNetwork] = "red", "other"
			ns.Labels["pod-security.kubernetes.io/enforce"] = "privileged"
			ns.Annotations = nil
		})
		c.eventually("labels", func() error {
			if err := c.get(ns); err != nil {
				return err
			}
			if ns.Labels[v1alpha1.LabelTenant] != "blue" || ns.Labels[v1alpha1.LabelNetwork] != "default" || ns.Labels["pod-security.kubernetes.io/enforce"] != "baseline" {
				return fmt.Errorf("%v", ns.Labels)
			}
			return nil
		})

		was := ns.UID
		c.delete(ns)
		c.event(web, "NamespaceLost")
		c.eventually("made again", func() error {
			if err := c.get(ns); err != nil {
				return err
			}
			if err := c.get(web); err != nil {
				return err
			}
			if ns.UID == was || web.Status.NamespaceUID != string(ns.UID) || web.Status.Phase != v1alpha1.NamespaceBound {
				return fmt.Errorf("%s %+v", ns.UID, web.Status)
			}
			return nil
		})
	})

	t.Run("deletion in order", func(t *testing.T) {
		hold := namespaceOf("web")
		c.update(hold, func() { hold.Annotations["test/hold"] = "yes" })
		pod := podOf("web", "p")
		c.create(pod)
		if err := c.get(n); err != nil {
			t.Fatal(err)
		}
		c.port(n, "10.0.0.9", pod, "")
		c.port(n, "10.0.0.10", nil, "")
		c.delete(blue)
		says := func(text string) {
			t.Helper()
			c.says(blue, func() []metav1.Condition { return blue.Status.Conditions }, v1alpha1.ConditionBlocked, "True", "Waiting", text)
		}
		says("TenantNamespace web (waits until Namespace web is gone")
		if blue.Status.Phase != "Terminating" {
			t.Errorf("%+v", blue.Status)
		}
		if err := c.get(n); err != nil || !n.DeletionTimestamp.IsZero() {
			t.Errorf("the Network goes before the Pods: %v", err)
		}
		c.update(hold, func() { delete(hold.Annotations, "test/hold") })
		c.gone(blue)
		c.gone(namespaceOf("web"))
		c.gone(namespaceOf("tenant-blue"))
		c.gone(&rbacv1.ClusterRoleBinding{ObjectMeta: metav1.ObjectMeta{Name: "h8s:tenant:blue"}})
		leases := &coordinationv1.LeaseList{}
		if err := c.admin.List(t.Context(), leases, client.MatchingLabels{v1alpha1.LabelTenant: "blue"}); err != nil || len(leases.Items) > 0 {
			t.Errorf("%v, left: %v", err, leases.Items)
		}
		if err := c.get(red); err != nil || red.Status.Phase != "Active" {
			t.Errorf("%v %+v", err, red.Status)
		}
	})

	t.Run("a home that is somebody else's", func(t *testing.T) {
		c.create(namespaceOf("tenant-grey"))
		grey := tenantOf("grey")
		c.create(grey)
		c.says(grey, func() []metav1.Condition { return grey.Status.Conditions }, "Ready", "False", "HomeTaken", "was not made for this Tenant")
		c.delete(grey)
		c.gone(grey)
		if err := c.get(namespaceOf("tenant-grey")); err != nil {
			t.Error(err)
		}
	})
}

func TestNetwork(t *testing.T) {
	c := start(t)
	blue := tenantOf("blue")
	blue.Spec.Keystone = &v1alpha1.KeystoneProject{ProjectID: strings.Repeat("a", 32)}
	c.create(blue)
	c.active(blue)
	c.tenant("red")

	t.Run("faults", func(t *testing.T) {
		for name, x := range map[string]struct {
			change       func(*v1alpha1.Network)
			reason, text string
		}{
			"wrong-tenant": {func(n *v1alpha1.Network) { n.Spec.TenantID = "red" }, "WrongTenant", "apply the Network in that tenant's namespace"},
			"services":     {func(n *v1alpha1.Network) { n.Spec.Subnets["a"] = v1alpha1.Subnet{CIDR: "10.96.4.0/24"} }, "Invalid", "spec.subnets[a].cidr"},
			"nodes":        {func(n *v1alpha1.Network) { n.Spec.Subnets["a"] = v1alpha1.Subnet{CIDR: "100.64.0.0/16"} }, "Invalid", "reserved"},
			"overlap":      {func(n *v1alpha1.Network) { n.Spec.Subnets["b"] = v1alpha1.Subnet{CIDR: "172.16.0.0/12"} }, "Invalid", "overlaps with subnet a"},
			"mtu":          {func(n *v1alpha1.Network) { n.Spec.MTU = 9000 }, "Invalid", "carries 1450"},
			"provider":     {func(n *v1alpha1.Network) { n.Spec.Provider = "neutron" }, "NoProvider", "no provider \"neutron\""},
		} {
			n := networkOf("blue", name, "172.16.1.0/24")
			x.change(n)
			c.create(n)
			c.networkSays(n, v1alpha1.NetworkFailed, x.reason, x.text)
			c.event(n, x.reason)
			c.delete(n)
			c.gone(n)
		}
		stray := networkOf("x", "stray", "172.16.1.0/24")
		stray.Namespace = "default"
		c.create(stray)
		c.networkSays(stray, v1alpha1.NetworkFailed, "NoTenant", "tenant-<tenant>")
		c.delete(stray)
		c.gone(stray)
		// Failed is not for ever.
		n := networkOf("blue", "mends", "172.16.1.0/24")
		n.Spec.TenantID = "red"
		c.create(n)
		c.networkSays(n, v1alpha1.NetworkFailed, "WrongTenant", "")
		c.update(n, func() { n.Spec.TenantID = strings.Repeat("a", 32) })
		c.networkSays(n, v1alpha1.NetworkActive, "Active", "")
	})

	t.Run("routed", func(t *testing.T) {
		// It goes by who was there before, and the API server's clock shows seconds.
		others := networkOf("red", "default", "")
		c.networkSays(others, v1alpha1.NetworkActive, "Active", "")
		c.eventually("a second after red's default", func() error {
			if since := time.Since(others.CreationTimestamp.Time); since < time.Second {
				return fmt.Errorf("it is %v", since)
			}
			return nil
		})
		n := networkOf("blue", "host1", "10.0.4.0/24") // inside red's default
		n.Spec.HostAccess = v1alpha1.HostRouted
		c.create(n)
		c.networkSays(n, v1alpha1.NetworkFailed, "NotUnique", "choose another")
		own := networkOf("blue", "host2", "172.20.0.0/24")
		own.Spec.HostAccess = v1alpha1.HostRouted
		c.create(own)
		c.networkSays(own, v1alpha1.NetworkActive, "Active", "")
		// Who has routes keeps them, even from a Network that was there before.
		c.update(others, func() { others.Spec.Subnets["more"] = v1alpha1.Subnet{CIDR: "172.20.0.0/22"} })
		later := networkOf("red", "same", "172.20.0.0/24")
		c.create(later)
		c.networkSays(later, v1alpha1.NetworkActive, "Active", "")
		c.eventually("others have the range too", func() error {
			if err := c.get(others); err != nil || len(others.Status.Subnets) != 2 {
				return fmt.Errorf("%v %+v", err, others.Status.Subnets)
			}
			return nil
		})
		c.update(own, func() { own.Spec.MTU = 1300 })
		c.networkSays(own, v1alpha1.NetworkActive, "Active", "")
		// A range more is asked for anew, and refused leaves the routes there are; a Network
		// that was isolated gets none.
		c.update(own, func() { own.Spec.Subnets["more"] = v1alpha1.Subnet{CIDR: "172.20.1.0/24"} })
		c.networkSays(own, v1alpha1.NetworkFailed, "NotUnique", "172.20.1.0/24 is in use")
		c.update(later, func() { later.Spec.HostAccess = v1alpha1.HostRouted })
		c.networkSays(later, v1alpha1.NetworkFailed, "NotUnique", "172.20.0.0/24")
		if own.Status.HostAccess != v1alpha1.HostRouted || len(own.Status.Subnets) != 1 || later.Status.HostAccess != v1alpha1.HostIsolated {
			t.Errorf("%+v, later %+v", own.Status, later.Status)
		}
		c.update(own, func() { own.Spec.HostAccess = v1alpha1.HostIsolated })
		c.networkSays(own, v1alpha1.NetworkActive, "Active", "")
		if own.Status.HostAccess != v1alpha1.HostIsolated {
			t.Errorf("%+v", own.Status)
		}
	})

	t.Run("life", func(t *testing.T) {
		n := networkOf("blue", "net1", "192.168.0.0/29")
		c.create(n)
		c.networkSays(n, v1alpha1.NetworkActive, "Active", "")
		vni := n.Status.VNI
		c.update(n, func() {
			n.Spec.Subnets["0"] = v1alpha1.Subnet{CIDR: "192.168.8.0/29"}
			n.Spec.DNSServers, n.Spec.MTU = []string{"192.0.2.53"}, 1300
		})
		c.eventually("subnet added", func() error {
			if err := c.get(n); err != nil || len(n.Status.Subnets) != 2 || n.Status.MTU != 1300 || n.Status.FreeAddresses != 10 {
				return fmt.Errorf("%v %+v", err, n.Status)
			}
			return nil
		})
		if s := n.Status.Subnets; s[0].Name != "0" || s[0].Index != 1 || s[1].Index != 0 || n.Status.VNI != vni {
			t.Errorf("%+v", n.Status)
		}
		c.stop()
		c.run()
		// A claim that somebody deleted is made again.
		lease := &coordinationv1.Lease{ObjectMeta: metav1.ObjectMeta{Namespace: "h8s-system", Name: claim.VNIName(vni)}}
		c.delete(lease)
		c.update(n, func() { n.Spec.MTU = 1310 })
		c.eventually("after a restart", func() error {
			if err := c.get(n); err != nil || n.Status.MTU != 1310 || n.Status.VNI != vni {
				return fmt.Errorf("%v %+v", err, n.Status)
			}
			return c.get(lease)
		})

		c.create(namespaceOf("app"))
		pod := podOf("app", "p")
		c.create(pod)
		var ports []*v1alpha1.Port
		for _, a := range []string{"192.168.0.2", "192.168.0.3", "192.168.0.4", "192.168.0.5", "192.168.0.6", "192.168.8.2", "192.168.8.3", "192.168.8.4", "192.168.8.5", "192.168.8.6"} {
			ports = append(ports, c.port(n, a, pod, ""))
		}
		c.says(n, func() []metav1.Condition { return n.Status.Conditions }, v1alpha1.ConditionAddresses, "False", "Exhausted", "add a subnet")
		c.event(n, "AddressesExhausted")
		c.delete(ports[1])
		c.says(n, func() []metav1.Condition { return n.Status.Conditions }, v1alpha1.ConditionAddresses, "True", "Free", "")
		if n.Status.Ports != 9 {
			t.Errorf("%+v", n.Status)
		}
		c.delete(n)
		c.says(n, func() []metav1.Condition { return n.Status.Conditions }, v1alpha1.ConditionBlocked, "True", "InUse", "Pod app/p")
		if n.Status.Phase != v1alpha1.NetworkTerminating {
			t.Errorf("%+v", n.Status)
		}
		c.event(n, "DeletionBlocked")
		// The Pod's Ports are collected after it, then the Network goes.
		c.delete(pod)
		c.gone(n)
		c.gone(lease)
	})

	t.Run("ports", func(t *testing.T) {
		n := networkOf("blue", "default", "")
		c.networkSays(n, v1alpha1.NetworkActive, "Active", "")
		node := &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: "n1"}}
		c.create(node)
		stays, goes := podOf("app", "stays"), podOf("app", "goes")
		c.create(stays, goes)
		kept := c.port(n, "10.0.0.2", stays, "n1")
		left := c.port(n, "10.0.0.3", goes, "n1")
		anew := c.port(n, "10.0.0.4", stays, "n1")
		c.update(anew, func() { anew.Spec.Pod.UID = "another" })
		claimed := c.port(n, "10.0.0.5", goes, "n1")
		c.update(claimed, func() { claimed.Spec.Retain = true })
		unused := c.port(n, "10.0.0.6", nil, "")
		c.delete(goes)
		c.gone(left)
		c.gone(anew)
		c.eventually("claimed", func() error {
			if err := c.get(claimed); err != nil || claimed.Spec.Pod != nil || claimed.Spec.Node != "" {
				return fmt.Errorf("%v %+v", err, claimed.Spec)
			}
			return nil
		})
		for _, p := range []*v1alpha1.Port{kept, unused} {
			if err := c.get(p); err != nil {
				t.Error(err)
			}
		}
		c.delete(node)
		c.gone(kept)
	})
}
