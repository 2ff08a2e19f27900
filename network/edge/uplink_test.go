package edge_test

import (
	"testing"

	"github.com/hypernetes/hypernetes/network/edge/edgetest"
)

// Two Networks that somebody else carries, with the same subnets and addresses, on two
// nodes.
func TestUplinkReach(t *testing.T) {
	t.Parallel()
	rig := edgetest.New(t, 2)
	one, two := rig.Nodes[0], rig.Nodes[1]
	edgetest.Echo(t, rig.Outside, "outside", "[::]:80")
	for i, name := range []string{"red", "blue"} {
		n := rig.Carried(name, i+1)
		a := n.Pod(one, "a", "192.168.0.5", "fd00:1::5")
		b := n.Pod(one, "b", "192.168.0.6", "fd00:1::6")
		c := n.Pod(two, "c", "192.168.0.7", "fd00:1::7")
		for _, p := range n.Pods {
			edgetest.Echo(t, p.NS, name+"-"+p.Name, "[::]:80")
		}
		edgetest.Echo(t, n.Carrier.Host, name+"-host", "[::]:80")
		edgetest.Echo(t, n.Carrier.Router, name+"-router", "[::]:80")
		t.Run(name, func(t *testing.T) {
			for _, proto := range []string{"tcp", "udp"} {
				// On one node, across nodes.
				edgetest.Expect(t, a.NS, proto, "192.168.0.6:80", name+"-b 192.168.0.5")
				edgetest.Expect(t, b.NS, proto, "[fd00:1::5]:80", name+"-a fd00:1::6")
				edgetest.Expect(t, a.NS, proto, "192.168.0.7:80", name+"-c 192.168.0.5")
				edgetest.Expect(t, c.NS, proto, "192.168.0.5:80", name+"-a 192.168.0.7")
				edgetest.Expect(t, b.NS, proto, "[fd00:1::7]:80", name+"-c fd00:1::6")
				// The router, and outside by its address.
				edgetest.Expect(t, a.NS, proto, "192.168.0.1:80", name+"-router 192.168.0.5")
				edgetest.Expect(t, a.NS, proto, "[fd00:1::1]:80", name+"-router fd00:1::5")
				edgetest.Expect(t, a.NS, proto, "100.64.0.200:80", "outside "+n.Carrier.External4.String())
				edgetest.Expect(t, c.NS, proto, "[fd00:64::200]:80", "outside "+n.Carrier.External6.String())
				// What is no Pod, both ways.
				edgetest.Expect(t, a.NS, proto, "192.168.0.200:80", name+"-host 192.168.0.5")
				edgetest.Expect(t, c.NS, proto, "[fd00:1::200]:80", name+"-host fd00:1::7")
				edgetest.Expect(t, n.Carrier.Host, proto, "192.168.0.5:80", name+"-a 192.168.0.200")
				edgetest.Expect(t, n.Carrier.Host, proto, "192.168.0.6:80", name+"-b 192.168.0.200")
				edgetest.Expect(t, n.Carrier.Host, proto, "[fd00:1::7]:80", name+"-c fd00:1::200")
				edgetest.Expect(t, n.Carrier.Router, proto, "[fd00:1::5]:80", name+"-a fd00:1::1")
			}
			for _, node := range rig.Nodes {
				if got := n.Carrier.Refused(node); got != "0" {
					t.Errorf("%s: the agent refused %s frames of uplinks", node.Name, got)
				}
			}
		})
	}
}
