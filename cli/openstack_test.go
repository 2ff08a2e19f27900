package cli

import (
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/spf13/pflag"

	"github.com/hypernetes/hypernetes/cluster/settings"
)

// TestOpenStackFlags: what is given is put into the settings there are, what is not stays,
// and what h8s-controller could not work with is refused.
func TestOpenStackFlags(t *testing.T) {
	file := filepath.Join(t.TempDir(), "clouds.yaml")
	text := "clouds: {service: {auth: {auth_url: \"http://192.0.2.1:5000/v3\", username: u, password: p, user_domain_name: Default, project_name: p, project_domain_name: Default}}}"
	if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	open := filepath.Join(t.TempDir(), "open.yaml")
	if err := os.WriteFile(open, []byte(text), 0o640); err != nil {
		t.Fatal(err)
	}
	had := settings.OpenStack{CloudConfig: file, Cloud: "service", KeystoneTenants: "tag=h8s"}
	for name, c := range map[string]struct {
		had  *settings.OpenStack
		args []string
		want *settings.OpenStack
		says string
	}{
		"none":              {nil, nil, nil, ""},
		"first":             {nil, []string{"--openstack-cloud-config", file, "--openstack-cloud=service"}, &settings.OpenStack{CloudConfig: file, Cloud: "service"}, ""},
		"kept":              {&had, nil, &had, ""},
		"networks":          {&had, []string{"--network-provider=neutron", "--openstack-external-network=public"}, &settings.OpenStack{CloudConfig: file, Cloud: "service", KeystoneTenants: "tag=h8s", Networks: "neutron", External: "public"}, ""},
		"octavia":           {&had, []string{"--octavia-provider=ovn"}, &settings.OpenStack{CloudConfig: file, Cloud: "service", KeystoneTenants: "tag=h8s", Octavia: "ovn"}, ""},
		"octavia's spaces":  {&had, []string{"--octavia-provider=o vn"}, nil, "octavia-provider"},
		"removed":           {&had, []string{"--openstack-cloud-config=", "--openstack-cloud="}, nil, ""},
		"builtin alone":     {nil, []string{"--network-provider=builtin"}, nil, ""},
		"neutron alone":     {nil, []string{"--network-provider=neutron"}, nil, "--openstack-cloud-config"},
		"no such provider":  {&had, []string{"--network-provider=calico"}, nil, "calico"},
		"no such profile":   {&had, []string{"--openstack-profile=root"}, nil, "root"},
		"no such cloud":     {&had, []string{"--openstack-cloud=other"}, nil, "other"},
		"no cloud":          {nil, []string{"--openstack-cloud-config", file}, nil, "want both"},
		"no such file":      {&had, []string{"--openstack-cloud-config", file + "x"}, nil, "no such file"},
		"others may read":   {&had, []string{"--openstack-cloud-config", open}, nil, "chmod 600"},
		"hidden from nodes": {&had, []string{"--openstack-cloud-config=/run/clouds.yaml"}, nil, "/run"},
	} {
		s := settings.Node{Name: "x", APIPort: 6443, NodeIP: settings.IsolatedIP}
		if c.had != nil {
			copied := *c.had
			s.OpenStack = &copied
		}
		o := &nodeOptions{}
		f := pflag.NewFlagSet("up", pflag.ContinueOnError)
		o.addOpenStack(f)
		if err := f.Parse(c.args); err != nil {
			t.Fatal(err)
		}
		err := o.mergeOpenStack(&s, f)
		if c.says != "" {
			if err == nil || !errdefs.IsInvalidArgument(err) && !errdefs.IsNotFound(err) || !strings.Contains(err.Error(), c.says) {
				t.Errorf("%s: %v, want an error that says %q", name, err, c.says)
			}
			continue
		}
		if err != nil || !reflect.DeepEqual(s.OpenStack, c.want) {
			t.Errorf("%s: %+v, %v; want %+v", name, s.OpenStack, err, c.want)
		}
	}
}
