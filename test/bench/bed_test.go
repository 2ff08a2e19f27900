package bench

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/google/nftables"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/rest"
	"sigs.k8s.io/controller-runtime/pkg/client"

	v1alpha1 "github.com/hypernetes/hypernetes/api/hypernetes/v1alpha1"
	"github.com/hypernetes/hypernetes/network/edge/edgetest"
	"github.com/hypernetes/hypernetes/network/netns"
	"github.com/hypernetes/hypernetes/test/artifacts"
	"github.com/hypernetes/hypernetes/test/controlplane"
)

// bed is where networks are measured: a real API server, two nodes with kubestack, and
// two nodes as upstream has them, with Pods by the ptp plugin and kube-proxy in nftables
// mode on the first. Nodes are namespaces, Pods are namespaces; the programs are those of
// $H8S_OUT. The controller's part is played here.
type bed struct {
	b          *testing.B
	out        string
	rig        *edgetest.Rig
	cfg        *rest.Config
	api        client.Client
	kubeconfig string
	home       string
	stacks     []*program // kubestack of rig.Nodes[0] and [1]
	upstream   [2]*netns.NS
	proxy      *program
	programmed int // Services, by proxy
	tenants    int
}

func newBed(b *testing.B) *bed {
	b.Helper()
	rig := edgetest.New(b, 3) // skips without root
	out := artifacts.Dir()
	for _, f := range []string{"bin/kubernetes", "bin/kubestack", "bin/coredns", "cni/ptp", "cni/host-local", "cni/hypernetes"} {
		if _, err := os.Stat(filepath.Join(out, f)); err != nil {
			b.Skipf("not built: %v (run `make build`)", err)
		}
	}
	if _, err := exec.LookPath("nft"); err != nil {
		b.Skipf("kube-proxy needs nft: %v", err)
	}
	d := &bed{b: b, out: out, rig: rig, cfg: controlplane.Start(b)}
	d.cfg.QPS = -1 // the benchmark itself waits for nobody
	d.kubeconfig = controlplane.Kubeconfig(b, d.cfg)
	var err error
	d.api, err = client.New(d.cfg, client.Options{Scheme: controlplane.Scheme()})
	d.must(err)
	d.home, err = os.MkdirTemp("", "h8s-bench-") // sockets' paths are short
	d.must(err)
	b.Cleanup(func() { _ = os.RemoveAll(d.home) })
	d.namespace(v1alpha1.SystemNamespace, nil)
	stop, err := upstream(context.Background(), rig.Outside, "100.64.0.200:53")
	d.must(err)
	b.Cleanup(stop)
	for _, n := range rig.Nodes[:2] {
		d.node(n.Name, n.Address.String())
		d.stacks = append(d.stacks, d.kubestack(n))
	}
	for i, name := range []string{"upstream-1", "upstream-2"} {
		d.upstream[i] = rig.Namespace(name)
	}
	d.must(veth(d.upstream[0], d.upstream[1], "172.31.0.1/30", "172.31.0.2/30"))
	for i, ns := range d.upstream {
		d.route(ns, fmt.Sprintf("10.245.%d.0/24", 2-i), fmt.Sprintf("172.31.0.%d", 2-i))
	}
	d.node("upstream-1", "172.31.0.1")
	d.reach(d.upstream[0])
	return d
}

func (d *bed) must(err error) {
	d.b.Helper()
	if err != nil {
		d.b.Fatal(err)
	}
}

func (d *bed) create(o client.Object) {
	d.b.Helper()
	d.must(d.api.Create(d.b.Context(), o))
}

func (d *bed) status(o client.Object) {
	d.b.Helper()
	d.must(d.api.Status().Update(d.b.Context(), o))
}

func (d *bed) namespace(name string, labels map[string]string) {
	d.b.Helper()
	d.create(&corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: name, Labels: labels}})
}

func (d *bed) node(name, address string) {
	d.b.Helper()
	n := &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: name}}
	d.create(n)
	n.Status.Addresses = []corev1.NodeAddress{{Type: corev1.NodeInternalIP, Address: address}}
	n.Status.Conditions = []corev1.NodeCondition{{Type: corev1.NodeReady, Status: corev1.ConditionTrue}}
	d.status(n)
}

// tenant makes a tenant with a Network, accepted, and a namespace bound to it.
func (d *bed) tenant(subnet string) (namespace string) {
	d.b.Helper()
	d.tenants++
	name := fmt.Sprintf("t%d", d.tenants)
	d.namespace(v1alpha1.Home(name), nil)
	n := &v1alpha1.Network{ObjectMeta: metav1.ObjectMeta{Namespace: v1alpha1.Home(name), Name: "default"}, Spec: v1alpha1.NetworkSpec{Subnets: map[string]v1alpha1.Subnet{"s": {CIDR: subnet}}}}
	d.create(n)
	gateway := netip.MustParsePrefix(subnet).Addr().Next().String()
	n.Status = v1alpha1.NetworkStatus{
		Phase: v1alpha1.NetworkActive, Tenant: name, Provider: "builtin", VNI: int32(6000 + d.tenants), MTU: edgetest.MTU,
		Subnets: []v1alpha1.SubnetStatus{{Name: "s", CIDR: subnet, Gateway: gateway}},
	}
	d.status(n)
	namespace = name + "-app"
	d.namespace(namespace, map[string]string{v1alpha1.LabelTenant: name, v1alpha1.LabelNetwork: n.Name})
	t := &v1alpha1.TenantNamespace{ObjectMeta: metav1.ObjectMeta{Namespace: n.Namespace, Name: namespace}, Spec: v1alpha1.TenantNamespaceSpec{Network: n.Name}}
	d.create(t)
	t.Status.Phase, t.Status.NetworkUID = v1alpha1.NamespaceBound, string(n.UID)
	d.status(t)
	return namespace
}

// netPod is a Pod as far as its network goes.
type netPod struct {
	d       *bed
	ns      *netns.NS
	node    *netns.NS
	plugin  string
	config  string
	id      string
	args    string
	Address netip.Addr
}

// tenantPod is a Pod in a tenant's namespace, to be added.
func (d *bed) tenantPod(node int, namespace, name string) *netPod {
	d.b.Helper()
	o := &corev1.Pod{
		ObjectMeta: metav1.ObjectMeta{Namespace: namespace, Name: name, Labels: map[string]string{"app": name}},
		Spec:       corev1.PodSpec{NodeName: d.rig.Nodes[node].Name, Containers: []corev1.Container{{Name: "c", Image: "none"}}},
	}
	d.create(o)
	return &netPod{
		d: d, ns: d.rig.Namespace(namespace + "-" + name), node: d.rig.Nodes[node].NS, plugin: "hypernetes", id: string(o.UID),
		config: fmt.Sprintf(`{"cniVersion":"1.1.0","name":"h8s","type":"hypernetes","socket":%q,"delegates":[]}`, filepath.Join(d.stacks[node].dir, "kubestack.sock")),
		args:   fmt.Sprintf("IgnoreUnknown=1;K8S_POD_NAMESPACE=%s;K8S_POD_NAME=%s;K8S_POD_UID=%s", namespace, name, o.UID),
	}
}

// upstreamPod is a Pod of the ptp plugin, to be added.
func (d *bed) upstreamPod(node int, name string) *netPod {
	d.b.Helper()
	return &netPod{
		d: d, ns: d.rig.Namespace("upstream-" + name), node: d.upstream[node], plugin: "ptp", id: "upstream-" + name,
		config: fmt.Sprintf(`{"cniVersion":"1.0.0","name":"h8s","type":"ptp","mtu":%d,"ipam":{"type":"host-local","dataDir":%q,"ranges":[[{"subnet":"10.245.%d.0/24"}]],"routes":[{"dst":"0.0.0.0/0"}]}}`,
			edgetest.MTU, filepath.Join(d.home, fmt.Sprint("ipam-", node)), node+1),
		args: "IgnoreUnknown=1;K8S_POD_NAMESPACE=default;K8S_POD_NAME=" + name,
	}
}

// call runs the plugin as a runtime would and returns how long it took.
func (p *netPod) call(verb string) (time.Duration, error) {
	var stdout, stderr bytes.Buffer
	cmd := exec.Command(filepath.Join(p.d.out, "cni", p.plugin))
	cmd.Env = []string{
		"PATH=" + os.Getenv("PATH"), "CNI_COMMAND=" + verb, "CNI_CONTAINERID=" + p.id, "CNI_NETNS=" + p.ns.Path(), "CNI_IFNAME=eth0",
		"CNI_ARGS=" + p.args, "CNI_PATH=" + filepath.Join(p.d.out, "cni"),
	}
	cmd.Stdin, cmd.Stdout, cmd.Stderr = strings.NewReader(p.config), &stdout, &stderr
	began := time.Now()
	err := p.node.Do(cmd.Start)
	if err == nil {
		err = cmd.Wait()
	}
	took := time.Since(began)
	if err != nil {
		return took, fmt.Errorf("%s %s: %w: %s%s", p.plugin, verb, err, &stdout, &stderr)
	}
	if verb != "ADD" {
		return took, nil
	}
	var result struct {
		IPs []struct{ Address netip.Prefix } `json:"ips"`
	}
	if err := json.Unmarshal(stdout.Bytes(), &result); err != nil || len(result.IPs) == 0 {
		return took, fmt.Errorf("%s ADD: no address: %w: %s", p.plugin, err, &stdout)
	}
	p.Address = result.IPs[0].Address.Addr()
	return took, nil
}

// add plugs it in. A binding that has not come round to the daemon yet is waited for; only
// the ADD that succeeds is timed.
func (p *netPod) add() time.Duration {
	p.d.b.Helper()
	var took time.Duration
	p.d.eventually("ADD", func() (err error) { took, err = p.call("ADD"); return err })
	return took
}

func (p *netPod) del() {
	p.d.b.Helper()
	_, err := p.call("DEL")
	p.d.must(err)
}

// eventually tries until it works.
func (d *bed) eventually(what string, f func() error) {
	d.b.Helper()
	ctx, cancel := context.WithTimeout(d.b.Context(), time.Minute)
	defer cancel()
	tick := time.NewTicker(5 * time.Millisecond)
	defer tick.Stop()
	for {
		err := f()
		if err == nil {
			return
		}
		select {
		case <-ctx.Done():
			d.b.Fatalf("%s: %v", what, err)
		case <-tick.C:
		}
	}
}

// program is one that runs in a namespace.
type program struct {
	ns   *netns.NS
	pid  int
	dir  string
	log  string
	stop func()
}

// run starts a program of $H8S_OUT/bin. It ends with the benchmark, however that ends.
func (d *bed) run(ns *netns.NS, dir, file, argv0 string, args ...string) *program {
	d.b.Helper()
	p := &program{ns: ns, dir: dir, log: filepath.Join(dir, argv0+".log")}
	out, err := os.Create(p.log)
	d.must(err)
	defer out.Close()
	cmd := &exec.Cmd{
		Path: filepath.Join(d.out, "bin", file), Args: append([]string{argv0}, args...), Dir: dir, Stdout: out, Stderr: out,
		Env: []string{"PATH=" + os.Getenv("PATH"), "HOME=" + dir}, SysProcAttr: &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL},
	}
	started, ended, done := make(chan error, 1), make(chan struct{}), make(chan struct{})
	go func() {
		defer close(done)
		// The death signal comes when the thread that started it ends: one owner holds it.
		_ = ns.Do(func() error {
			err := cmd.Start()
			started <- err
			if err != nil {
				return nil
			}
			<-ended
			_ = cmd.Process.Kill()
			return cmd.Wait()
		})
	}()
	p.stop = sync.OnceFunc(func() { close(ended); <-done })
	d.b.Cleanup(p.stop)
	if err := <-started; err != nil {
		d.b.Fatalf("start %s: %v", argv0, err)
	}
	p.pid = cmd.Process.Pid
	return p
}

// tail is the end of its log.
func (p *program) tail() string {
	b, _ := os.ReadFile(p.log)
	return string(b[max(0, len(b)-2000):])
}

// reach lets programs in a namespace reach the API server where everybody else does.
func (d *bed) reach(ns *netns.NS) {
	d.b.Helper()
	u, err := url.Parse(d.cfg.Host)
	d.must(err)
	stop, err := relay(context.Background(), ns, u.Port())
	d.must(err)
	d.b.Cleanup(stop)
}

// kubestack runs a node's daemon.
func (d *bed) kubestack(n *edgetest.Node) *program {
	d.b.Helper()
	dir := filepath.Join(d.home, n.Name)
	d.must(os.MkdirAll(dir, 0o755))
	resolv := filepath.Join(dir, "resolv.conf")
	d.must(os.WriteFile(resolv, []byte("nameserver 100.64.0.200\n"), 0o644))
	d.reach(n.NS)
	// The daemon leaves its edges to the next one.
	d.b.Cleanup(func() {
		edges := filepath.Join(dir, "edges")
		files, _ := os.ReadDir(edges)
		for _, f := range files {
			if err := netns.Remove(filepath.Join(edges, f.Name())); err != nil {
				d.b.Error(err)
			}
		}
	})
	p := d.run(n.NS, dir, "kubestack", "kubestack", "--kubeconfig", d.kubeconfig, "--node", n.Name, "--node-ip", n.Address.String(),
		"--run-dir", dir, "--api-servers", d.rig.Nodes[0].Address.String()+":6443", "--resolv-conf", resolv,
		"--service-cidrs", controlplane.ServiceCIDR+","+controlplane.ServiceCIDR6, "--vxlan-port", strconv.Itoa(edgetest.Port), "--health-address", "127.0.0.1:9645")
	d.eventually("kubestack is ready", func() error {
		_, err := p.get("http://127.0.0.1:9645/readyz")
		if err != nil {
			err = fmt.Errorf("%w\n%s", err, p.tail())
		}
		return err
	})
	return p
}

// edges are the namespaces of Networks on a node with kubestack.
func (p *program) edges() []string {
	files, _ := os.ReadDir(filepath.Join(p.dir, "edges"))
	var out []string
	for _, f := range files {
		out = append(out, filepath.Join(p.dir, "edges", f.Name()))
	}
	return out
}

// kubeProxy runs kube-proxy as our nodes run it on the first upstream node, from nothing,
// until its first sync is done, and returns how long that sync took by its own account and
// how long it was from its start.
func (d *bed) kubeProxy() (sync, total time.Duration) {
	d.b.Helper()
	dir := filepath.Join(d.home, "kube-proxy")
	d.must(os.MkdirAll(dir, 0o755))
	config, err := json.Marshal(map[string]any{
		"apiVersion": "kubeproxy.config.k8s.io/v1alpha1", "kind": "KubeProxyConfiguration", "mode": "nftables",
		"clientConnection": map[string]any{"kubeconfig": d.kubeconfig}, "clusterCIDR": "10.245.0.0/16", "hostnameOverride": "upstream-1",
		"bindAddress": "172.31.0.1", "healthzBindAddress": "127.0.0.1:10256", "metricsBindAddress": "127.0.0.1:10249",
		"conntrack": map[string]any{"maxPerCore": 0, "min": 0, "tcpEstablishedTimeout": "0s", "tcpCloseWaitTimeout": "0s"},
	})
	d.must(err)
	file := filepath.Join(dir, "config.yaml")
	d.must(os.WriteFile(file, config, 0o644))
	began := time.Now()
	d.proxy = d.run(d.upstream[0], dir, "kubernetes", "kube-proxy", "--config="+file, "--v=1")
	d.eventually("kube-proxy has synced", func() error {
		n, seconds, err := d.proxy.figure("http://127.0.0.1:10249/metrics", proxyFull)
		if err == nil && n == 0 {
			err = errors.New("not yet")
		}
		if err != nil {
			return fmt.Errorf("%w\n%s", err, d.proxy.tail())
		}
		total, sync = time.Since(began), time.Duration(seconds/n*float64(time.Second))
		return nil
	})
	return sync, total
}

// Figures of daemons: how long they say programming took.
const (
	proxyFull    = `kubeproxy_sync_full_proxy_rules_duration_seconds_%s{ip_family="IPv4"}`
	proxyPartial = `kubeproxy_sync_partial_proxy_rules_duration_seconds_%s{ip_family="IPv4"}`
	stackSync    = `h8s_kubestack_sync_seconds_%s`
)

func (p *program) get(url string) ([]byte, error) {
	c := &http.Client{Timeout: patience, Transport: &http.Transport{DisableKeepAlives: true, DialContext: p.ns.DialContext}}
	r, err := c.Get(url)
	if err != nil {
		return nil, err
	}
	defer r.Body.Close()
	b, err := io.ReadAll(r.Body)
	if err == nil && r.StatusCode != http.StatusOK {
		err = fmt.Errorf("%s: %s: %.200s", url, r.Status, b)
	}
	return b, err
}

// figure reads a histogram's count and sum.
func (p *program) figure(url, name string) (count, sum float64, err error) {
	text, err := p.get(url)
	if err != nil {
		return 0, 0, err
	}
	for line := range strings.Lines(string(text)) {
		for suffix, to := range map[string]*float64{"count": &count, "sum": &sum} {
			if rest, ok := strings.CutPrefix(line, fmt.Sprintf(name, suffix)+" "); ok {
				if *to, err = strconv.ParseFloat(strings.TrimSpace(rest), 64); err != nil {
					return 0, 0, err
				}
			}
		}
	}
	return count, sum, nil
}

// endpointService makes a Service with these endpoints, all ready; several programs at
// once may make several.
func (d *bed) endpointService(namespace, name, clusterIP string, protocol corev1.Protocol, port int32, target int32, labels map[string]string, endpoints ...netip.Addr) (*discoveryv1.EndpointSlice, error) {
	svc := &corev1.Service{
		ObjectMeta: metav1.ObjectMeta{Namespace: namespace, Name: name, Labels: labels},
		Spec:       corev1.ServiceSpec{ClusterIP: clusterIP, Ports: []corev1.ServicePort{{Name: "p", Port: port, Protocol: protocol}}},
	}
	if err := d.api.Create(d.b.Context(), svc); err != nil {
		return nil, err
	}
	pname, yes := "p", true
	s := &discoveryv1.EndpointSlice{
		ObjectMeta:  metav1.ObjectMeta{Namespace: namespace, Name: name, Labels: map[string]string{discoveryv1.LabelServiceName: name}},
		AddressType: discoveryv1.AddressTypeIPv4, Ports: []discoveryv1.EndpointPort{{Name: &pname, Port: &target, Protocol: &protocol}},
	}
	for k, v := range labels { // as the controller copies them
		s.Labels[k] = v
	}
	for _, a := range endpoints {
		s.Endpoints = append(s.Endpoints, discoveryv1.Endpoint{Addresses: []string{a.String()}, Conditions: discoveryv1.EndpointConditions{Ready: &yes}})
	}
	return s, d.api.Create(d.b.Context(), s)
}

// veth links two namespaces by a pair named "link".
func veth(a, b *netns.NS, addrA, addrB string) error {
	h, err := a.Netlink()
	if err != nil {
		return err
	}
	defer h.Close()
	attrs := netlink.NewLinkAttrs()
	attrs.Name, attrs.MTU = "link", edgetest.MTU
	v := netlink.NewVeth(attrs)
	v.PeerName, v.PeerNamespace, v.PeerMTU = "link", netlink.NsFd(b.FD()), edgetest.MTU
	if err := h.LinkAdd(v); err != nil {
		return err
	}
	for ns, addr := range map[*netns.NS]string{a: addrA, b: addrB} {
		h, err := ns.Netlink()
		if err != nil {
			return err
		}
		defer h.Close()
		l, err := h.LinkByName("link")
		if err != nil {
			return err
		}
		address, err := netlink.ParseAddr(addr)
		if err != nil {
			return err
		}
		if err := errors.Join(h.AddrAdd(l, address), h.LinkSetUp(l)); err != nil {
			return err
		}
	}
	return nil
}

func (d *bed) route(ns *netns.NS, to, via string) {
	d.b.Helper()
	h, err := ns.Netlink()
	d.must(err)
	defer h.Close()
	_, dst, err := net.ParseCIDR(to)
	d.must(err)
	d.must(h.RouteAdd(&netlink.Route{Dst: dst, Gw: net.ParseIP(via)}))
	d.must(ns.Do(func() error { return os.WriteFile("/proc/sys/net/ipv4/ip_forward", []byte("1"), 0) }))
}

// changes tells of changes to nf_tables in a namespace.
type changes struct {
	d  *bed
	fd int
}

func (d *bed) changes(ns *netns.NS) *changes {
	d.b.Helper()
	c := &changes{d: d}
	d.must(ns.Do(func() (err error) {
		c.fd, err = unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.NETLINK_NETFILTER)
		return err
	}))
	limit := unix.NsecToTimeval(patience.Nanoseconds())
	d.must(errors.Join(
		unix.Bind(c.fd, &unix.SockaddrNetlink{Family: unix.AF_NETLINK}),
		unix.SetsockoptInt(c.fd, unix.SOL_NETLINK, unix.NETLINK_ADD_MEMBERSHIP, unix.NFNLGRP_NFTABLES),
		unix.SetsockoptTimeval(c.fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &limit)))
	return c
}

func (c *changes) close() { _ = unix.Close(c.fd) }

// forget drops what has happened so far.
func (c *changes) forget() {
	buf := make([]byte, 64<<10)
	for {
		if _, _, err := unix.Recvfrom(c.fd, buf, unix.MSG_DONTWAIT); err != nil && !errors.Is(err, unix.EINTR) && !errors.Is(err, unix.ENOBUFS) {
			return
		}
	}
}

// wait waits for the next.
func (c *changes) wait() {
	c.d.b.Helper()
	buf := make([]byte, 64<<10)
	for {
		_, _, err := unix.Recvfrom(c.fd, buf, 0)
		switch {
		case err == nil, errors.Is(err, unix.ENOBUFS): // more of them than fit
			return
		case !errors.Is(err, unix.EINTR):
			c.d.b.Fatalf("no change of the rules: %v", err)
		}
	}
}

// dropTable removes a table from a namespace, if it is there.
func (d *bed) dropTable(ns *netns.NS, family nftables.TableFamily, name string) {
	d.b.Helper()
	c, err := ns.NFTables()
	d.must(err)
	tables, err := c.ListTablesOfFamily(family)
	d.must(err)
	for _, t := range tables {
		if t.Name == name {
			c.DelTable(t)
		}
	}
	d.must(c.Flush())
}

// slab is the machine's kernel memory in use: slabs and per-CPU areas. Objects are freed
// in the background, so it is read until it no longer falls.
func (d *bed) slab() int64 {
	d.b.Helper()
	least, since := int64(0), 0
	for since < 5 {
		b, err := os.ReadFile("/proc/meminfo")
		d.must(err)
		var sum int64
		for _, f := range []string{"SUnreclaim:", "Percpu:"} {
			v, err := field(b, f)
			d.must(err)
			sum += v
		}
		since++
		if least == 0 || sum < least-64<<10 {
			least, since = sum, 0
		}
		select {
		case <-d.b.Context().Done():
			d.b.Fatal(d.b.Context().Err())
		case <-time.After(100 * time.Millisecond):
		}
	}
	return least
}
