package cinder

import (
	"encoding/json"
	"maps"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"testing"

	"github.com/containerd/errdefs"

	"github.com/hypernetes/hypernetes/volume/backend/cinder/cindertest"
	"github.com/hypernetes/hypernetes/volume/record"
)

const someID = "123e4567-e89b-42d3-a456-426614174000"

var known = translator{
	exports: map[string]string{"10.0.0.3:/srv": "/mnt/cinder"}, keys: map[string]string{"cinder": cindertest.Key}, initiator: "iqn.2015-06.io.hypernetes:x:node-1",
}

// Connections as Cinder's drivers make them, of release Zed.
var (
	rbdInfo = `{"name": "volumes/volume-` + someID + `", "hosts": ["10.250.0.1", "[fd00::1]", "mon.example"], "ports": ["6789", 3300, "6789"], "cluster_name": "ceph",
		"auth_enabled": true, "auth_username": "cinder", "secret_type": "ceph", "secret_uuid": null, "volume_id": "x", "discard": true, "qos_specs": null,
		"access_mode": "rw", "encrypted": false, "cacheable": false, "driver_volume_type": "rbd", "attachment_id": "y"}`
	iscsiInfo = `{"target_discovered": false, "target_portal": "10.0.0.2:3260", "target_iqn": "iqn.2010-10.org.openstack:volume-x", "target_lun": 1, "volume_id": "x",
		"auth_method": "CHAP", "auth_username": "u1", "auth_password": "p w", "qos_specs": {"total_iops_sec": "500", "read_bytes_sec": 1048576, "size_iops_sec": "4096"},
		"access_mode": "ro", "encrypted": false, "driver_volume_type": "iscsi"}`
	nfsInfo = `{"export": "10.0.0.3:/srv", "name": "volume-` + someID + `", "options": null, "format": "raw", "mount_point_base": "/x", "qos_specs": null, "access_mode": "rw",
		"encrypted": false, "driver_volume_type": "nfs"}`
)

func TestTranslate(t *testing.T) {
	for raw, want := range map[string]connection{
		rbdInfo: {
			source:  record.Source{RBD: &record.RBD{Pool: "volumes", Image: "volume-" + someID, User: "cinder", Monitors: []string{"10.250.0.1:6789", "[fd00::1]:3300", "mon.example:6789"}}},
			secrets: map[string][]byte{record.SecretKey: []byte(cindertest.Key)},
		},
		iscsiInfo: {
			source:  record.Source{ISCSI: &record.ISCSI{Portal: "10.0.0.2:3260", Target: "iqn.2010-10.org.openstack:volume-x", LUN: 1, Initiator: known.initiator, User: "u1"}},
			secrets: map[string][]byte{record.SecretPassword: []byte("p w")}, throttle: &record.Throttle{IOPS: 500, ReadBPS: 1 << 20}, readOnly: true,
		},
		nfsInfo: {source: record.Source{File: &record.File{Path: "/mnt/cinder/volume-" + someID}}, secrets: map[string][]byte{}},
	} {
		got, err := known.translate([]byte(raw))
		if err != nil || !reflect.DeepEqual(got, want) {
			t.Errorf("%+v, want %+v: %v", got, want, err)
		}
	}
}

// TestRefused: what is not understood is refused, by name, with what to do.
func TestRefused(t *testing.T) {
	for name, x := range map[string]struct {
		of     string
		change map[string]any
		text   string
	}{
		"fibre channel":    {rbdInfo, map[string]any{"driver_volume_type": "fibre_channel"}, `"fibre_channel"`},
		"nvme":             {rbdInfo, map[string]any{"driver_volume_type": "nvmeof"}, "rbd, iscsi or nfs"},
		"no driver":        {rbdInfo, map[string]any{"driver_volume_type": nil}, `""`},
		"encrypted":        {rbdInfo, map[string]any{"encrypted": true}, "LUKS"},
		"access":           {rbdInfo, map[string]any{"access_mode": "rx"}, "access_mode"},
		"pool":             {rbdInfo, map[string]any{"name": "volume-1"}, "pool/image"},
		"namespace":        {rbdInfo, map[string]any{"name": "a/b/c"}, "pool/image"},
		"snapshot":         {rbdInfo, map[string]any{"name": "a/b@c"}, "pool/image"},
		"options":          {rbdInfo, map[string]any{"name": "a/b:conf=/tmp/x"}, "pool/image"},
		"no monitors":      {rbdInfo, map[string]any{"hosts": []any{}, "ports": []any{}}, "hosts"},
		"ports":            {rbdInfo, map[string]any{"ports": []any{"1"}}, "hosts"},
		"port":             {rbdInfo, map[string]any{"ports": []any{"1", "2", "70000"}}, "ports"},
		"port text":        {rbdInfo, map[string]any{"ports": []any{"1", "2", "x"}}, "whole number"},
		"host":             {rbdInfo, map[string]any{"hosts": []any{"a", "b", "c;d"}}, "hosts"},
		"user":             {rbdInfo, map[string]any{"auth_username": "a b"}, "auth_username"},
		"no key":           {rbdInfo, map[string]any{"auth_username": "glance"}, "ceph.keyrings"},
		"keyring":          {rbdInfo, map[string]any{"keyring": "[client.cinder]\nkey = x"}, "keyring"},
		"keyring of other": {rbdInfo, map[string]any{"keyring": "[client.other]\nkey = " + cindertest.Key}, "no key"},
		"portal":           {iscsiInfo, map[string]any{"target_portal": "10.0.0.2"}, "target_portal"},
		"target":           {iscsiInfo, map[string]any{"target_iqn": "volume"}, "target_iqn"},
		"lun":              {iscsiInfo, map[string]any{"target_lun": -1}, "target_lun"},
		"auth":             {iscsiInfo, map[string]any{"auth_method": "SRP"}, "auth_method"},
		"password":         {iscsiInfo, map[string]any{"auth_password": "a\nb"}, "not shown"},
		"both limits":      {iscsiInfo, map[string]any{"qos_specs": map[string]any{"total_iops_sec": "1", "read_iops_sec": "2"}}, "not both"},
		"limit":            {iscsiInfo, map[string]any{"qos_specs": map[string]any{"total_iops_sec": "-1"}}, "qos_specs total_iops_sec"},
		"export":           {nfsInfo, map[string]any{"export": "10.0.0.3:/other"}, "exports of --cinder-config"},
		"export text":      {nfsInfo, map[string]any{"export": "/srv"}, "host:/path"},
		"name":             {nfsInfo, map[string]any{"name": "../../etc/shadow"}, "volume-<UUID>"},
		"overlay":          {nfsInfo, map[string]any{"name": "volume-" + someID + "." + someID}, "snapshots"},
		"qcow2":            {nfsInfo, map[string]any{"format": "qcow2"}, "qcow2"},
		"no format":        {nfsInfo, map[string]any{"format": nil}, "raw"},
	} {
		in := map[string]any{}
		if err := json.Unmarshal([]byte(x.of), &in); err != nil {
			t.Fatal(err)
		}
		maps.Copy(in, x.change)
		raw, _ := json.Marshal(in)
		_, err := known.translate(raw)
		if err == nil || !strings.Contains(err.Error(), x.text) || !errdefs.IsInvalidArgument(err) && !errdefs.IsNotImplemented(err) && !errdefs.IsFailedPrecondition(err) {
			t.Errorf("%s: %v", name, err)
		}
		if err != nil && (strings.Contains(err.Error(), "p w") || strings.Contains(err.Error(), cindertest.Key)) {
			t.Errorf("%s: the error tells a secret: %v", name, err)
		}
	}
	for _, raw := range []string{"", "null", "[]", "{}", "x", `{"driver_volume_type": {}}`, strings.Repeat(" ", maxInfo+1)} {
		if _, err := known.translate([]byte(raw)); err == nil {
			t.Errorf("%.20q is a connection", raw)
		}
	}
}

func FuzzTranslate(f *testing.F) {
	for _, s := range []string{rbdInfo, iscsiInfo, nfsInfo, "null"} {
		f.Add([]byte(s))
	}
	f.Fuzz(func(t *testing.T, raw []byte) {
		got, err := known.translate(raw)
		if err != nil {
			if len(err.Error()) > 2048 {
				t.Errorf("an error of %d bytes", len(err.Error()))
			}
			return
		}
		n := 0
		if r := got.source.RBD; r != nil {
			n++
			if strings.ContainsAny(r.Pool+r.Image+r.User, "/@: \n\x00") || len(r.Monitors) == 0 {
				t.Errorf("%+v", r)
			}
		}
		if i := got.source.ISCSI; i != nil {
			n++
			if i.LUN < 0 || i.LUN > maxLUN || strings.ContainsAny(i.Target+i.User+i.Portal, " /\n\x00") {
				t.Errorf("%+v", i)
			}
		}
		if p := got.source.File; p != nil {
			n++
			if !strings.HasPrefix(p.Path, "/mnt/cinder/volume-") || strings.Contains(p.Path, "..") {
				t.Errorf("%+v", p)
			}
		}
		if n != 1 {
			t.Errorf("%d sources", n)
		}
	})
}

func TestKeyring(t *testing.T) {
	keys, err := ParseKeyring([]byte("# a comment\n[mon.]\n\tkey = AQAmon\n[client.cinder]\n\tkey = " + cindertest.Key + "\n\tcaps mon = \"profile rbd\"\n[client.admin]\nkey=" + cindertest.Key + "\n"))
	if err != nil || len(keys) != 2 || keys["cinder"] != cindertest.Key || keys["admin"] != cindertest.Key {
		t.Errorf("%v %v", keys, err)
	}
	for _, bad := range []string{"[client.a b]", "[client.a]\nkey", "[client.a]\nkey = AAAA", "[client.a]\nkey = ????????????????????"} {
		if _, err := ParseKeyring([]byte(bad)); !errdefs.IsInvalidArgument(err) || strings.Contains(err.Error(), "AAAA") {
			t.Errorf("%q: %v", bad, err)
		}
	}
}

func FuzzKeyring(f *testing.F) {
	f.Add([]byte("[client.cinder]\nkey = " + cindertest.Key))
	f.Fuzz(func(t *testing.T, b []byte) {
		keys, err := ParseKeyring(b)
		for user, key := range keys {
			if err == nil && (!cephPattern.MatchString(user) || len(key) > maxSecret) {
				t.Errorf("%q", user)
			}
		}
	})
}

func TestConfig(t *testing.T) {
	dir := t.TempDir()
	write := func(name, text string, mode os.FileMode) string {
		path := filepath.Join(dir, name)
		if err := os.WriteFile(path, []byte(text), mode); err != nil {
			t.Fatal(err)
		}
		return path
	}
	keyring := write("keyring", "[client.cinder]\nkey = "+cindertest.Key, 0o600)
	wide := write("wide", "[client.cinder]\nkey = "+cindertest.Key, 0o644)
	text := "role: volumes\nexports:\n  10.0.0.3:/srv: /mnt/b\n  '[fd00::1]:/a': /mnt/a\n  10.0.0.4:/srv: /mnt/b\nceph:\n  conf: /etc/ceph/ceph.conf\n  keyrings: [" + keyring + "]\n"
	c, err := ReadConfig(write("good", text, 0o644))
	if err != nil || !slices.Equal(c.Roots(), []string{"/mnt/a", "/mnt/b"}) {
		t.Fatalf("%+v %v", c, err)
	}
	var o Options
	if err := c.Apply(&o); err != nil {
		t.Fatal(err)
	}
	f, _ := o.Fence.(*Ceph)
	if o.Role != "volumes" || o.Keys["cinder"] != cindertest.Key || f == nil || f.User != "cinder" || f.Keyring != keyring {
		t.Errorf("%+v", o)
	}
	if c, err := ReadConfig(""); err != nil || c.Apply(&Options{}) != nil {
		t.Errorf("%v", err)
	}
	for bad, want := range map[string]string{
		"exports: {/srv: /mnt}": "HOST:/PATH", "exports: {'10.0.0.3:/srv': mnt}": "absolute", "exports: {'10.0.0.3:/srv': /}": "absolute",
		"ceph: {conf: /x}": "ceph.keyrings", "ceph: {keyrings: [x]}": "absolute", "ceph: {keyrings: [/x], user: 'a b'}": "ceph.user", "unknown: 1": "unknown", "[]": "",
	} {
		if _, err := ReadConfig(write("bad", bad, 0o644)); !errdefs.IsInvalidArgument(err) || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v", bad, err)
		}
	}
	for bad, want := range map[string]CephConfig{
		"chmod 600": {Keyrings: []string{wide}}, "no such file": {Keyrings: []string{"/nowhere/keyring"}}, "no key": {Keyrings: []string{keyring}, Conf: "/x", User: "admin"},
	} {
		if err := (Config{Ceph: &want}).Apply(&Options{}); !errdefs.IsInvalidArgument(err) || !strings.Contains(err.Error(), bad) {
			t.Errorf("%+v: %v", want, err)
		}
	}
}

func TestClients(t *testing.T) {
	got, err := clients([]byte(`{"watchers":[{"address":"127.0.0.1:0/1264481819","client":4123,"cookie":94},{"address":"[fd00::1]:0/1","client":1,"cookie":2},{"address":"v1:10.0.0.1:0/3"}]}`))
	if err != nil || len(got) != 3 || got[0] != "127.0.0.1:0/1264481819" {
		t.Errorf("%v %v", got, err)
	}
	for _, bad := range []string{"", "[]", `{"watchers":[{"address":"--help"}]}`, `{"watchers":[{"address":""}]}`} {
		if _, err := clients([]byte(bad)); err == nil {
			t.Errorf("%q", bad)
		}
	}
}
