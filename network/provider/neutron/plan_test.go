package neutron

import (
	"encoding/json"
	"flag"
	"os"
	"path/filepath"
	"testing"

	"github.com/google/go-cmp/cmp"

	v1alpha1 "github.com/hypernetes/hypernetes/api/hypernetes/v1alpha1"
)

var write = flag.Bool("write", false, "write testdata anew")

func golden(t *testing.T, name string, steps []step) {
	t.Helper()
	text := ""
	for _, s := range steps {
		b, err := json.Marshal(s.Body)
		if err != nil {
			t.Fatal(err)
		}
		text += s.Verb + " " + s.Kind + " " + s.ID + "\n\t" + string(b) + "\n"
		if s.Why != "" {
			text += "\twhy: " + s.Why + "\n"
		}
	}
	path := filepath.Join("testdata", name+".golden")
	if *write {
		if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if d := cmp.Diff(string(want), text); d != "" {
		t.Error(d)
	}
}

func TestPlan(t *testing.T) {
	no, yes, gw4, other := false, true, "10.0.0.1", "10.0.0.9"
	base := wish{
		Mark: "hypernetes cluster=c uid=u", Tags: []string{"a", "b"}, Name: "h8s.blue.net", Project: "p", External: "ext",
		Subnets: []v1alpha1.SubnetStatus{{Name: "a", CIDR: "10.0.0.0/24", Gateway: gw4}, {Name: "b", CIDR: "fd00::/64", Gateway: "fd00::1"}},
	}
	o := func(id string) object {
		return object{ID: id, Description: base.Mark, Project: "p", Tags: []string{"b", "a"}, AdminUp: &yes}
	}
	whole := func() sight {
		gw6 := "fd00:0::1"
		return sight{
			Network: &network{object: o("n"), MTU: 1450, PortSecurity: &yes},
			Subnets: []subnetwork{{object: o("s4"), Network: "n", CIDR: "10.0.0.0/24", Gateway: &gw4}, {object: o("s6"), Network: "n", CIDR: "fd00:0:0::/64", Gateway: &gw6}},
			Router:  &router{object: o("r"), Gateway: &gateway{"ext"}}, Interfaces: []string{"s6", "s4"},
			Group: &group{object: o("g"), Rules: families},
		}
	}
	drifted := whole()
	drifted.Network.AdminUp, drifted.Network.PortSecurity, drifted.Network.Tags = &no, &no, nil
	drifted.Subnets[0].Gateway, drifted.Subnets[0].DHCP = &other, true
	drifted.Router.Gateway, drifted.Interfaces = nil, []string{"s4"}
	tcp := "tcp"
	drifted.Group.Rules = []rule{families[0], families[2], {Direction: "ingress", Family: "IPv6", Protocol: &tcp}, families[3]}
	knows := base
	knows.Known = known{"n", "r", "g"}
	knows.Subnets = []v1alpha1.SubnetStatus{{Name: "a", CIDR: "10.0.0.0/24", Gateway: gw4, ProviderSubnetID: "s4"}, {Name: "b", CIDR: "fd00::/64", Gateway: "fd00::1", ProviderSubnetID: "s6"}}
	mtu := base
	mtu.MTU, mtu.TagsAtOnce = 1300, true
	inward := knows
	inward.External = ""
	adopted := base
	adopted.Adopted, adopted.Subnets, adopted.External = true, nil, ""
	bare := whole()
	bare.Subnets, bare.Interfaces, bare.Router, bare.Group = nil, nil, nil, nil
	for name, x := range map[string]struct {
		w wish
		s sight
	}{
		"nothing": {base, sight{}}, "nothing-mtu-tags": {mtu, sight{}}, "network-only": {base, bare}, "whole": {knows, whole()},
		"drifted": {knows, drifted}, "gone": {knows, sight{}}, "inward": {inward, whole()}, "adopted": {adopted, sight{Network: &network{object: o("theirs")}}},
	} {
		t.Run(name, func(t *testing.T) { golden(t, name, plan(x.w, x.s)) })
	}
}

func TestPlanPort(t *testing.T) {
	yes, no := true, false
	text := func(s string) *string { return &s }
	base := portWish{
		Mark: "m", Name: "h8s.blue.web.p.eth0", Project: "p", Tags: []string{"a"}, Network: "n", Group: "g", Fixed: []fixedIP{{"s4", "10.0.0.5"}, {"s6", "fd00::5"}},
		Host: "n1", Device: "pod", Known: "id",
	}
	whole := func() *port {
		return &port{
			object: object{ID: "id", Description: "m", Project: "p", Tags: []string{"a"}, AdminUp: &yes}, Network: "n", MAC: "fa:16:3e:00:00:01",
			Fixed: []fixedIP{{"s6", "fd00:0::5"}, {"s4", "10.0.0.5"}}, DeviceID: "pod", DeviceOwner: deviceOwner, Groups: []string{"g"}, PortSecurity: &yes, Host: text("n1"), VIFType: text("bridge"),
		}
	}
	with := func(f func(*port)) *port { p := whole(); f(p); return p }
	fresh, mac, claimed := base, base, base
	fresh.Known = ""
	fresh.MAC, fresh.TagsAtOnce = "02:00:00:00:00:01", true
	mac.MAC = "02:00:00:00:00:01"
	claimed.Host, claimed.Device = "", ""
	for name, x := range map[string]struct {
		w portWish
		h *port
	}{
		"port-new": {fresh, nil}, "port-gone": {base, nil}, "port-whole": {base, whole()}, "port-mac": {mac, whole()},
		"port-edited": {base, with(func(p *port) {
			p.Fixed, p.Groups, p.Pairs, p.PortSecurity, p.DeviceOwner, p.Host, p.AdminUp, p.Tags = p.Fixed[:1], []string{"x"}, []json.RawMessage{[]byte("{}")}, &no, "compute:x", text("n2"), &no, nil
		})},
		"port-failed":  {base, with(func(p *port) { p.VIFType = text(bindingFailed) })},
		"port-unplug":  {claimed, whole()},
		"port-claimed": {claimed, with(func(p *port) { p.Host, p.VIFType, p.DeviceID = text(""), text(unbound), "" })},
		"port-adopted": {fresh, with(func(p *port) { p.MAC, p.Tags = "02:00:00:00:00:01", nil })},
	} {
		t.Run(name, func(t *testing.T) { golden(t, name, planPort(x.w, x.h)) })
	}
}
