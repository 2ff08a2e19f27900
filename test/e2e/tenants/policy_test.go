package tenants

import (
	"fmt"
	"strings"
	"testing"

	"github.com/hypernetes/hypernetes/test/e2e/testcluster"
)

// TestPolicy: policies hold between Pods of one tenant, on one node and on two, and
// `h8s network check` names the rule.
func TestPolicy(t *testing.T) {
	t.Parallel()
	c := up(t)
	tn := c.Tenant(t, light...)
	n, other := tn.Namespace("app", "default"), tn.Namespace("other", "default")
	tn.Apply(join(
		pod{name: "server", node: c.Node, runtime: "runc"}.yaml(n.Name),
		pod{name: "friend", node: c.Node + "-2", runtime: "runc"}.yaml(n.Name),
		pod{name: "stranger", node: c.Node, runtime: "runc"}.yaml(n.Name),
		pod{name: "neighbour", node: c.Node + "-2", runtime: "runc"}.yaml(other.Name),
	))
	n.Ready("server", "friend", "stranger")
	other.Ready("neighbour")
	url := "http://" + n.Get("pod/server", ".status.podIP") + ":8080/hostname"
	for _, from := range []string{"friend", "stranger"} {
		want(t, n, from, url, "server")
	}
	want(t, other, "neighbour", url, "server")

	n.Kubectl("apply", "-f", manifestFile(t, `apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {name: friends-only}
spec:
  podSelector: {matchLabels: {app: server}}
  ingress:
  - from: [{podSelector: {matchLabels: {app: friend}}}]
    ports: [{port: 8080}]
`))
	n.Until("the stranger is kept out", testcluster.Patience, func() bool { return !answers(n, "stranger", url) })
	want(t, n, "friend", url, "server")
	silent(t, other, "neighbour", url)
	for pod, verdict := range map[string]string{"friend": "friends-only", "stranger": "friends-only"} {
		report, err := c.TryH8S("network", "check", n.Name+"/"+pod, n.Name+"/server", "--port", "8080")
		if !strings.Contains(report, verdict) {
			t.Errorf("h8s network check %s: %v\n%s", pod, err, report)
		}
	}
	n.Kubectl("apply", "-f", manifestFile(t, `apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {name: nothing-out}
spec:
  podSelector: {matchLabels: {app: friend}}
  policyTypes: [Egress]
`))
	n.Until("the friend cannot leave", testcluster.Patience, func() bool { return !answers(n, "friend", url) })
	if out, code := n.ExecCode("friend", "/testbox", "lookup", "kubernetes.default"); code == 0 {
		t.Errorf("a question to the resolver is egress too, but it answered %s", out)
	}
	n.Kubectl("delete", "networkpolicy", "--all")
	n.Until("all may talk again", testcluster.Patience, func() bool {
		return answers(n, "friend", url) && answers(n, "stranger", url)
	})
}

// TestPolicyComesFirst: under a policy that denies everything, no Pod gets a packet out
// from its first instruction on.
func TestPolicyComesFirst(t *testing.T) {
	t.Parallel()
	c := up(t)
	tn := c.Tenant(t, light...)
	n, open := tn.Namespace("closed", "default"), tn.Namespace("open", "default")
	tn.Apply(pod{name: "server", node: c.Node, runtime: "runc"}.yaml(open.Name))
	open.Ready("server")
	ip := open.Get("pod/server", ".status.podIP")
	n.Kubectl("apply", "-f", manifestFile(t, "apiVersion: networking.k8s.io/v1\nkind: NetworkPolicy\nmetadata: {name: closed}\nspec: {podSelector: {}, policyTypes: [Ingress, Egress]}\n"))
	var docs []string
	for i := range 20 {
		docs = append(docs, fmt.Sprintf(`apiVersion: v1
kind: Pod
metadata: {name: early-%d, namespace: %s}
spec:
  runtimeClassName: runc
  restartPolicy: Never
  containers: [{name: main, image: "h8s.local/testbox:1", args: [dial, tcp, "%s:8081"], resources: {requests: {cpu: 1m, memory: 8Mi}}}]
`, i, n.Name, ip))
	}
	tn.Apply(join(docs...))
	for i := range 20 {
		name := fmt.Sprintf("pod/early-%d", i)
		n.Wait(name, "jsonpath={.status.containerStatuses[0].state.terminated}")
		if code := n.Get(name, ".status.containerStatuses[0].state.terminated.exitCode"); code == "0" {
			t.Errorf("%s got through", name)
		}
	}
}
