package admission

import (
	"net/netip"
	"strings"
	"testing"
)

func testOptions() Options {
	return Options{
		WebhookAddress: "127.0.0.1:9643",
		ServiceCIDRs:   []netip.Prefix{netip.MustParsePrefix("10.96.0.0/12"), netip.MustParsePrefix("fd00:10:96::/108")},
		ReservedCIDRs:  []netip.Prefix{netip.MustParsePrefix("100.64.0.0/24"), netip.MustParsePrefix("10.244.0.0/16")},
		ClusterDomain:  "cluster.local",
		FabricMTU:      1500,
	}
}

// Every policy refuses when it cannot be evaluated, is in effect, and never concerns the
// cluster's own namespaces.
func TestPolicies(t *testing.T) {
	objects, err := desired(testOptions(), []byte("ca"))
	if err != nil {
		t.Fatal(err)
	}
	seen := map[string]bool{}
	for _, o := range objects {
		if seen[key(o)] {
			t.Errorf("%s is there twice", key(o))
		}
		seen[key(o)] = true
	}
	for k := range seen {
		kind, name, _ := strings.Cut(k, "/")
		if strings.HasSuffix(kind, "Policy") && !seen[kind+"Binding/"+name] {
			t.Errorf("%s has no binding", k)
		}
	}
	for _, o := range objects {
		spec, _ := o.Object["spec"].(map[string]any)
		if strings.HasSuffix(o.GetKind(), "Policy") && spec["failurePolicy"] != "Fail" {
			t.Errorf("%s: failurePolicy %v", key(o), spec["failurePolicy"])
		}
		hooks, _ := o.Object["webhooks"].([]any)
		for _, h := range hooks {
			m := h.(map[string]any)
			if m["timeoutSeconds"] != int64(5) || m["sideEffects"] != "None" {
				t.Errorf("%s: %v", key(o), m)
			}
			if (m["failurePolicy"] != "Fail") != (m["name"] == "injection.hypernetes.io") {
				t.Errorf("%s: failurePolicy %v of %v", key(o), m["failurePolicy"], m["name"])
			}
		}
	}
}
