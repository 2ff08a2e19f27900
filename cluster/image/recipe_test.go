package image

import (
	"strings"
	"testing"
)

func TestParseRecipe(t *testing.T) {
	const good = `
name: shop
tags: [h8s.local/shop:1]
packages: [busybox]
pick: [/bin/busybox]
files:
- {path: /etc/motd, mode: "0600", owner: "1:2", content: hi}
config: {cmd: [sh], ports: ["80", 53/udp], env: [A=b]}
`
	r, err := ParseRecipe("shop.yaml", []byte(good))
	if err != nil {
		t.Fatal(err)
	}
	if r.Name != "shop" || r.Files[0].Owner != "1:2" || len(r.Config.Ports) != 2 {
		t.Errorf("parsed %+v", r)
	}
	for name, tc := range map[string]struct{ text, want string }{
		"unknown field":   {"name: a\ntags: [h.l/a:1]\npackage: [b]", "package"},
		"no tag":          {"name: a", "at least one image reference"},
		"bad tag":         {"name: a\ntags: ['UPPER CASE']", "UPPER CASE"},
		"bad name":        {"name: A/b\ntags: [h.l/a:1]", "lower-case"},
		"own base":        {"name: a\nbase: a\ntags: [h.l/a:1]", "own base"},
		"relative path":   {"name: a\ntags: [h.l/a:1]\nfiles: [{path: etc/x}]", "clean absolute path"},
		"climbing path":   {"name: a\ntags: [h.l/a:1]\nfiles: [{path: /a/../../x}]", "clean absolute path"},
		"climbing zip":    {"name: a\ntags: [h.l/a:1]\nzips: [{path: /x.war, files: {../y: z}}]", "not a relative path"},
		"bad mode":        {"name: a\ntags: [h.l/a:1]\nfiles: [{path: /x, mode: rw}]", "octal"},
		"bad owner":       {"name: a\ntags: [h.l/a:1]\ndirs: [{path: /x, owner: root}]", "want numbers"},
		"two sources":     {"name: a\ntags: [h.l/a:1]\nprograms: [{path: /x, go: ./y, file: z}]", "exactly one"},
		"option injected": {"name: a\ntags: [h.l/a:1]\npackages: [-oDebug::x]", "not a Debian package name"},
		"pick of nothing": {"name: a\ntags: [h.l/a:1]\npick: [/x]", "need packages"},
		"bad port":        {"name: a\ntags: [h.l/a:1]\nconfig: {ports: ['70000']}", "1 to 65535"},
		"bad env":         {"name: a\ntags: [h.l/a:1]\nconfig: {env: [novalue]}", "NAME=VALUE"},
		"bad user":        {"name: a\ntags: [h.l/a:1]\nusers: [{name: 'a:b', uid: 1}]", "usable account"},
	} {
		_, err := ParseRecipe("r.yaml", []byte(tc.text))
		if err == nil || !strings.Contains(err.Error(), tc.want) {
			t.Errorf("%s: error %v, want one with %q", name, err, tc.want)
		}
	}
}

func TestBuiltinRecipesAreSound(t *testing.T) {
	c, err := Builtin()
	if err != nil {
		t.Fatal(err)
	}
	tags := map[string]string{}
	for _, n := range c.Names() {
		if _, err := c.order([]string{n}); err != nil {
			t.Error(err)
		}
		if c[n].Summary == "" {
			t.Errorf("recipe %s has no summary", n)
		}
		for _, tag := range c[n].Tags {
			if other, taken := tags[tag]; taken {
				t.Errorf("tag %s belongs to %s and %s", tag, other, n)
			}
			tags[tag] = n
		}
	}
}

func TestOrder(t *testing.T) {
	c := Catalog{"a": {Name: "a", Base: "b"}, "b": {Name: "b"}, "x": {Name: "x", Base: "y"}, "y": {Name: "y", Base: "x"}, "z": {Name: "z", Base: "q"}}
	got, err := c.order([]string{"a", "b"})
	if err != nil || len(got) != 2 || got[0].Name != "b" || got[1].Name != "a" {
		t.Errorf("order: %v, %v", got, err)
	}
	for _, bad := range []string{"x", "z", "nothing"} {
		if _, err := c.order([]string{bad}); err == nil {
			t.Errorf("order of %s: no error", bad)
		}
	}
}
