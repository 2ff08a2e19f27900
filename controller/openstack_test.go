package controller

import (
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
)

func TestOpenStackFlags(t *testing.T) {
	base := []string{"--kubeconfig=k", "--webhook-address="}
	cloud := []string{"--openstack-cloud-config=/etc/openstack/clouds.yaml", "--openstack-cloud=service"}
	for name, c := range map[string]struct {
		args []string
		says string
	}{
		"none":             {nil, ""},
		"projects only":    {cloud, ""},
		"all":              {append(cloud, "--keystone-webhook-address=127.0.0.1:9646", "--keystone-webhook-cert=c", "--keystone-webhook-key=k", "--keystone-roles=member=manager", "--keystone-tenants=tag=hypernetes"), ""},
		"no cloud":         {cloud[:1], "--openstack-cloud"},
		"no file":          {cloud[1:], "--openstack-cloud-config"},
		"webhook alone":    {[]string{"--keystone-webhook-address=127.0.0.1:9646"}, "--openstack-cloud-config"},
		"webhook, no cert": {append(cloud, "--keystone-webhook-address=127.0.0.1:9646"), "--keystone-webhook-cert"},
		"no port":          {append(cloud, "--keystone-webhook-address=127.0.0.1"), "--keystone-webhook-address"},
		"roles":            {append(cloud, "--keystone-roles=member=admin"), "--keystone-roles"},
		"tenants":          {append(cloud, "--keystone-tenants=name=x"), "--keystone-tenants"},
	} {
		_, err := Flags(append(append([]string{}, base...), c.args...), io.Discard)
		if (c.says == "") != (err == nil) || (err != nil && (!errdefs.IsInvalidArgument(err) || !strings.Contains(err.Error(), c.says))) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func TestCredentialsAreForOneReader(t *testing.T) {
	file := filepath.Join(t.TempDir(), "clouds.yaml")
	if err := os.WriteFile(file, []byte(`{clouds: {service: {auth: {auth_url: "http://k:5000", user_id: u, password: x, project_id: p}}}}`), 0o644); err != nil {
		t.Fatal(err)
	}
	o := OpenStack{CloudConfig: file, Cloud: "service"}
	if _, err := o.credentials(); !errdefs.IsInvalidArgument(err) || !strings.Contains(err.Error(), "chmod 600") {
		t.Errorf("%v", err)
	}
	if err := os.Chmod(file, 0o600); err != nil {
		t.Fatal(err)
	}
	if c, err := o.credentials(); err != nil || c.UserID != "u" {
		t.Errorf("%v %v", c, err)
	}
}
