package openstack

import (
	"fmt"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/hypernetes/hypernetes/test/e2e/testcloud"
	"github.com/hypernetes/hypernetes/test/e2e/testcluster"
)

// BenchmarkPodStart is how long a Pod takes from when the API server has it until it is
// ready, on a Network of Neutron's beside one of ours, as a container and as a machine, in
// turns on one node, so that the machine's mood hits all alike. The first of each is not
// counted.
//
//	H8S_OPENSTACK=/var/tmp/h8s-openstack scripts/e2e.sh -run '^$' -bench PodStart -benchtime 5x ./test/e2e/openstack
func BenchmarkPodStart(b *testing.B) {
	c := testcloud.Up(b, 1)
	tn := c.TenantOf(b, c.Project(b), append([]string{"--cidr", "192.168.9.0/24"}, light...)...)
	tn.Apply(fmt.Sprintf("apiVersion: hypernetes.io/v1alpha1\nkind: Network\nmetadata: {name: own, namespace: %s}\nspec: {provider: builtin, subnets: {s: {cidr: 10.20.0.0/24}}}\n", tn.Home()))
	tn.Kubectl(b, "-n", tn.Home(), "wait", "network/own", "--for=jsonpath={.status.phase}=Active", "--timeout=240s")
	providers := []string{"neutron", "builtin"}
	spaces := map[string]*testcluster.Namespace{"neutron": tn.Namespace("n", "default"), "builtin": tn.Namespace("b", "own")}
	watches := map[string]*testcluster.Session{}
	for name, n := range spaces {
		watches[name] = n.Start("get", "pods", "--watch", "-o", `jsonpath={.metadata.name} is {.status.phase} {.status.conditions[?(@.type=="Ready")].status};{"\n"}`)
	}
	rounds := 0
	took := map[string][]float64{}
	start := func(provider string, vm bool) {
		n, w := spaces[provider], watches[provider]
		kind := "runc"
		if vm {
			kind = "hyper"
		}
		name := fmt.Sprintf("%s-%d", kind, rounds)
		tn.Apply(pod(n, name, c.Nodes[0], vm))
		// Both times are the watch's: what kubectl itself takes is in neither.
		seen := awaitLine(b, w, name+" is ")
		ready := awaitLine(b, w, name+" is Running True;")
		if rounds > 0 {
			took[kind+"-"+provider] = append(took[kind+"-"+provider], ready.Sub(seen).Seconds())
		}
		n.Kubectl("delete", "pod", name, "--timeout=180s")
	}
	round := func() {
		for _, vm := range []bool{false, true} {
			for _, provider := range providers {
				start(provider, vm)
			}
		}
		slices.Reverse(providers) // nobody is always the first
		rounds++
	}
	round()
	for b.Loop() {
		round()
	}
	var lines []string
	for what, all := range took {
		slices.Sort(all)
		median := all[len(all)/2]
		b.ReportMetric(median, what+"-s")
		lines = append(lines, fmt.Sprintf("| Pod, %s | %.2f (%.2f … %.2f) |", what, median, all[0], all[len(all)-1]))
	}
	slices.Sort(lines)
	b.Logf("%d rounds; seconds from created to ready, median (least … most)\n%s", rounds-1, strings.Join(lines, "\n"))
}

// awaitLine returns when a watch first says something.
func awaitLine(b *testing.B, s *testcluster.Session, text string) time.Time {
	b.Helper()
	s.Expect(regexp.QuoteMeta(text))
	return time.Now()
}
