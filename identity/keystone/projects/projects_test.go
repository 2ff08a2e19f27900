package projects

import (
	"context"
	"slices"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/client/fake"

	v1alpha1 "github.com/hypernetes/hypernetes/api/hypernetes/v1alpha1"
	"github.com/hypernetes/hypernetes/identity/keystone"
	"github.com/hypernetes/hypernetes/identity/keystone/keystonetest"
	"github.com/hypernetes/hypernetes/identity/keystone/login"
)

func tenants(t *testing.T, c client.Client) []v1alpha1.Tenant {
	t.Helper()
	list := &v1alpha1.TenantList{}
	if err := c.List(t.Context(), list); err != nil {
		t.Fatal(err)
	}
	return list.Items
}

func newClient(t *testing.T) client.Client {
	t.Helper()
	s := runtime.NewScheme()
	if err := v1alpha1.AddToScheme(s); err != nil {
		t.Fatal(err)
	}
	return fake.NewClientBuilder().WithScheme(s).Build()
}

// TestProjects: what a Tenant is told of its project, whatever becomes of that.
func TestProjects(t *testing.T) {
	keystonetest.Each(t, func(t *testing.T, k keystonetest.Keystone) {
		a := keystonetest.NewAdmin(t, k)
		domain := a.Domain("dom")
		tag := "auto" + a.Suffix
		blue, red, green := a.Project("default", "Blue & Co."), a.Project(domain, "red", tag), a.Project("default", "red", tag)
		c := newClient(t)
		for name, id := range map[string]string{"blue": blue, "gone": strings.Repeat("0", 32)} {
			if err := c.Create(t.Context(), &v1alpha1.Tenant{ObjectMeta: metav1.ObjectMeta{Name: name}, Spec: v1alpha1.TenantSpec{Keystone: &v1alpha1.KeystoneProject{ProjectID: id}}}); err != nil {
				t.Fatal(err)
			}
		}
		service := keystone.NewService(func() (login.Credentials, error) { return k.Admin, nil }, k.Wrap)
		w := New(service, c, Rule{Tag: tag})
		expect := func(id string, status metav1.ConditionStatus, reason, word string) {
			t.Helper()
			s, r, m := w.Project(id)
			if s != status || r != reason || !strings.Contains(m, word) {
				t.Errorf("%s %s %s, want %s %s …%s…", s, r, m, status, reason, word)
			}
		}
		expect(blue, "", "", "")
		w.Round(t.Context())
		expect(blue, metav1.ConditionTrue, "Enabled", "Blue & Co.")
		expect(strings.Repeat("0", 32), metav1.ConditionFalse, "ProjectNotFound", "cannot log in")

		// Two projects of one name are two tenants.
		var names []string
		for _, x := range tenants(t, c) {
			names = append(names, x.Name)
		}
		want := []string{"blue", "gone", Name(keystone.Project{ID: red, Name: "red" + a.Suffix}), Name(keystone.Project{ID: green, Name: "red" + a.Suffix})}
		slices.Sort(want)
		slices.Sort(names)
		if !slices.Equal(names, want) {
			t.Errorf("tenants %v, want %v", names, want)
		}
		w.Round(t.Context())
		expect(red, metav1.ConditionTrue, "Enabled", domain)

		// Renamed: the same tenant. Disabled, alone or with its domain: said. Deleted: said, and
		// nothing else.
		a.Do("PATCH", "/projects/"+green, map[string]any{"project": map[string]any{"name": "vert" + a.Suffix}}, nil)
		a.Enable("project", blue, false)
		a.Enable("domain", domain, false)
		w.Round(t.Context())
		expect(green, metav1.ConditionTrue, "Enabled", "vert")
		expect(blue, metav1.ConditionFalse, "ProjectDisabled", "Blue")
		expect(red, metav1.ConditionFalse, "DomainDisabled", domain)
		a.Enable("domain", domain, true)
		a.Do("DELETE", "/projects/"+green, nil, nil)
		w.Round(t.Context())
		expect(green, metav1.ConditionFalse, "ProjectNotFound", green)
		expect(red, metav1.ConditionTrue, "Enabled", "")
		if n := len(tenants(t, c)); n != 4 {
			t.Errorf("%d tenants, want 4 still", n)
		}

		// A user who may not ask says so.
		least := a.ServiceUser()
		w = New(keystone.NewService(func() (login.Credentials, error) { return least, nil }, k.Wrap), c, Rule{Tag: tag})
		w.Round(t.Context())
		expect(red, metav1.ConditionUnknown, "NotAllowed", "role admin")
	})
}

// away is a Keystone that does not answer.
type away struct{ Keystone }

func (away) Project(context.Context, string) (keystone.Project, error) {
	return keystone.Project{}, errdefs.ErrUnavailable
}

func TestKeystoneAway(t *testing.T) {
	c := newClient(t)
	id := strings.Repeat("a", 32)
	if err := c.Create(t.Context(), &v1alpha1.Tenant{ObjectMeta: metav1.ObjectMeta{Name: "blue"}, Spec: v1alpha1.TenantSpec{Keystone: &v1alpha1.KeystoneProject{ProjectID: id}}}); err != nil {
		t.Fatal(err)
	}
	w := New(away{}, c, Rule{Tag: "x"})
	w.Round(t.Context())
	if s, r, _ := w.Project(id); s != metav1.ConditionUnknown || r != "KeystoneUnavailable" {
		t.Errorf("%s %s", s, r)
	}
	w.seen[id] = state{metav1.ConditionFalse, "ProjectDisabled", ""}
	w.Round(t.Context())
	if s, _, _ := w.Project(id); s != metav1.ConditionFalse {
		t.Errorf("%s: a disabled project is enabled because Keystone is away", s)
	}
}

func TestParseRule(t *testing.T) {
	for text, want := range map[string]Rule{"": {}, "tag=hypernetes": {Tag: "hypernetes"}, "domain=default": {Domain: "default"}} {
		if got, err := ParseRule(text); err != nil || got != want {
			t.Errorf("%q: %+v %v", text, got, err)
		}
	}
	for _, text := range []string{"tag", "tag=", "name=x", "tag=a,b", "domain=a b"} {
		if got, err := ParseRule(text); !errdefs.IsInvalidArgument(err) {
			t.Errorf("%q: %+v %v", text, got, err)
		}
	}
}

func TestName(t *testing.T) {
	id := "464f6a8920d94963a6da6457f3c96d6e"
	for name, want := range map[string]string{
		"alpha": "alpha-464f6a89", "Blue & Co.": "blue-co-464f6a89", "": "project-464f6a89", "システム": "project-464f6a89",
		"keystone": "keystone-464f6a89", "system:masters": "system-masters-464f6a89", strings.Repeat("x", 300): strings.Repeat("x", 31) + "-464f6a89",
	} {
		if got := Name(keystone.Project{ID: id, Name: name}); got != want || len(got) > 40 {
			t.Errorf("%q: %s, want %s", name, got, want)
		}
	}
}
