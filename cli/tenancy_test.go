package cli

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"errors"
	"flag"
	"fmt"
	"io"
	"maps"
	"math/big"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"sigs.k8s.io/yaml"

	"github.com/hypernetes/hypernetes/cluster/kubeconfig"
)

var update = flag.Bool("update", false, "write testdata/*.golden")

// fakeAPI is as much of an API server as these commands see: objects by path, and a
// controller that is called when one is written.
type fakeAPI struct {
	t          *testing.T
	server     *httptest.Server
	kubeconfig string
	mu         sync.Mutex
	objects    map[string]map[string]any
	// control sees every write after it was stored, with the lock held.
	control func(method, path string, o map[string]any)
	// deny refuses what it returns a message for, with 403.
	deny func(method, path string) string
	log  []string
}

// newFakeAPI holds the objects of a YAML stream: "path: object".
func newFakeAPI(t *testing.T, stored string) *fakeAPI {
	t.Helper()
	f := &fakeAPI{t: t, objects: map[string]map[string]any{}}
	if err := yaml.Unmarshal([]byte(discovery+stored), &f.objects); err != nil {
		t.Fatal(err)
	}
	f.server = httptest.NewTLSServer(f)
	t.Cleanup(f.server.Close)
	f.kubeconfig = filepath.Join(t.TempDir(), "kubeconfig")
	ca := pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: f.server.Certificate().Raw})
	if err := kubeconfig.Write(f.kubeconfig, kubeconfig.Entry{Name: "fake", Server: f.server.URL, CA: ca, Token: "secret"}); err != nil {
		t.Fatal(err)
	}
	return f
}

const discovery = `
/api/v1: {resources: [{name: pods, kind: Pod, namespaced: true}, {name: services, kind: Service, namespaced: true}, {name: services/status, kind: Service, namespaced: true}, {name: namespaces, kind: Namespace}]}
/apis/apps/v1: {resources: [{name: deployments, kind: Deployment, namespaced: true}]}
/apis/hypernetes.io/v1alpha1: {resources: [{name: tenants, kind: Tenant}, {name: networks, kind: Network, namespaced: true}, {name: tenantnamespaces, kind: TenantNamespace, namespaced: true}]}
`

var collections = []string{"tenants", "networks", "tenantnamespaces", "ports", "floatingips", "pods", "services", "events", "leases", "persistentvolumeclaims", "networkpolicies", "certificatesigningrequests"}

func (f *fakeAPI) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	f.mu.Lock()
	defer f.mu.Unlock()
	path := r.URL.Path
	fail := func(code int, message string) {
		w.WriteHeader(code)
		json.NewEncoder(w).Encode(map[string]any{"kind": "Status", "message": message})
	}
	if r.Header.Get("Authorization") != "Bearer secret" {
		fail(401, "Unauthorized")
		return
	}
	if f.deny != nil {
		if m := f.deny(r.Method, path); m != "" {
			fail(403, m)
			return
		}
	}
	if r.Method != http.MethodGet {
		f.log = append(f.log, r.Method+" "+r.URL.RequestURI())
	}
	var body map[string]any
	if b, _ := io.ReadAll(r.Body); len(b) > 0 {
		if err := json.Unmarshal(b, &body); err != nil {
			fail(400, err.Error())
			return
		}
	}
	switch r.Method {
	case http.MethodGet:
		if o, ok := f.objects[path]; ok {
			json.NewEncoder(w).Encode(o)
			return
		}
		parts := strings.Split(path, "/")
		resource := parts[len(parts)-1]
		if !slices.Contains(collections, resource) {
			fail(404, path+" not found")
			return
		}
		prefix := strings.TrimSuffix(path, resource)
		items := []any{}
		for _, k := range slices.Sorted(maps.Keys(f.objects)) {
			rest, ok := strings.CutPrefix(k, prefix)
			if tail := strings.Split(rest, "/"); ok && (len(tail) == 2 && tail[0] == resource || len(tail) == 4 && tail[0] == "namespaces" && tail[2] == resource) {
				items = append(items, f.objects[k])
			}
		}
		json.NewEncoder(w).Encode(map[string]any{"kind": "List", "items": items})
	case http.MethodPost:
		path += "/" + body["metadata"].(map[string]any)["name"].(string)
		if f.objects[path] != nil {
			fail(409, "already exists")
			return
		}
		f.store(r.Method, path, body)
		json.NewEncoder(w).Encode(body)
	case http.MethodPatch:
		if r.Header.Get("Content-Type") == "application/merge-patch+json" {
			if f.objects[path] == nil {
				fail(404, path+" not found")
				return
			}
			merge(f.objects[path], body)
			body = f.objects[path]
		}
		f.store(r.Method, path, body)
		json.NewEncoder(w).Encode(body)
	case http.MethodDelete:
		o := f.objects[path]
		if o == nil {
			fail(404, path+" not found")
			return
		}
		if f.control != nil {
			f.control(r.Method, path, o)
		} else {
			delete(f.objects, path)
		}
		fmt.Fprint(w, "{}")
	}
}

func (f *fakeAPI) store(method, path string, o map[string]any) {
	f.objects[path] = o
	if f.control != nil {
		f.control(method, path, o)
	}
}

func merge(into, patch map[string]any) {
	for k, v := range patch {
		m, ok := v.(map[string]any)
		old, ok2 := into[k].(map[string]any)
		switch {
		case v == nil:
			delete(into, k)
		case ok && ok2:
			merge(old, m)
		default:
			into[k] = v
		}
	}
}

// run calls h8s against the fake.
func (f *fakeAPI) run(stdin string, args ...string) (out, errs string, err error) {
	f.t.Helper()
	var stdout, stderr bytes.Buffer
	root := newRoot()
	root.SetArgs(append(args, "--kubeconfig", f.kubeconfig))
	root.SetIn(strings.NewReader(stdin))
	root.SetOut(&stdout)
	root.SetErr(&stderr)
	err = root.ExecuteContext(f.t.Context())
	return stdout.String(), stderr.String(), err
}

func golden(t *testing.T, name, got string) {
	t.Helper()
	path := filepath.Join("testdata", name+".golden")
	if *update {
		if err := os.MkdirAll("testdata", 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte(got), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if got != string(want) {
		t.Errorf("%s: got\n%s\nwant\n%s", name, got, want)
	}
}

// isReady plays the controllers that make objects ready.
func isReady(_, path string, o map[string]any) {
	phase := "Active"
	if strings.Contains(path, "/tenantnamespaces/") {
		phase = "Bound"
	}
	o["status"] = map[string]any{"phase": phase}
}

const blue = `
/apis/hypernetes.io/v1alpha1/tenants/blue:
  metadata: {name: blue}
  spec: {description: a customer, owners: ["blue:ann"], runtimeClasses: [hyper], podSecurity: baseline, keystone: {projectID: 065f210a2ca9442aad898ab129426350}, quota: {networks: 3, perNamespace: {cpu: "8", memory: 16Gi}, containerDefaults: {memory: 256Mi}}}
  status: {phase: Active, homeNamespace: tenant-blue, networks: 1, namespaces: 2, conditions: [{type: Ready, status: "True", reason: Reconciled, message: "all is there"}]}
/apis/hypernetes.io/v1alpha1/tenants/red: {metadata: {name: red}, status: {phase: Pending}}
/apis/hypernetes.io/v1alpha1/namespaces/tenant-blue/networks/net1:
  metadata: {name: net1, namespace: tenant-blue}
  spec: {egress: SNAT, hostAccess: Routed, subnets: {subnet1: {cidr: 192.168.0.0/24}}}
  status: {phase: Active, tenant: blue, provider: builtin, vni: 5000, mtu: 1450, hostAccess: Isolated, ports: 2, freeAddresses: 250, subnets: [{name: subnet1, index: 0, cidr: 192.168.0.0/24, gateway: 192.168.0.1}], conditions: [{type: AddressesAvailable, status: "True", reason: Free, message: 250 left}]}
/apis/hypernetes.io/v1alpha1/namespaces/tenant-blue/tenantnamespaces/web: {metadata: {name: web, namespace: tenant-blue}, spec: {network: net1}, status: {phase: Bound}}
/apis/hypernetes.io/v1alpha1/namespaces/tenant-blue/tenantnamespaces/db: {metadata: {name: db, namespace: tenant-blue}, spec: {network: net1}, status: {phase: Bound}}
/apis/hypernetes.io/v1alpha1/namespaces/tenant-red/networks/default: {metadata: {name: default, namespace: tenant-red}, spec: {subnets: {b: {cidr: fd00::/64}, a: {cidr: 10.0.0.0/16}}}, status: {phase: Initializing}}
/apis/hypernetes.io/v1alpha1/namespaces/tenant-red/tenantnamespaces/other: {metadata: {name: other, namespace: tenant-red}, spec: {network: default}, status: {phase: Bound}}
/apis/hypernetes.io/v1alpha1/namespaces/tenant-blue/ports/net1.192-168-0-2: {metadata: {name: net1.192-168-0-2}, spec: {network: net1, addresses: [192.168.0.2], node: one, pod: {namespace: web, name: front}}, status: {phase: Active}}
/apis/hypernetes.io/v1alpha1/namespaces/tenant-blue/ports/net1.192-168-0-9: {metadata: {name: net1.192-168-0-9}, spec: {network: net1, addresses: [192.168.0.9], retain: true}, status: {phase: Pending, conditions: [{type: Ready, status: "False", message: nobody has it}]}}
/api/v1/namespaces/web: {metadata: {name: web, labels: {kubernetes.io/metadata.name: web}}}
/api/v1/namespaces/db: {metadata: {name: db, labels: {kubernetes.io/metadata.name: db}}}
/api/v1/namespaces/web/pods/front: {metadata: {name: front, namespace: web, labels: {app: front}}, spec: {containers: [{ports: [{name: http, containerPort: 80, protocol: TCP}]}]}, status: {phase: Running, podIPs: [{ip: 192.168.0.2}], conditions: [{type: Ready, status: "True"}]}}
/api/v1/namespaces/web/pods/later: {metadata: {name: later, namespace: web}, status: {phase: Pending}}
/api/v1/namespaces/db/pods/sql: {metadata: {name: sql, namespace: db, labels: {app: sql}}, spec: {containers: [{ports: [{name: sql, containerPort: 5432, protocol: TCP}, {name: metrics, containerPort: 9187, protocol: TCP}]}]}, status: {phase: Running, podIPs: [{ip: 192.168.0.3}], conditions: [{type: Ready, status: "False"}]}}
/api/v1/namespaces/other/pods/x: {metadata: {name: x, namespace: other}, status: {phase: Running, podIPs: [{ip: 10.0.0.2}]}}
/api/v1/namespaces/default/pods/a: {metadata: {name: a, namespace: default}, status: {phase: Running, podIPs: [{ip: 10.244.0.2}], conditions: [{type: Ready, status: "True"}]}}
/api/v1/namespaces/db/services/sql: {metadata: {name: sql, namespace: db}, spec: {type: ClusterIP, clusterIP: 10.96.3.4, selector: {app: sql}, ports: [{port: 5000, protocol: TCP, targetPort: sql}]}}
/api/v1/namespaces/web/services/front: {metadata: {name: front, namespace: web}, spec: {type: ClusterIP, clusterIP: 10.96.3.6, selector: {app: front}, ports: [{port: 8080, protocol: TCP, targetPort: http}, {port: 81, protocol: TCP, targetPort: none}]}}
/api/v1/namespaces/db/services/none: {metadata: {name: none, namespace: db}, spec: {type: ClusterIP, clusterIP: 10.96.3.5, selector: {app: gone}, ports: [{port: 5000, protocol: TCP, targetPort: 1}]}}
/apis/networking.k8s.io/v1/namespaces/db/networkpolicies/deny: {metadata: {name: deny, namespace: db}, spec: {podSelector: {}}}
/apis/networking.k8s.io/v1/namespaces/db/networkpolicies/sql: {metadata: {name: sql, namespace: db}, spec: {podSelector: {matchLabels: {app: sql}}, ingress: [{from: [{namespaceSelector: {matchLabels: {kubernetes.io/metadata.name: web}}}], ports: [{port: sql}]}]}}
/apis/coordination.k8s.io/v1/namespaces/h8s-system/leases/address-1-2-3-4: {metadata: {name: address-1-2-3-4}, spec: {holderIdentity: Service/web/x/uid}}
/apis/coordination.k8s.io/v1/namespaces/h8s-system/leases/address-1-2-3-5: {metadata: {name: address-1-2-3-5}, spec: {holderIdentity: Service/other/x/uid}}
/api/v1/namespaces/tenant-blue/events/e: {type: Warning, reason: SubnetFull, message: no address left}
`

func TestTenancyOutput(t *testing.T) {
	for name, args := range map[string]string{
		"tenant-list":      "tenant list",
		"tenant-describe":  "tenant describe blue",
		"tenant-yaml":      "tenant describe red -o yaml",
		"tenant-quota":     "tenant quota blue",
		"network-list":     "network list -A",
		"network-list-red": "network list --tenant red",
		"network-describe": "network describe net1 --tenant blue",
		"network-json":     "network describe default -o json",
		"check-all":        "network check web/front db/sql",
		"check-port":       "network check web/front db/sql --port 9187",
		"check-service":    "network check db/sql web/front --service front",
		"check-service-no": "network check web/front db/sql --service none",
		"check-unready":    "network check web/front db/sql --service sql",
		"check-self":       "network check web/front web/front",
		"check-crossing":   "network check web/front other/x --port 80",
		"check-later":      "network check web/front web/later --port 80",
		"check-default":    "network check a a --port 53/UDP",
		"check-yaml":       "network check db/sql web/front -o yaml",
	} {
		t.Run(name, func(t *testing.T) {
			f := newFakeAPI(t, blue)
			out, errs, err := f.run("", strings.Fields(args)...)
			text := "$ h8s " + args + "\n" + out + errs
			if err != nil {
				text += fmt.Sprintf("h8s: %v\n", err)
				var r *Error
				if !errors.As(err, &r) || r.ID != "H8S_NO_TALK" {
					t.Error(err)
				}
			}
			golden(t, name, text)
			if len(f.log) > 0 {
				t.Errorf("wrote %v", f.log)
			}
		})
	}
}

// TestCheckAsTenant: who sees the own home namespace only gets the same answer.
func TestCheckAsTenant(t *testing.T) {
	f := newFakeAPI(t, blue)
	f.deny = func(_, path string) string {
		if path == hypernetes+"/tenantnamespaces" || strings.HasPrefix(path, "/api/v1/namespaces/") && strings.Count(path, "/") == 4 {
			return path + " is forbidden"
		}
		return ""
	}
	if _, _, err := f.run("", "network", "check", "web/front", "db/sql"); err == nil || !strings.Contains(err.Error(), "forbidden") {
		t.Error(err)
	}
	out, _, err := f.run("", "network", "check", "web/front", "db/sql", "--tenant", "blue")
	if err != nil {
		t.Error(err)
	}
	want, err := os.ReadFile("testdata/check-all.golden")
	if err != nil || !strings.HasSuffix(string(want), "\n"+out) {
		t.Errorf("%v\n%s", err, out)
	}
}

func TestTenancyRefusals(t *testing.T) {
	for args, want := range map[string]string{
		"tenant create":                                          "accepts 1 arg(s)",
		"tenant create Blue":                                     `tenant name "Blue"`,
		"tenant create blue":                                     "tenant blue is there already; h8s tenant describe blue",
		"tenant create a --project-id x":                         `--project-id "x": want 32 hexadecimal digits`,
		"tenant create a --cidr 10.0.0.1/8":                      `--cidr "10.0.0.1/8"`,
		"tenant create a --gateway 10.0.0.1":                     "--gateway 10.0.0.1 without --cidr",
		"tenant create a --cidr 10.0.0.0/8 --gateway 11.0.0.1":   "want an address inside one of --cidr 10.0.0.0/8",
		"tenant create a --pod-security none":                    `--pod-security "none"`,
		"tenant create a --quota networks=many":                  `quota networks="many"`,
		"tenant create a --quota cpu=lots":                       `quota cpu="lots": want a quantity`,
		"tenant describe none":                                   "there is no tenant none; h8s tenant list",
		"tenant quota blue networks":                             `"networks": want KEY=VALUE`,
		"tenant list -o xml":                                     `output "xml": want table, json or yaml`,
		"tenant kubeconfig blue --role member":                   `--user ""`,
		"tenant kubeconfig blue --user a:b --role member":        `--user "a:b"`,
		"tenant kubeconfig blue --user a --role king":            `--role "king": want reader or member or manager`,
		"tenant kubeconfig blue --user a --role member --ttl 1m": "at least 10m",
		"tenant kubeconfig none --user a --role member":          "there is no tenant none",
		"network describe none":                                  "no tenant has a Network none",
		"network describe none --tenant blue":                    "tenant blue has no Network none",
		"network check web/front":                                "accepts 2 arg(s)",
		"network check web/front web/none":                       "there is no Pod web/none",
		"network check web/front db/sql --port x":                `--port "x"`,
		"network check web/front db/sql --port 1 --service sql":  "--port beside --service sql",
		"network check web/front db/sql --service nope":          "there is no Service db/nope",
		"network check web/ db/sql":                              `"web/": want NAMESPACE/POD`,
		"apply":                                                  "nothing to read",
		"apply -f nowhere":                                       "-f nowhere",
		"apply -f ../examples/tenant-network --tenant BLUE":      `tenant name "BLUE"`,
	} {
		f := newFakeAPI(t, blue)
		_, _, err := f.run("", strings.Fields(args)...)
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v, want %q", args, err, want)
		}
		if err != nil && reasonOf(err) == nil && !strings.Contains(want, "already") {
			t.Errorf("%s: %v has no reason", args, err)
		}
	}
}

func TestTenantCreate(t *testing.T) {
	f := newFakeAPI(t, "")
	f.control = func(method, path string, o map[string]any) {
		isReady(method, path, o)
		f.objects[hypernetes+"/namespaces/tenant-red/networks/default"] = map[string]any{"status": map[string]any{"phase": "Active"}}
	}
	out, errs, err := f.run("", "tenant", "create", "red", "--cidr", "192.168.0.0/24", "--cidr", "fd00::/64", "--gateway", "fd00::1", "--owner", "ann",
		"--quota", "networks=2,cpu=8,container.limit.memory=1Gi", "--pod-security", "restricted", "--runtime-class", "hyper", "--runtime-class", "runc", "--description", "x y")
	if err != nil {
		t.Fatal(err)
	}
	b, _ := yaml.Marshal(f.objects[tenantPath("red")])
	golden(t, "tenant-create", out+errs+string(b))
}

func TestTenantCreateSaysWhatIsMissing(t *testing.T) {
	f := newFakeAPI(t, "")
	f.control = func(_, _ string, o map[string]any) {
		o["status"] = map[string]any{"phase": "Failed", "conditions": []any{map[string]any{"type": "Ready", "status": "False", "message": "namespace tenant-red is somebody else's"}}}
	}
	_, _, err := f.run("", "tenant", "create", "red", "--timeout", "20ms")
	if err == nil || !strings.Contains(err.Error(), "tenant red is not ready after 20ms: Failed: namespace tenant-red is somebody else's") {
		t.Error(err)
	}
	if out, _, err := f.run("", "tenant", "create", "green", "--wait=false"); err != nil || out != "tenant green created\n" {
		t.Error(out, err)
	}
}

func TestTenantQuotaSets(t *testing.T) {
	f := newFakeAPI(t, blue)
	out, _, err := f.run("", "tenant", "quota", "blue", "networks=7", "cpu=", "pods=20", "container.limit.memory=")
	if err != nil {
		t.Fatal(err)
	}
	golden(t, "tenant-quota-set", out)
}

func TestTenantDelete(t *testing.T) {
	f := newFakeAPI(t, blue)
	looks := 0
	f.control = func(method, path string, o map[string]any) {
		o["metadata"].(map[string]any)["deletionTimestamp"] = "2026-01-01T00:00:00Z"
		o["status"] = map[string]any{"phase": "Terminating", "conditions": []any{map[string]any{"type": "DeletionBlocked", "status": "True", "message": "Network net1 is used by Pod web/front"}}}
	}
	f.deny = func(method, path string) string { // counts, and lets it go in the end
		if method == http.MethodGet && path == tenantPath("blue") && len(f.log) > 0 {
			if looks++; looks == 2 {
				delete(f.objects, path)
			}
		}
		return ""
	}
	if _, _, err := f.run("green\n", "tenant", "delete", "blue"); err == nil || !strings.Contains(err.Error(), "nothing was removed") || len(f.log) > 0 {
		t.Fatalf("%v %v", err, f.log)
	}
	out, errs, err := f.run("blue\n", "tenant", "delete", "blue")
	if err != nil {
		t.Fatal(err)
	}
	golden(t, "tenant-delete", errs+out)

	f = newFakeAPI(t, blue)
	f.control = func(string, string, map[string]any) {}
	if _, _, err := f.run("", "tenant", "delete", "red", "--yes", "--timeout", "20ms"); err == nil || !strings.Contains(err.Error(), "tenant red is not gone after 20ms") {
		t.Error(err)
	}
}

func TestTenantKubeconfig(t *testing.T) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	f := newFakeAPI(t, blue)
	var spec map[string]any
	f.control = func(_, _ string, o map[string]any) {
		spec = o["spec"].(map[string]any)
		var typed struct{ Spec struct{ Request []byte } }
		b, _ := json.Marshal(o)
		if err := json.Unmarshal(b, &typed); err != nil {
			t.Error(err)
		}
		block, _ := pem.Decode(typed.Spec.Request)
		csr, err := x509.ParseCertificateRequest(block.Bytes)
		if err != nil || csr.CheckSignature() != nil {
			t.Error(err)
			return
		}
		template := &x509.Certificate{SerialNumber: big.NewInt(1), Subject: csr.Subject, NotAfter: time.Date(2030, 1, 1, 0, 0, 0, 0, time.UTC)}
		der, err := x509.CreateCertificate(rand.Reader, template, template, csr.PublicKey, key)
		if err != nil {
			t.Error(err)
		}
		o["status"] = map[string]any{"certificate": pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}), "conditions": []any{map[string]any{"type": "Approved", "status": "True"}}}
	}
	// A manager of the tenant cannot read the Tenant.
	f.deny = func(_, path string) string {
		if strings.Contains(path, "/tenants/") {
			return "tenants is forbidden"
		}
		return ""
	}
	file := filepath.Join(t.TempDir(), "ann")
	_, errs, err := f.run("", "tenant", "kubeconfig", "blue", "--user", "ann@example.org", "--role", "member", "--namespace", "web", "--ttl", "1h", "-o", file)
	if err != nil {
		t.Fatal(err)
	}
	if want := file + " lets ann@example.org act as member of tenant blue until 2030-01-01T00:00:00Z\n"; errs != want {
		t.Errorf("%q", errs)
	}
	if st, err := os.Stat(file); err != nil || st.Mode().Perm() != 0o600 {
		t.Errorf("%v %v", st.Mode(), err)
	}
	e, err := kubeconfig.Load(file)
	if err != nil {
		t.Fatal(err)
	}
	block, _ := pem.Decode(e.Cert)
	c, err := x509.ParseCertificate(block.Bytes)
	if err != nil {
		t.Fatal(err)
	}
	if c.Subject.String() != "CN=blue:ann@example.org,O=h8s:tenant:blue:member" || e.Namespace != "web" || e.Server != f.server.URL || e.Token != "" {
		t.Errorf("%s %+v", c.Subject, e)
	}
	block, _ = pem.Decode(e.Key)
	if k, err := x509.ParseECPrivateKey(block.Bytes); err != nil || !k.PublicKey.Equal(c.PublicKey) {
		t.Errorf("the key is not the certificate's: %v", err)
	}
	if spec["signerName"] != "kubernetes.io/kube-apiserver-client" || spec["expirationSeconds"] != float64(3600) || fmt.Sprint(spec["usages"]) != "[client auth digital signature]" {
		t.Errorf("%v", spec)
	}
}

func TestTenantKubeconfigDenied(t *testing.T) {
	f := newFakeAPI(t, blue)
	f.control = func(_, _ string, o map[string]any) {
		o["status"] = map[string]any{"conditions": []any{map[string]any{"type": "Denied", "status": "True", "reason": "OtherTenant", "message": "red's manager asks for blue"}}}
	}
	file := filepath.Join(t.TempDir(), "x")
	_, _, err := f.run("", "tenant", "kubeconfig", "blue", "--user", "a", "--role", "manager", "-o", file)
	if err == nil || err.Error() != "the cluster does not sign it: red's manager asks for blue (OtherTenant)" {
		t.Error(err)
	}
	if _, err := os.Stat(file); !os.IsNotExist(err) {
		t.Error("a file is there though nothing was signed")
	}
	f.control = nil
	_, _, err = f.run("", "tenant", "kubeconfig", "blue", "--user", "a", "--role", "manager", "--timeout", "20ms")
	if err == nil || !strings.Contains(err.Error(), "nobody approved") {
		t.Error(err)
	}
}

func TestApply(t *testing.T) {
	f := newFakeAPI(t, blue)
	f.control = isReady
	out, errs, err := f.run("", "apply", "-f", "../examples/tenant-network", "-f", "../examples/injection/seed.yaml")
	if err != nil {
		t.Fatal(err)
	}
	golden(t, "apply", errs+out+strings.Join(f.log, "\n")+"\n")

	f = newFakeAPI(t, blue)
	out, errs, err = f.run("", "apply", "-f", "../examples/tenant-network", "--dry-run", "--namespace", "x")
	if err != nil || len(f.log) > 0 {
		t.Fatal(err, f.log)
	}
	golden(t, "apply-dry-run", errs+out)

	// The Namespace is applied before its Network is there in the file; the tenant is not there at all.
	f = newFakeAPI(t, "")
	_, _, err = f.run("", "apply", "-f", "../examples/tenant-network")
	if err == nil || !strings.Contains(err.Error(), "h8s tenant create NAME --project-id 065f210a2ca9442aad898ab129426350") || len(f.log) > 0 {
		t.Error(err, f.log)
	}
	_, _, err = f.run("{apiVersion: v1, kind: Network, metadata: {name: a}, spec: {subnets: {}}}", "apply", "-f", "-", "--tenant", "green")
	if err == nil || err.Error() != "standard input: Network a: there is no tenant green; make it first: h8s tenant create green: not found" {
		t.Error(err)
	}
	_, _, err = f.run("{apiVersion: batch/v7, kind: Job, metadata: {name: a}}", "apply", "-f", "-")
	if err == nil || !strings.Contains(err.Error(), "apiVersion batch/v7 is not served by this cluster") {
		t.Error(err)
	}
	_, _, err = f.run("{apiVersion: v1, kind: Pud, metadata: {name: a}}", "apply", "-f", "-")
	if err == nil || !strings.Contains(err.Error(), "kind Pud is not served in apiVersion v1") {
		t.Error(err)
	}
	f = newFakeAPI(t, blue)
	f.control = func(_, _ string, o map[string]any) {
		o["status"] = map[string]any{"phase": "Failed", "conditions": []any{map[string]any{"type": "Ready", "status": "False", "message": "spec.subnets[a].cidr is reserved"}}}
	}
	_, _, err = f.run("{apiVersion: v1, kind: Network, metadata: {name: a}, spec: {tenantID: blue}}", "apply", "-f", "-", "--timeout", "20ms")
	if err == nil || !strings.Contains(err.Error(), "Network a is not ready after 20ms: Failed: spec.subnets[a].cidr is reserved") {
		t.Error(err)
	}
}

// TestConvertNeedsNoCluster: only a manifest that does not say whose it is asks one.
func TestConvertNeedsNoCluster(t *testing.T) {
	root := newRoot()
	var out bytes.Buffer
	root.SetOut(&out)
	root.SetArgs([]string{"convert", "-f", "../examples/tenant-network/network.yaml", "--tenant", "red", "--kubeconfig", "/nowhere"})
	if err := root.Execute(); err != nil || !strings.Contains(out.String(), "namespace: tenant-red") {
		t.Errorf("%v\n%s", err, out.String())
	}
	root.SetArgs([]string{"convert", "-f", "../examples/tenant-network/network.yaml", "--tenant", "", "--kubeconfig", "/nowhere"})
	if err := root.Execute(); err == nil || !strings.Contains(err.Error(), "--tenant says whose it is without asking") {
		t.Error(err)
	}
}

func TestServerThatIsNotThere(t *testing.T) {
	f := newFakeAPI(t, "")
	f.server.Close()
	_, _, err := f.run("", "tenant", "list")
	if err == nil || reasonOf(err).ID != "H8S_NOT_RUNNING" || !strings.Contains(err.Error(), "does not answer") {
		t.Error(err)
	}
}

func TestTenantCompletion(t *testing.T) {
	f := newFakeAPI(t, blue)
	var out bytes.Buffer
	root := newRoot()
	root.SetOut(&out)
	root.SetArgs([]string{"__complete", "tenant", "describe", "--kubeconfig", f.kubeconfig, ""})
	if err := root.Execute(); err != nil || !strings.HasPrefix(out.String(), "blue\nred\n") {
		t.Errorf("%q %v", out.String(), err)
	}
}
