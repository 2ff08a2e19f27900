package edge_test

import (
	"testing"

	"github.com/hypernetes/hypernetes/network/edge/edgetest"
)

// Two Networks with the same subnets and the same Pod addresses, on two nodes.
func TestReach(t *testing.T) {
	rig := edgetest.New(t, 2)
	one, two := rig.Nodes[0], rig.Nodes[1]
	edgetest.Echo(t, one.NS, "api", "[::]:6443")
	edgetest.Echo(t, rig.Outside, "outside", "[::]:80")
	for i, name := range []string{"red", "blue"} {
		n := rig.Network(name, uint32(4097+i))
		a := n.Pod(one, "a", "192.168.0.5", "fd00:1::5")
		b := n.Pod(one, "b", "192.168.0.6", "fd00:1::6")
		c := n.Pod(two, "c", "192.168.0.7", "fd00:1::7")
		for _, p := range n.Pods {
			edgetest.Echo(t, p.NS, name+"-"+p.Name, "[::]:80")
		}
		t.Run(name, func(t *testing.T) {
			for _, proto := range []string{"tcp", "udp"} {
				edgetest.Expect(t, a.NS, proto, "192.168.0.6:80", name+"-b 192.168.0.5")
				edgetest.Expect(t, a.NS, proto, "192.168.0.7:80", name+"-c 192.168.0.5")
				edgetest.Expect(t, c.NS, proto, "192.168.0.5:80", name+"-a 192.168.0.7")
				edgetest.Expect(t, b.NS, proto, "[fd00:1::5]:80", name+"-a fd00:1::6")
				edgetest.Expect(t, b.NS, proto, "[fd00:1::7]:80", name+"-c fd00:1::6")
				// Outside by the node's address.
				edgetest.Expect(t, a.NS, proto, "100.64.0.200:80", "outside 100.64.0.1")
				edgetest.Expect(t, c.NS, proto, "100.64.0.200:80", "outside 100.64.0.2")
				edgetest.Expect(t, a.NS, proto, "[fd00:64::200]:80", "outside fd00:64::1")
			}
		})
	}
}
