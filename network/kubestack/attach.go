package kubestack

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"slices"
	"strings"
	"time"

	"github.com/containerd/errdefs"
	"github.com/containerd/log"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	clientretry "k8s.io/client-go/util/retry"
	"sigs.k8s.io/controller-runtime/pkg/client"

	v1alpha1 "github.com/hypernetes/hypernetes/api/hypernetes/v1alpha1"
	api "github.com/hypernetes/hypernetes/api/kubestack/v1"
	"github.com/hypernetes/hypernetes/network/edge"
	"github.com/hypernetes/hypernetes/network/ipam"
	"github.com/hypernetes/hypernetes/network/provider"
)

const (
	addTimeout = 140 * time.Second // less than the plugin's
	// apiTimeout bounds what DEL asks of an API server that may be down.
	apiTimeout = 3 * time.Second
	// maxNICs bounds what one Pod may have.
	maxNICs = 8
)

// add plugs a Pod's NICs in. Everything it does can be done again.
func (d *Daemon) add(ctx context.Context, q *api.AttachRequest) (*api.AddResponse, error) {
	if err := validAttachment(q.ContainerId, q.Interface); err != nil {
		return nil, err
	}
	if q.Netns == "" || q.PodNamespace == "" || q.PodName == "" {
		return nil, fmt.Errorf("ADD needs a network namespace, K8S_POD_NAMESPACE and K8S_POD_NAME: %w", errdefs.ErrInvalidArgument)
	}
	ctx, cancel := context.WithTimeout(ctx, addTimeout)
	defer cancel()
	defer d.calls.lock(q.ContainerId)()
	// Before everything is known a tenant's Pod would look like anybody's.
	if err := d.Ready(); err != nil {
		return nil, fmt.Errorf("try again: %w", err)
	}
	key, uid, ok, err := d.binding(ctx, q.PodNamespace)
	if err != nil {
		return nil, d.tell(ctx, q, nil, err)
	}
	if !ok {
		return d.delegate()
	}
	pod := &corev1.Pod{}
	if err := d.api.Get(ctx, client.ObjectKey{Namespace: q.PodNamespace, Name: q.PodName}, pod); err != nil {
		return nil, fmt.Errorf("pod %s/%s: %w", q.PodNamespace, q.PodName, err)
	}
	if q.PodUid != "" && string(pod.UID) != q.PodUid {
		return nil, fmt.Errorf("pod %s/%s is another by now (%s, not %s): %w", q.PodNamespace, q.PodName, pod.UID, q.PodUid, errdefs.ErrFailedPrecondition)
	}
	if pod.Spec.NodeName != "" && pod.Spec.NodeName != d.opts.Node {
		return nil, fmt.Errorf("pod %s/%s belongs on node %s: %w", q.PodNamespace, q.PodName, pod.Spec.NodeName, errdefs.ErrFailedPrecondition)
	}
	r, err := d.plug(ctx, q, pod, key, uid)
	if err != nil {
		return nil, d.tell(ctx, q, pod, err)
	}
	return d.answer(r), nil
}

// tell writes the failure to the Pod and gives it back.
func (d *Daemon) tell(ctx context.Context, q *api.AttachRequest, pod *corev1.Pod, err error) error {
	if pod == nil {
		pod = &corev1.Pod{ObjectMeta: metav1.ObjectMeta{Namespace: q.PodNamespace, Name: q.PodName, UID: types.UID(q.PodUid)}}
	}
	d.events.failed(ctx, pod, err)
	return err
}

// binding is a namespace's Network; ok is false if it has none. A namespace that shows a
// tenant but has no binding here yet is nobody's: its Pods must not get the default network.
func (d *Daemon) binding(ctx context.Context, namespace string) (types.NamespacedName, types.UID, bool, error) {
	if key, uid, ok := d.cluster.bound(namespace); ok {
		return key, uid, true, nil
	}
	ns, ok := d.cluster.namespaces.get(namespace)
	if !ok {
		ns = &metav1.PartialObjectMetadata{}
		ns.SetGroupVersionKind(corev1.SchemeGroupVersion.WithKind("Namespace"))
		if err := d.api.Get(ctx, client.ObjectKey{Name: namespace}, ns); err != nil {
			return types.NamespacedName{}, "", false, fmt.Errorf("namespace %s: %w: %w", namespace, errdefs.ErrUnavailable, err)
		}
	}
	if tenant := ns.Labels[v1alpha1.LabelTenant]; tenant != "" {
		return types.NamespacedName{}, "", false, fmt.Errorf("namespace %s belongs to tenant %s but no TenantNamespace in %s has bound it: %w", namespace, tenant, v1alpha1.Home(tenant), errdefs.ErrFailedPrecondition)
	}
	return types.NamespacedName{}, "", false, nil
}

// delegate answers for a Pod on the default network.
func (d *Daemon) delegate() (*api.AddResponse, error) {
	n := d.cluster.allNodes(d.opts.NodeIP)[d.opts.Node]
	if len(n.PodCIDRs) == 0 {
		return nil, fmt.Errorf("node %s has no podCIDR yet: try again: %w", d.opts.Node, errdefs.ErrUnavailable)
	}
	out := &api.Delegate{}
	for _, p := range n.PodCIDRs {
		out.PodCidrs = append(out.PodCidrs, p.String())
	}
	return &api.AddResponse{Delegate: out}, nil
}

// request is one NIC asked for.
type request struct {
	network   types.NamespacedName
	iface     string
	addresses []netip.Addr
	port      string
	primary   bool
}

// requests are a Pod's NICs, the first being the interface asked for. What admission has
// checked is checked again: it may have been off.
func requests(pod *corev1.Pod, network types.NamespacedName, iface string) ([]request, error) {
	first := request{network: network, iface: iface, primary: true}
	if text := pod.Annotations[v1alpha1.AnnotationAddress]; text != "" {
		if port, ok := strings.CutPrefix(text, "port/"); ok {
			first.port = port
		} else {
			for _, s := range strings.Split(text, ",") {
				a, err := netip.ParseAddr(strings.TrimSpace(s))
				if err != nil {
					return nil, fmt.Errorf("annotation %s: %w: want addresses with commas between, or port/<name>: %w", v1alpha1.AnnotationAddress, err, errdefs.ErrInvalidArgument)
				}
				first.addresses = append(first.addresses, a)
			}
		}
	}
	out := []request{first}
	text := pod.Annotations[v1alpha1.AnnotationNetworks]
	if text == "" {
		return out, nil
	}
	var more []v1alpha1.NetworkRequest
	if err := json.Unmarshal([]byte(text), &more); err != nil {
		return nil, fmt.Errorf("annotation %s: want a JSON list of {name, interface, addresses}: %w: %w", v1alpha1.AnnotationNetworks, err, errdefs.ErrInvalidArgument)
	}
	if len(more) >= maxNICs {
		return nil, fmt.Errorf("annotation %s: %d networks, at most %d: %w", v1alpha1.AnnotationNetworks, len(more), maxNICs-1, errdefs.ErrInvalidArgument)
	}
	seen := map[string]bool{iface: true, "lo": true}
	for i, m := range more {
		// Only Networks of the same home namespace can be named: no tenant reaches another's.
		q := request{network: types.NamespacedName{Namespace: network.Namespace, Name: m.Name}, iface: m.Interface}
		if q.iface == "" {
			q.iface = fmt.Sprintf("net%d", i+1)
		}
		if err := validAttachment("x", q.iface); err != nil || seen[q.iface] {
			return nil, fmt.Errorf("annotation %s: [%d].interface %q: want a name of at most 15 letters and digits that no other NIC has: %w", v1alpha1.AnnotationNetworks, i, q.iface, errdefs.ErrInvalidArgument)
		}
		seen[q.iface] = true
		for _, s := range m.Addresses {
			a, err := netip.ParseAddr(s)
			if err != nil {
				return nil, fmt.Errorf("annotation %s: [%d].addresses: %w: %w", v1alpha1.AnnotationNetworks, i, err, errdefs.ErrInvalidArgument)
			}
			q.addresses = append(q.addresses, a)
		}
		out = append(out, q)
	}
	return out, nil
}

// plug does the work of add for a Pod in a tenant's namespace.
func (d *Daemon) plug(ctx context.Context, q *api.AttachRequest, pod *corev1.Pod, primary types.NamespacedName, uid types.UID) (r *record, err error) {
	wanted, err := requests(pod, primary, q.Interface)
	if err != nil {
		return nil, err
	}
	var networks []*network
	var ports []*v1alpha1.Port
	defer func() {
		if err != nil {
			d.unplug(ctx, r, ports)
			d.lost.Store(true) // a claim may have been made although its answer did not come
		}
		d.mu.Lock()
		for _, p := range ports {
			// The watch has it by now, or had it and saw it go.
			delete(d.ports, client.ObjectKeyFromObject(p))
		}
		for _, n := range networks {
			n.users--
		}
		d.mu.Unlock()
		for _, n := range networks {
			d.enqueue(n.key)
		}
	}()
	for _, w := range wanted {
		n := d.network(w.network, 1)
		networks = append(networks, n)
		n.watch(d.cluster.namespacesOf(w.network))
	}
	r = &record{
		ContainerID: q.ContainerId, Interface: q.Interface, NetNS: q.Netns,
		PodNamespace: pod.Namespace, PodName: pod.Name, PodUID: string(pod.UID),
		Labels: pod.Labels, Ports: namedPorts(pod),
	}
	for i, w := range wanted {
		object, ok := d.cluster.networks.get(w.network.String())
		switch {
		case !ok:
			return r, fmt.Errorf("network %s: there is none: %w", w.network, errdefs.ErrUnavailable)
		case object.DeletionTimestamp != nil:
			return r, fmt.Errorf("network %s is being deleted: %w", w.network, errdefs.ErrUnavailable)
		case w.primary && uid != "" && uid != object.UID:
			return r, fmt.Errorf("namespace %s is bound to a former network %s: %w", pod.Namespace, w.network, errdefs.ErrFailedPrecondition)
		}
		if err := active(object); err != nil {
			return r, err
		}
		if !poll(ctx, networks[i].synced) {
			return r, fmt.Errorf("network %s: its objects are not known yet: try again: %w", w.network, errdefs.ErrUnavailable)
		}
		port, err := d.obtain(ctx, networks[i], object, w, v1alpha1.PodRef{
			Namespace: pod.Namespace, Name: pod.Name, UID: string(pod.UID), Sandbox: q.ContainerId, Interface: w.iface,
		})
		if port != nil {
			ports = append(ports, port)
		}
		if err != nil {
			return r, err
		}
		n, err := nicOf(q.ContainerId, object, port, w)
		if err != nil {
			return r, err
		}
		r.NICs = append(r.NICs, n)
	}
	// On disk before it is in the kernel: whatever happens, somebody knows of it.
	if err := d.records.put(r); err != nil {
		return r, err
	}
	for i, n := range networks {
		if err := n.flush(); err != nil {
			return r, err
		}
		e, err := d.edges.Get(r.NICs[i].Edge)
		if err != nil {
			return r, err
		}
		if err := e.Attach(ctx, r.attachment(r.NICs[i])); err != nil {
			return r, err
		}
		if v := r.NICs[i].VIF; v != nil {
			if err := d.wirer.Plug(ctx, *v); err != nil {
				return r, fmt.Errorf("network %s: %w", n.key, err)
			}
		}
		if err := e.Up(ctx, r.NICs[i].Link); err != nil {
			return r, err
		}
	}
	for i, p := range ports {
		if r.NICs[i].VIF != nil {
			err = d.wired(ctx, networks[i], r, r.NICs[i], p)
		} else {
			err = d.activate(ctx, p)
		}
		if err != nil {
			return r, err
		}
	}
	d.settle(ctx, networks, ports)
	return r, nil
}

// settle waits a moment for the watches to have seen the new Ports, so that a sync after
// this call does not take them for gone.
func (d *Daemon) settle(ctx context.Context, networks []*network, ports []*v1alpha1.Port) {
	ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	for i, n := range networks {
		key := client.ObjectKeyFromObject(ports[i]).String()
		poll(ctx, func() bool {
			n.watches.Lock()
			defer n.watches.Unlock()
			if n.ports == nil {
				return true
			}
			p, ok := n.ports.get(key)
			return ok && p.Spec.Pod != nil && p.Spec.Pod.Sandbox == ports[i].Spec.Pod.Sandbox
		})
	}
}

// obtain claims the NIC's Port and has the provider make its own of it, where it does. The
// Port is given back by the caller, also if there is an error besides.
func (d *Daemon) obtain(ctx context.Context, n *network, object *v1alpha1.Network, w request, ref v1alpha1.PodRef) (*v1alpha1.Port, error) {
	lost := map[netip.Addr]bool{}
	for {
		p, err := d.claim(ctx, n, object, w, ref, lost)
		if err != nil {
			return nil, err
		}
		d.remember(p)
		if !wiredElsewhere(object) {
			return p, nil
		}
		made, err := d.made(ctx, n, p)
		if err == nil {
			d.remember(made)
			return made, nil
		}
		err = fmt.Errorf("network %s: %w", w.network, err)
		if provider.Reason(err, "") != v1alpha1.ReasonAddressInUse || len(w.addresses) > 0 || w.port != "" || len(lost) >= maxLost {
			return p, err
		}
		// Somebody has it at the provider who is none of ours: another address.
		for _, a := range addresses(p.Spec.Addresses) {
			lost[a] = true
		}
		if rerr := d.release(ctx, client.ObjectKeyFromObject(p), p.UID, ref.Sandbox); rerr != nil {
			return p, errors.Join(err, rerr)
		}
		d.mu.Lock()
		delete(d.ports, client.ObjectKeyFromObject(p))
		d.mu.Unlock()
	}
}

// remember keeps a claim for those who cannot have seen it yet.
func (d *Daemon) remember(p *v1alpha1.Port) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.ports[client.ObjectKeyFromObject(p)] = p
}

// claim finds the NIC's Port if this call was made before, or claims one; none of those
// whose addresses are lost.
func (d *Daemon) claim(ctx context.Context, n *network, object *v1alpha1.Network, w request, ref v1alpha1.PodRef, lost map[netip.Addr]bool) (p *v1alpha1.Port, err error) {
	known := n.knownPorts()
	taken := map[netip.Addr]bool{}
	for a := range lost {
		taken[a] = true
	}
	for _, p := range known {
		if all := addresses(p.Spec.Addresses); len(all) > 0 && lost[all[0]] {
			continue
		}
		if p.Spec.Pod != nil && *p.Spec.Pod == ref && p.Spec.Node == d.opts.Node && p.DeletionTimestamp == nil &&
			p.Spec.Network == w.network.Name && (p.Spec.NetworkUID == "" || p.Spec.NetworkUID == string(object.UID)) {
			return p, nil
		}
		for _, a := range addresses(p.Spec.Addresses) {
			taken[a] = true
		}
	}
	p, err = ipam.Claimer{Ports: d.api, Node: d.opts.Node}.Claim(ctx, ipam.Claim{
		Network: object, Pod: ref, Addresses: w.addresses, Port: w.port, Provider: wiredElsewhere(object),
		Taken: func(a netip.Addr) bool { return taken[a] },
	})
	if err != nil {
		return nil, fmt.Errorf("network %s: %w", w.network, err)
	}
	return p, nil
}

// nicOf is what a Port becomes on this node.
func nicOf(container string, n *v1alpha1.Network, p *v1alpha1.Port, w request) (nic, error) {
	addrs, err := ipam.Addresses(p)
	if err != nil {
		return nic{}, err
	}
	subnets, err := ipam.Subnets(n)
	if err != nil {
		return nic{}, err
	}
	mac := macOf(n, p, addrs[0])
	if mac == nil && wiredElsewhere(n) {
		return nic{}, fmt.Errorf("port %s: status.mac %q, of the provider, is not an Ethernet unicast address: %w", p.Name, p.Status.MAC, errdefs.ErrInvalidArgument)
	}
	if mac == nil {
		return nic{}, fmt.Errorf("port %s: mac %q is not an Ethernet unicast address: %w", p.Name, p.Spec.MAC, errdefs.ErrInvalidArgument)
	}
	out := nic{
		Network: w.network, NetworkUID: n.UID, Edge: edgeID(n.UID), Port: p.Name, PortUID: p.UID,
		Interface: w.iface, Link: edge.LinkName(container, w.iface), MAC: mac.String(), MTU: int(n.Status.MTU),
		Addresses: addrs, Default: w.primary,
	}
	for _, a := range addrs {
		i := slices.IndexFunc(subnets, func(s ipam.Subnet) bool { return s.Prefix.Contains(a) })
		if i < 0 {
			return nic{}, fmt.Errorf("port %s: address %s is in no subnet of network %s: %w", p.Name, a, w.network, errdefs.ErrInvalidArgument)
		}
		out.Gateways = append(out.Gateways, subnets[i].Gateway)
	}
	if wiredElsewhere(n) {
		if out.VIF, err = vifOf(p); err != nil {
			return nic{}, err
		}
	}
	if !w.primary {
		for _, s := range subnets {
			out.Subnets = append(out.Subnets, s.Prefix)
		}
	}
	return out, nil
}

// activate writes that a Port is plugged.
func (d *Daemon) activate(ctx context.Context, p *v1alpha1.Port) error {
	if p.Status.Phase == "Active" {
		return nil
	}
	patch := client.RawPatch(types.MergePatchType, []byte(`{"status":{"phase":"Active"}}`))
	if err := d.api.Status().Patch(ctx, &v1alpha1.Port{ObjectMeta: metav1.ObjectMeta{Namespace: p.Namespace, Name: p.Name}}, patch); err != nil {
		return fmt.Errorf("port %s: %w", p.Name, err)
	}
	return nil
}

// unplug takes back what a failed add did, and what one before it that it went on from did.
func (d *Daemon) unplug(ctx context.Context, r *record, claimed []*v1alpha1.Port) {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), 10*time.Second)
	defer cancel()
	if r != nil {
		if err := d.detach(ctx, r); err != nil {
			// The record stays: DEL, which follows a failed ADD, tries again.
			log.G(ctx).WithError(err).WithField("pod", r.PodNamespace+"/"+r.PodName).Warn("undo a failed attachment")
			return
		}
	}
	for _, p := range claimed {
		if err := d.release(ctx, client.ObjectKeyFromObject(p), p.UID, p.Spec.Pod.Sandbox); err != nil {
			log.G(ctx).WithError(err).WithField("port", p.Name).Warn("undo a failed claim")
		}
	}
	if r != nil {
		if err := d.records.drop(r.key()); err != nil {
			log.G(ctx).WithError(err).Warn("undo a failed attachment")
		}
	}
}

// detach removes an attachment's links.
func (d *Daemon) detach(ctx context.Context, r *record) error {
	var errs []error
	for _, n := range r.NICs {
		if n.VIF != nil {
			if err := d.wirer.Unplug(ctx, *n.VIF); err != nil {
				errs = append(errs, fmt.Errorf("network %s: %w", n.Network, err))
			}
		}
		e, err := d.edges.Get(n.Edge)
		if errdefs.IsNotFound(err) {
			continue
		}
		if err == nil {
			err = e.Detach(ctx, n.Link)
		}
		errs = append(errs, err)
	}
	return errors.Join(errs...)
}

// release gives a Port back: deletes it or, if it was claimed beforehand, frees it.
func (d *Daemon) release(ctx context.Context, key client.ObjectKey, uid types.UID, sandbox string) error {
	// Others write the Port's status meanwhile.
	err := clientretry.RetryOnConflict(clientretry.DefaultBackoff, func() error {
		p := &v1alpha1.Port{}
		if err := d.api.Get(ctx, key, p); err != nil {
			return err
		}
		if p.UID != uid || p.Spec.Pod == nil || p.Spec.Pod.Sandbox != sandbox || p.Spec.Node != d.opts.Node {
			return nil // somebody else's by now
		}
		if p.Spec.Retain {
			p.Spec.Pod, p.Spec.Node = nil, ""
			return d.api.Update(ctx, p)
		}
		version := p.ResourceVersion
		return d.api.Delete(ctx, p, client.Preconditions{UID: &uid, ResourceVersion: &version})
	})
	return client.IgnoreNotFound(err)
}

// del takes an attachment out. It succeeds without the API server: reclaim gives the Ports
// back when it is there again, and the controller those of a node that never comes back.
func (d *Daemon) del(ctx context.Context, q *api.AttachRequest) (*api.DelResponse, error) {
	if err := validAttachment(q.ContainerId, q.Interface); err != nil {
		return nil, err
	}
	defer d.calls.lock(q.ContainerId)()
	r, ok := d.records.get(attachmentKey(q.ContainerId, q.Interface))
	if !ok {
		return &api.DelResponse{Delegate: true}, nil
	}
	return &api.DelResponse{}, d.remove(ctx, r)
}

// remove removes an attachment; its container's lock is held, or nobody can ask for it.
func (d *Daemon) remove(ctx context.Context, r *record) error {
	if err := d.detach(ctx, r); err != nil {
		return err
	}
	bounded, cancel := context.WithTimeout(ctx, apiTimeout)
	defer cancel()
	for _, n := range r.NICs {
		key := client.ObjectKey{Namespace: n.Network.Namespace, Name: n.Port}
		if err := d.release(bounded, key, n.PortUID, r.ContainerID); err != nil {
			d.lost.Store(true)
			log.G(ctx).WithError(err).WithField("port", key.String()).Warn("the Port is given back later")
		}
	}
	if err := d.records.drop(r.key()); err != nil {
		return err
	}
	for _, n := range r.NICs {
		d.enqueue(n.Network)
	}
	return nil
}

// check is CNI CHECK.
func (d *Daemon) check(ctx context.Context, q *api.AttachRequest) (*api.CheckResponse, error) {
	if err := validAttachment(q.ContainerId, q.Interface); err != nil {
		return nil, err
	}
	defer d.calls.lock(q.ContainerId)()
	r, ok := d.records.get(attachmentKey(q.ContainerId, q.Interface))
	if !ok {
		if _, _, bound, err := d.binding(ctx, q.PodNamespace); err != nil {
			return nil, err
		} else if bound {
			return nil, fmt.Errorf("container %s: no attachment of %s: %w", q.ContainerId, q.Interface, errdefs.ErrNotFound)
		}
		return &api.CheckResponse{Delegate: true}, nil
	}
	for _, n := range r.NICs {
		e, err := d.edges.Get(n.Edge)
		if err != nil {
			return nil, err
		}
		if err := e.Check(ctx, r.attachment(n)); err != nil {
			return nil, fmt.Errorf("network %s: %w", n.Network, err)
		}
	}
	return &api.CheckResponse{}, nil
}

// collect removes everything of ours but the attachments that are still in use.
func (d *Daemon) collect(ctx context.Context, q *api.GCRequest) error {
	valid := map[string]bool{}
	sandboxes := map[string]bool{}
	for _, a := range q.Valid {
		valid[attachmentKey(a.ContainerId, a.Interface)] = true
		sandboxes[a.ContainerId] = true
	}
	var errs []error
	for _, r := range d.records.list() {
		if valid[r.key()] {
			continue
		}
		func() {
			defer d.calls.lock(r.ContainerID)()
			errs = append(errs, d.remove(ctx, r))
		}()
	}
	links := map[string]map[string]bool{}
	for _, r := range d.records.list() {
		sandboxes[r.ContainerID] = true
		for _, n := range r.NICs {
			if links[n.Edge] == nil {
				links[n.Edge] = map[string]bool{}
			}
			links[n.Edge][n.Link] = true
		}
	}
	errs = append(errs, d.removeLinks(ctx, links), d.releaseLost(ctx, sandboxes))
	d.enqueueAll()
	return errors.Join(errs...)
}

// removeLinks removes links no attachment stands for.
func (d *Daemon) removeLinks(ctx context.Context, keep map[string]map[string]bool) error {
	d.strays.RLock() // none is removed while it is looked at
	defer d.strays.RUnlock()
	ids, err := d.edges.List()
	if err != nil {
		return err
	}
	var errs []error
	for _, id := range ids {
		e, err := d.edges.Get(id)
		if err != nil {
			errs = append(errs, err)
			continue
		}
		names, err := e.Links()
		if err != nil {
			errs = append(errs, err)
			continue
		}
		for _, l := range names {
			if !keep[id][l] && !d.plugging(l) {
				errs = append(errs, e.Detach(ctx, l))
			}
		}
	}
	return errors.Join(errs...)
}

// plugging tells whether a call has put the link's attachment on disk since.
func (d *Daemon) plugging(link string) bool {
	for _, r := range d.records.list() {
		for _, n := range r.NICs {
			if n.Link == link {
				return true
			}
		}
	}
	return false
}

// releaseLost gives back this node's Ports whose sandbox nobody knows: neither the caller
// nor an attachment on disk, and no call is about to make one. Its Pod may well be alive,
// in another sandbox, so nobody else would ever collect them.
func (d *Daemon) releaseLost(ctx context.Context, valid map[string]bool) error {
	all := &v1alpha1.PortList{}
	if err := d.api.List(ctx, all, client.MatchingFields{"spec.node": d.opts.Node}); err != nil {
		return fmt.Errorf("list ports of this node: %w", err)
	}
	var errs []error
	for i := range all.Items {
		p := &all.Items[i]
		if p.Spec.Node == d.opts.Node && p.Spec.Pod != nil && !valid[p.Spec.Pod.Sandbox] {
			errs = append(errs, d.releaseIfLost(ctx, p))
		}
	}
	return errors.Join(errs...)
}

func (d *Daemon) releaseIfLost(ctx context.Context, p *v1alpha1.Port) error {
	key, sandbox := client.ObjectKeyFromObject(p), p.Spec.Pod.Sandbox
	unlock, ok := d.calls.tryLock(sandbox)
	if !ok {
		d.lost.Store(true) // a call is under way: look again
		return nil
	}
	defer unlock()
	if d.records.has(sandbox) {
		return nil
	}
	log.G(ctx).WithFields(log.Fields{"port": key.String(), "pod": p.Spec.Pod.Namespace + "/" + p.Spec.Pod.Name}).Info("give back the Port of a sandbox that nobody knows")
	return d.release(ctx, key, p.UID, sandbox)
}

// reclaim is releaseLost whenever a Port may have been left claimed: by a process that was
// killed, or while the API server was away.
func (d *Daemon) reclaim(ctx context.Context) {
	if !d.lost.Swap(false) {
		return
	}
	ctx, cancel := context.WithTimeout(ctx, 10*apiTimeout)
	defer cancel()
	if err := d.releaseLost(ctx, nil); err != nil {
		d.lost.Store(true)
		log.G(ctx).WithError(err).Warn("give back lost Ports")
	}
}

// sweep removes attachments whose network namespace went while nobody was here.
func (d *Daemon) sweep(ctx context.Context) {
	for _, r := range d.records.list() {
		if _, err := os.Stat(r.NetNS); !errors.Is(err, os.ErrNotExist) {
			continue
		}
		unlock := d.calls.lock(r.ContainerID)
		if err := d.remove(ctx, r); err != nil {
			log.G(ctx).WithError(err).WithField("pod", r.PodNamespace+"/"+r.PodName).Warn("remove an attachment whose network namespace is gone")
		}
		unlock()
	}
}

// answer is what the plugin is told.
func (d *Daemon) answer(r *record) *api.AddResponse {
	out := &api.AddResponse{}
	for i, n := range r.NICs {
		f := &api.Interface{Name: n.Interface, Mac: n.MAC, Mtu: uint32(n.MTU), HostName: n.Link, Network: n.Network.String()}
		for _, a := range n.Addresses {
			f.Addresses = append(f.Addresses, netip.PrefixFrom(a, a.BitLen()).String())
			if server, ok := d.opts.resolver(a.Is4()); ok && i == 0 {
				out.DnsServers = append(out.DnsServers, server.String())
			}
		}
		for _, g := range n.Gateways {
			f.Gateways = append(f.Gateways, g.String())
		}
		out.Interfaces = append(out.Interfaces, f)
	}
	svc := "svc." + d.opts.ClusterDomain
	out.DnsSearch = []string{r.PodNamespace + "." + svc, svc, d.opts.ClusterDomain}
	out.DnsOptions = []string{"ndots:5"}
	return out
}
