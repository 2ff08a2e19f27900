// Package identity holds the attacks on who somebody is that go through Keystone
// (reference/tenancy-network.md §4, number 12), with a real API server that asks the real
// webhook: against a fake Keystone, and against a real one if H8S_OPENSTACK is set.
package identity

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/go-logr/logr"
	authenticationv1 "k8s.io/api/authentication/v1"
	authorizationv1 "k8s.io/api/authorization/v1"
	certificatesv1 "k8s.io/api/certificates/v1"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/client-go/rest"
	"k8s.io/klog/v2"
	ctrl "sigs.k8s.io/controller-runtime"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/yaml"

	v1alpha1 "github.com/hypernetes/hypernetes/api/hypernetes/v1alpha1"
	"github.com/hypernetes/hypernetes/cluster/pki"
	"github.com/hypernetes/hypernetes/controller"
	"github.com/hypernetes/hypernetes/identity/keystone/keystonetest"
	"github.com/hypernetes/hypernetes/test/controlplane"
)

const patience = 2 * time.Minute

// remember is how long the webhook and the API server's own cache for it remember here. On
// top comes the API server's cache of all tokens, ten seconds that nothing changes.
const remember = time.Second

type world struct {
	t        *testing.T
	keystone *keystonetest.Admin
	cfg      *rest.Config
	admin    client.Client
	audit    string
}

func eventually(t *testing.T, what string, f func() error) {
	t.Helper()
	deadline := time.Now().Add(patience)
	tick := time.NewTicker(100 * time.Millisecond)
	defer tick.Stop()
	for {
		err := f()
		if err == nil {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("%s: %v", what, err)
		}
		<-tick.C
	}
}

func write(t *testing.T, path, text string) string {
	t.Helper()
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

// start runs the API server and the controllers as a node does, with Keystone's
// administrator or with a user who may check tokens and nothing else.
func start(t *testing.T, k keystonetest.Keystone, full bool) *world {
	t.Helper()
	ctrl.SetLogger(logr.Discard())
	klog.SetLogger(logr.Discard())
	dir, webhook := t.TempDir(), controlplane.Address(t)
	store := pki.Store{Dir: dir}
	if _, err := store.Ensure([]string{"ca", "front-proxy-ca"}, []pki.Leaf{
		{File: "webhook", CA: "ca", CN: "h8s-webhook", Use: pki.Server, Hosts: []string{"127.0.0.1"}},
		{File: "front-proxy", CA: "front-proxy-ca", CN: "front-proxy", Use: pki.Client},
	}, nil); err != nil {
		t.Fatal(err)
	}
	path := func(name string) string { return filepath.Join(dir, name) }
	config := write(t, path("webhook.yaml"), fmt.Sprintf(`
apiVersion: v1
kind: Config
clusters: [{name: k, cluster: {server: "https://%s/authenticate", certificate-authority: %s}}]
users: [{name: k, user: {client-certificate: %s, client-key: %s}}]
contexts: [{name: k, context: {cluster: k, user: k}}]
current-context: k
`, webhook, path("ca.crt"), path("front-proxy.crt"), path("front-proxy.key")))
	policy := write(t, path("audit.yaml"), "apiVersion: audit.k8s.io/v1\nkind: Policy\nomitStages: [RequestReceived]\nrules: [{level: Metadata}]\n")
	w := &world{t: t, keystone: keystonetest.NewAdmin(t, k), audit: path("audit.log")}
	w.cfg = controlplane.Start(t, "--authentication-token-webhook-config-file="+config, "--authentication-token-webhook-version=v1",
		"--authentication-token-webhook-cache-ttl="+remember.String(), "--audit-policy-file="+policy, "--audit-log-path="+w.audit)
	var err error
	if w.admin, err = client.New(w.cfg, client.Options{Scheme: controlplane.Scheme()}); err != nil {
		t.Fatal(err)
	}
	text, err := os.ReadFile("../../../cluster/manifest/objects/tenancy.yaml")
	if err != nil {
		t.Fatal(err)
	}
	for _, document := range strings.Split(string(text), "\n---\n") {
		o := &unstructured.Unstructured{}
		if err := yaml.Unmarshal([]byte(document), &o.Object); err != nil {
			t.Fatal(err)
		}
		if err := w.admin.Create(t.Context(), o); err != nil {
			t.Fatal(err)
		}
	}
	service := w.keystone.ServiceUser()
	if full {
		service = k.Admin
	}
	o := controller.Options{
		ServiceCIDRs: "10.96.0.0/12,fd00:10:96::/108", ReservedCIDRs: "100.64.0.0/24", ClusterDomain: "cluster.local", FabricMTU: 1500,
		Retry: 500 * time.Millisecond,
	}
	o.OpenStack.Cloud = "service"
	o.OpenStack.CloudConfig = write(t, path("clouds.yaml"), fmt.Sprintf(`{clouds: {service: {auth: {auth_url: "%s", user_id: "%s", username: "%s", default_domain: default, password: "%s", project_id: "%s", project_name: "%s"}}}}`,
		service.URL, service.UserID, service.Username, service.Secret, service.ProjectID, service.ProjectName))
	hook := &o.OpenStack.Keystone
	hook.Address, hook.Cert, hook.Key, hook.ClientCA = webhook, path("webhook.crt"), path("webhook.key"), path("front-proxy-ca.crt")
	hook.Wrap, hook.Remember, hook.Every = k.Wrap, remember, time.Second
	hook.Tenants = "tag=auto" + w.keystone.Suffix
	ctx, cancel := context.WithCancel(context.Background())
	m, err := controller.New(ctx, controlplane.As(w.cfg, "h8s:controller", "h8s:controllers", "system:authenticated"), o)
	if err != nil {
		cancel()
		t.Fatal(err)
	}
	done := make(chan error, 1)
	go func() { done <- m.Start(ctx) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Errorf("controller: %v", err)
		}
	})
	// Who has no certificate may not ask the webhook what a token is worth.
	eventually(t, "webhook", func() error {
		resp, err := (&http.Client{Transport: insecure()}).Post("https://"+webhook+"/authenticate", "application/json", strings.NewReader("{}"))
		if err == nil {
			_ = resp.Body.Close()
			return fmt.Errorf("answers without a certificate: %s", resp.Status)
		}
		if !strings.Contains(err.Error(), "certificate required") {
			return err
		}
		return nil
	})
	return w
}

// tenant makes one of a project with a namespace <tenant>-web.
func (w *world) tenant(name, project string) {
	w.t.Helper()
	ctx := w.t.Context()
	if err := w.admin.Create(ctx, &v1alpha1.Tenant{ObjectMeta: metav1.ObjectMeta{Name: name}, Spec: v1alpha1.TenantSpec{Keystone: &v1alpha1.KeystoneProject{ProjectID: project}}}); err != nil {
		w.t.Fatal(err)
	}
	home := v1alpha1.Home(name)
	eventually(w.t, "tenant "+name, func() error {
		t := &v1alpha1.Tenant{}
		if err := w.admin.Get(ctx, client.ObjectKey{Name: name}, t); err != nil {
			return err
		}
		if t.Status.Phase != "Active" {
			return fmt.Errorf("%+v", t.Status)
		}
		return nil
	})
	if err := w.admin.Create(ctx, &v1alpha1.TenantNamespace{ObjectMeta: metav1.ObjectMeta{Namespace: home, Name: name + "-web"}}); err != nil {
		w.t.Fatal(err)
	}
	eventually(w.t, "namespace of "+name, func() error {
		o := &v1alpha1.TenantNamespace{}
		if err := w.admin.Get(ctx, client.ObjectKey{Namespace: home, Name: name + "-web"}, o); err != nil {
			return err
		}
		if o.Status.Phase != v1alpha1.NamespaceBound {
			return fmt.Errorf("%+v", o.Status)
		}
		return nil
	})
	// The API server hears of what was bound a moment later.
	for _, namespace := range []string{home, name + "-web"} {
		for _, role := range []string{"manager", "member", "reader"} {
			eventually(w.t, role+"'s rights in "+namespace, func() error {
				r := &authorizationv1.SubjectAccessReview{Spec: authorizationv1.SubjectAccessReviewSpec{
					User: "x", Groups: []string{"h8s:tenant:" + name + ":" + role, "system:authenticated"},
					ResourceAttributes: &authorizationv1.ResourceAttributes{Verb: "list", Resource: "pods", Namespace: namespace},
				}}
				if namespace == home {
					r.Spec.ResourceAttributes.Group, r.Spec.ResourceAttributes.Resource = v1alpha1.GroupVersion.Group, "networks"
				}
				if err := w.admin.Create(ctx, r); err != nil {
					return err
				}
				if !r.Status.Allowed {
					return errors.New(r.Status.Reason)
				}
				return nil
			})
		}
	}
}

// as is a client with a token.
func (w *world) as(token string) client.Client {
	w.t.Helper()
	c, err := client.New(&rest.Config{Host: w.cfg.Host, BearerToken: token, QPS: 500, Burst: 1000,
		TLSClientConfig: rest.TLSClientConfig{CAData: w.cfg.CAData}},
		client.Options{Scheme: controlplane.Scheme(), Mapper: w.admin.RESTMapper()})
	if err != nil {
		w.t.Fatal(err)
	}
	return c
}

// who is what the API server takes the bearer of a token for.
func (w *world) who(token string) (authenticationv1.UserInfo, error) {
	w.t.Helper()
	o := &authenticationv1.SelfSubjectReview{}
	err := w.as(token).Create(w.t.Context(), o)
	return o.Status.UserInfo, err
}

// makes tries to make something harmless in a namespace.
func (w *world) makes(token, namespace string) error {
	return w.as(token).Create(w.t.Context(), &corev1.ConfigMap{ObjectMeta: metav1.ObjectMeta{GenerateName: "x-", Namespace: namespace}})
}

// network tries what a manager may at home.
func (w *world) network(token, tenant string) error {
	return w.as(token).Create(w.t.Context(), &v1alpha1.Network{ObjectMeta: metav1.ObjectMeta{GenerateName: "x-", Namespace: v1alpha1.Home(tenant)},
		Spec: v1alpha1.NetworkSpec{Subnets: map[string]v1alpha1.Subnet{"a": {CIDR: "10.9.0.0/24"}}}})
}

func (w *world) reads(token, namespace string) error {
	return w.as(token).List(w.t.Context(), &corev1.PodList{}, client.InNamespace(namespace))
}

func TestIdentity(t *testing.T) {
	t.Run("fake", func(t *testing.T) {
		f := keystonetest.NewFake(t)
		testIdentity(t, keystonetest.Of(f), f)
	})
	t.Run("real", func(t *testing.T) { testIdentity(t, keystonetest.Real(t), nil) })
}

// testIdentity has one API server for all: starting it is most of the time it takes.
func testIdentity(t *testing.T, k keystonetest.Keystone, fake *keystonetest.Fake) {
	w := start(t, k, fake != nil)
	a := w.keystone
	blue, red, plain := a.Project("default", "blue"), a.Project("default", "red"), a.Project("default", "plain")
	other := a.Domain("other")
	alienBlue := a.Project(other, "blue")
	ann, bob, rita, alien := a.User("default", "ann"), a.User("default", "bob"), a.User("default", "rita"), a.User(other, "ann")
	a.Grant(blue, ann, "manager")
	a.Grant(red, ann, "reader")
	a.Grant(plain, ann, "manager")
	a.Grant(red, bob, "member")
	a.Grant(red, rita, "reader")
	a.Grant(alienBlue, alien, "manager")
	w.tenant("blue", blue)
	w.tenant("red", red)
	token := func(u keystonetest.User, project string) string { return a.Token(a.Password(u, project)).ID }

	allowed := func(t *testing.T, what string, err error) {
		t.Helper()
		if err != nil {
			t.Errorf("%s: %v", what, err)
		}
	}
	forbidden := func(t *testing.T, what string, err error) {
		t.Helper()
		if !apierrors.IsForbidden(err) {
			t.Errorf("%s: %v, want forbidden", what, err)
		}
	}
	nobody := func(t *testing.T, what, token string) {
		t.Helper()
		if u, err := w.who(token); !apierrors.IsUnauthorized(err) {
			t.Errorf("%s: %+v %v, want unauthorized", what, u, err)
		}
	}

	// Revoked now, and looked at again at the end.
	doomed := token(ann, blue)
	allowed(t, "a token before it is revoked", w.makes(doomed, "blue-web"))
	a.RevokeToken(doomed)

	t.Run("each does their own work", func(t *testing.T) {
		annBlue, bobRed, ritaRed := token(ann, blue), token(bob, red), token(rita, red)
		u, err := w.who(annBlue)
		if err != nil || u.Username != "keystone:"+ann.ID || u.UID != ann.ID ||
			!slices.Contains(u.Groups, "h8s:tenant:blue:manager") || slices.ContainsFunc(u.Groups, func(g string) bool { return strings.Contains(g, "red") || g == "system:masters" }) ||
			!slices.Equal(u.Extra["hypernetes.io/project"], []string{blue}) {
			t.Errorf("%+v %v", u, err)
		}
		allowed(t, "manager of blue at home", w.network(annBlue, "blue"))
		allowed(t, "manager of blue in its namespace", w.makes(annBlue, "blue-web"))
		forbidden(t, "manager of blue at red's home", w.network(annBlue, "red"))
		forbidden(t, "manager of blue in red's namespace", w.reads(annBlue, "red-web"))
		forbidden(t, "manager of blue: namespaces", w.as(annBlue).List(t.Context(), &corev1.NamespaceList{}))
		forbidden(t, "manager of blue: secrets of all", w.as(annBlue).List(t.Context(), &corev1.SecretList{}))
		allowed(t, "member of red in its namespace", w.makes(bobRed, "red-web"))
		forbidden(t, "member of red at home", w.network(bobRed, "red"))
		forbidden(t, "member of red in blue's namespace", w.makes(bobRed, "blue-web"))
		allowed(t, "reader of red reads", w.reads(ritaRed, "red-web"))
		forbidden(t, "reader of red makes", w.makes(ritaRed, "red-web"))
	})

	t.Run("a token is for one project", func(t *testing.T) {
		annRed := token(ann, red)
		allowed(t, "ann reads red", w.reads(annRed, "red-web"))
		forbidden(t, "ann makes in red what she may in blue", w.makes(annRed, "red-web"))
		forbidden(t, "ann reads blue with red's token", w.reads(annRed, "blue-web"))
		nobody(t, "a project that is no tenant's", token(ann, plain))
	})

	t.Run("application credentials", func(t *testing.T) {
		limited := a.Token(a.ApplicationCredential(ann, blue, "reader")).ID
		allowed(t, "reads", w.reads(limited, "blue-web"))
		forbidden(t, "makes, which its user may", w.makes(limited, "blue-web"))
		nobody(t, "with access rules", a.Token(a.ApplicationCredential(ann, blue, "manager", keystonetest.Accessible())).ID)
	})

	t.Run("other scopes", func(t *testing.T) {
		nobody(t, "unscoped", a.Raw(ann, "unscoped"))
		root := a.User("default", "root")
		a.Do(http.MethodPut, "/system/users/"+root.ID+"/roles/"+a.Role("admin"), nil, nil)
		nobody(t, "system", a.Raw(root, map[string]any{"system": map[string]any{"all": true}}))
		a.Do(http.MethodPut, "/domains/default/users/"+root.ID+"/roles/"+a.Role("manager"), nil, nil)
		nobody(t, "domain", a.Raw(root, map[string]any{"domain": map[string]any{"id": "default"}}))
		a.Do(http.MethodDelete, "/domains/default/users/"+root.ID+"/roles/"+a.Role("manager"), nil, nil)
		nobody(t, "trust", a.Trust(ann, root, blue, "manager"))
	})

	t.Run("names of Kubernetes' own", func(t *testing.T) {
		mallory := a.User("default", "system:admin")
		a.Group(other, "system:masters", mallory)
		a.Grant(red, mallory, "system:masters")
		nobody(t, "the role system:masters alone", token(mallory, red))
		a.Grant(red, mallory, "reader")
		tok := token(mallory, red)
		u, err := w.who(tok)
		if err != nil || u.Username != "keystone:"+mallory.ID || slices.Contains(u.Groups, "system:masters") {
			t.Errorf("%+v %v", u, err)
		}
		for key, values := range u.Extra {
			if slices.ContainsFunc(values, func(v string) bool { return strings.HasPrefix(v, "system:") }) {
				t.Errorf("extra %s: %v", key, values)
			}
		}
		forbidden(t, "secrets of all", w.as(tok).List(t.Context(), &corev1.SecretList{}))
		forbidden(t, "makes", w.makes(tok, "red-web"))
	})

	t.Run("the same names in two domains", func(t *testing.T) {
		nobody(t, "ann of the other domain, of that one's project blue", token(alien, alienBlue))
		w.tenant("azure", alienBlue)
		tok := token(alien, alienBlue)
		allowed(t, "at home", w.network(tok, "azure"))
		forbidden(t, "at the other blue's", w.reads(tok, "blue-web"))
		if u, _ := w.who(tok); u.Username == "keystone:"+ann.ID || u.Username != "keystone:"+alien.ID {
			t.Errorf("%+v", u)
		}
	})

	t.Run("a project claimed twice", func(t *testing.T) {
		// Admission refuses it where it runs; of two that came to be nevertheless the elder has it.
		if err := w.admin.Create(t.Context(), &v1alpha1.Tenant{ObjectMeta: metav1.ObjectMeta{Name: "usurper"}, Spec: v1alpha1.TenantSpec{Keystone: &v1alpha1.KeystoneProject{ProjectID: blue}}}); err != nil {
			t.Fatal(err)
		}
		eventually(t, "condition", func() error {
			o := &v1alpha1.Tenant{}
			if err := w.admin.Get(t.Context(), client.ObjectKey{Name: "usurper"}, o); err != nil {
				return err
			}
			c := meta.FindStatusCondition(o.Status.Conditions, "ProjectReady")
			if c == nil || c.Status != metav1.ConditionFalse || c.Reason != "ProjectTaken" || !strings.Contains(c.Message, "tenant blue") || o.Status.Phase != "Degraded" {
				return fmt.Errorf("%+v", o.Status)
			}
			return nil
		})
		if u, err := w.who(token(ann, blue)); err != nil || slices.ContainsFunc(u.Groups, func(g string) bool { return strings.Contains(g, "usurper") }) || !slices.Contains(u.Groups, "h8s:tenant:blue:manager") {
			t.Errorf("%+v %v", u, err)
		}
	})

	t.Run("names that are special", func(t *testing.T) {
		for _, name := range []string{"keystone", "system", "h8s"} {
			if err := w.admin.Create(t.Context(), &v1alpha1.Tenant{ObjectMeta: metav1.ObjectMeta{Name: name}}); !apierrors.IsInvalid(err) {
				t.Errorf("tenant %s: %v", name, err)
			}
		}
	})

	t.Run("a certificate does not outlive Keystone", func(t *testing.T) {
		key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
		if err != nil {
			t.Fatal(err)
		}
		der, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{Subject: pkix.Name{CommonName: "blue:ann", Organization: []string{"h8s:tenant:blue:manager"}}}, key)
		if err != nil {
			t.Fatal(err)
		}
		c := w.as(token(ann, blue))
		csr := &certificatesv1.CertificateSigningRequest{ObjectMeta: metav1.ObjectMeta{Name: "forever"}, Spec: certificatesv1.CertificateSigningRequestSpec{
			Request: pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE REQUEST", Bytes: der}), SignerName: certificatesv1.KubeAPIServerClientSignerName,
			Usages: []certificatesv1.KeyUsage{certificatesv1.UsageClientAuth},
		}}
		if err := c.Create(t.Context(), csr); err != nil {
			t.Fatal(err)
		}
		eventually(t, "denial", func() error {
			if err := w.admin.Get(t.Context(), client.ObjectKey{Name: "forever"}, csr); err != nil {
				return err
			}
			for _, d := range csr.Status.Conditions {
				if d.Type == certificatesv1.CertificateApproved {
					t.Fatal("approved")
				}
				if d.Type == certificatesv1.CertificateDenied && d.Reason == "KeystoneUser" {
					return nil
				}
			}
			return fmt.Errorf("%+v", csr.Status)
		})
	})

	t.Run("garbage", func(t *testing.T) {
		for _, tok := range []string{"gAAAAABgarbagegarbagegarbage", "x", strings.Repeat("A", 4000), "eyJhbGciOiJub25lIn0.eyJvcGVuc3RhY2tfbWV0aG9kcyI6WyJwYXNzd29yZCJdLCJzdWIiOiJzeXN0ZW06bWFzdGVycyJ9.x"} {
			nobody(t, tok[:1], tok)
		}
	})

	t.Run("audit names user and project, and no token", func(t *testing.T) {
		tok := token(ann, blue)
		allowed(t, "makes", w.makes(tok, "blue-web"))
		eventually(t, "audit", func() error {
			text, err := os.ReadFile(w.audit)
			if err != nil {
				return err
			}
			if strings.Contains(string(text), tok) {
				t.Fatal("the token is in the audit log")
			}
			for line := range strings.Lines(string(text)) {
				if strings.Contains(line, "keystone:"+ann.ID) && strings.Contains(line, `"hypernetes.io/project":["`+blue+`"]`) && strings.Contains(line, `"hypernetes.io/audit-ids"`) {
					return nil
				}
			}
			return fmt.Errorf("no line of ann's with project %s", blue)
		})
	})

	t.Run("kubectl", func(t *testing.T) { testKubectl(t, w, k, blue, red, ann, bob) })

	t.Run("revoked", func(t *testing.T) {
		// The caches of the API server and of the webhook run out.
		eventually(t, "revocation", func() error {
			_, err := w.who(doomed)
			if apierrors.IsUnauthorized(err) {
				return nil
			}
			return fmt.Errorf("good still: %v", err)
		})
	})

	if fake != nil {
		t.Run("what becomes of projects", func(t *testing.T) { testProjects(t, w, red, token(bob, red)) })
		t.Run("Keystone down", func(t *testing.T) { testDown(t, w, fake, token(ann, blue), token(ann, blue)) })
	}
}

// testDown: who does not come from Keystone does not notice.
func testDown(t *testing.T, w *world, fake *keystonetest.Fake, login1, login2 string) {
	if _, err := w.who(login1); err != nil {
		t.Fatal(err)
	}
	var asked atomic.Int64
	fake.Break(func(w http.ResponseWriter, _ *http.Request) {
		asked.Add(1)
		http.Error(w, "", http.StatusServiceUnavailable)
	})
	// Enough of them to open the breaker.
	var wg sync.WaitGroup
	for _, tok := range []string{login2, login2 + "a", login2 + "b"} {
		wg.Go(func() {
			if _, err := w.who(tok); !apierrors.IsUnauthorized(err) {
				t.Errorf("a token that cannot be checked: %v", err)
			}
		})
	}
	wg.Wait()
	// x509, and impersonation by who has that.
	if err := w.admin.List(t.Context(), &corev1.SecretList{}); err != nil {
		t.Errorf("x509: %v", err)
	}
	asked.Store(0)
	for i := range 50 {
		if _, err := w.who(fmt.Sprintf("gAAAAABgarbagegarbagegarbage%d", i)); !apierrors.IsUnauthorized(err) {
			t.Errorf("garbage: %v", err)
		}
	}
	// One now and then, to see whether it is back.
	if n := asked.Load(); n > 10 {
		t.Errorf("a Keystone that is down was asked %d times for 50 tokens", n)
	}
	fake.Break(nil)
	eventually(t, "Keystone is back", func() error { _, err := w.who(login2); return err })
}

// testProjects: a project that is disabled or deleted is said, its tokens stop, and nothing
// of its tenant goes; a project with the tag gets a Tenant.
func testProjects(t *testing.T, w *world, red, bobRed string) {
	a := w.keystone
	condition := func(name string, status metav1.ConditionStatus, reason string) {
		t.Helper()
		eventually(t, "tenant "+name, func() error {
			o := &v1alpha1.Tenant{}
			if err := w.admin.Get(t.Context(), client.ObjectKey{Name: name}, o); err != nil {
				return err
			}
			c := meta.FindStatusCondition(o.Status.Conditions, "ProjectReady")
			if c == nil || c.Status != status || c.Reason != reason || (status == metav1.ConditionFalse) != (o.Status.Phase == "Degraded") {
				return fmt.Errorf("%+v", o.Status)
			}
			return nil
		})
	}
	condition("red", metav1.ConditionTrue, "Enabled")
	a.Enable("project", red, false)
	condition("red", metav1.ConditionFalse, "ProjectDisabled")
	eventually(t, "its tokens", func() error {
		if _, err := w.who(bobRed); !apierrors.IsUnauthorized(err) {
			return fmt.Errorf("good still: %v", err)
		}
		return nil
	})
	if err := w.admin.Get(t.Context(), client.ObjectKey{Name: "red-web"}, &corev1.Namespace{}); err != nil {
		t.Errorf("the tenant's namespace: %v", err)
	}
	a.Enable("project", red, true)
	condition("red", metav1.ConditionTrue, "Enabled")
	auto := a.Project("default", "auto", "auto"+a.Suffix)
	condition("auto"+a.Suffix+"-"+auto[:8], metav1.ConditionTrue, "Enabled")
	a.Do(http.MethodDelete, "/projects/"+auto, nil, nil)
	condition("auto"+a.Suffix+"-"+auto[:8], metav1.ConditionFalse, "ProjectNotFound")
}
