package kubestack

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"os/exec"
	"regexp"
	"strings"
	"time"

	"github.com/containerd/errdefs"
	"github.com/containerd/log"
	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"sigs.k8s.io/controller-runtime/pkg/client"

	v1alpha1 "github.com/hypernetes/hypernetes/api/hypernetes/v1alpha1"
	"github.com/hypernetes/hypernetes/network/edge"
	"github.com/hypernetes/hypernetes/network/provider"
)

// A Network that Neutron carries has a Neutron port for each Port. The claim is made here
// as ever; the controller, which has the credentials, makes the Neutron port and writes
// what came of it into the Port's status; the node plugs an uplink of that name, and the
// cloud's L2 agent, which runs beside it, wires that. This is the node's half.

const (
	// madeTimeout is how long the controller may take to make the provider's port, and
	// wiredTimeout how long the agent to wire it. Giving up costs a busy cloud more than
	// waiting: what it was asked for it makes all the same, and has then to remove.
	madeTimeout  = 75 * time.Second
	wiredTimeout = 60 * time.Second
	// maxLost is how many addresses may turn out to be others' at the provider.
	maxLost = 16
	// switchTimeout is ovs-vsctl's.
	switchTimeout = 10 * time.Second
	// integrationBridge is where Neutron's agents look for ports, unless told otherwise.
	integrationBridge = "br-int"
)

// How a provider wants a NIC plugged (Neutron's binding:vif_type).
const (
	// vifBridge: the linuxbridge agent finds the link by its name.
	vifBridge = "bridge"
	// vifOVS: the link is a port of the integration bridge, which says whose it is. OVN's
	// ports are bound so, too.
	vifOVS = "ovs"
)

// Patience is how long a Pod's start waits for a provider.
type Patience struct {
	// Made is until it has a port of its own, Wired until it carries its packets.
	Made, Wired time.Duration
}

// wiredElsewhere tells whether the Network is carried by somebody who wires an uplink for
// each NIC.
func wiredElsewhere(n *v1alpha1.Network) bool { return n.Status.Provider == provider.Neutron }

// VIF is the uplink of a NIC.
type VIF struct {
	// Type is the provider's word for how it is plugged.
	Type string `json:"type"`
	// Name of the link in the node's namespace.
	Name string `json:"name"`
	// Port is the provider's.
	Port string `json:"port"`
	MAC  string `json:"mac"`
	// Pod's UID, or the Service's that the port is a front of.
	Pod string `json:"pod"`
}

var portID = regexp.MustCompile(`^[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}$`)

// vifOf reads how a Port wants to be plugged. What it says becomes part of commands and of
// names of links.
func vifOf(p *v1alpha1.Port) (*VIF, error) {
	if !portID.MatchString(p.Status.ProviderPortID) {
		return nil, fmt.Errorf("port %s: status.providerPortID %q is no UUID: %w", p.Name, p.Status.ProviderPortID, errdefs.ErrInvalidArgument)
	}
	switch p.Status.VIFType {
	case vifBridge, vifOVS:
	default:
		return nil, provider.Faultf("PluggingUnsupported", "port %s: the provider wants it plugged as %q and this node knows %s and %s: bind it by another mechanism driver: %w",
			p.Name, p.Status.VIFType, vifBridge, vifOVS, errdefs.ErrNotImplemented)
	}
	// As all of Neutron's agents call it.
	v := &VIF{Type: p.Status.VIFType, Name: "tap" + p.Status.ProviderPortID[:11], Port: p.Status.ProviderPortID, MAC: p.Status.MAC}
	if p.Spec.Pod != nil {
		v.Pod = p.Spec.Pod.UID
	} else if p.Spec.Service != nil {
		v.Pod = p.Spec.Service.UID
	}
	return v, nil
}

// Wirer connects uplinks to what no agent finds by itself. Both methods can be called
// again.
type Wirer interface {
	Plug(ctx context.Context, v VIF) error
	Unplug(ctx context.Context, v VIF) error
}

// wirer is the node's.
type wirer struct {
	// run runs a command and returns what it wrote to its standard error.
	run func(ctx context.Context, name string, args ...string) (string, error)
}

var _ Wirer = wirer{}

// Plug implements Wirer.
func (w wirer) Plug(ctx context.Context, v VIF) error {
	if v.Type != vifOVS {
		return nil
	}
	return w.vsctl(ctx, "--may-exist", "add-port", integrationBridge, v.Name, "--", "set", "Interface", v.Name,
		`external_ids:iface-id="`+v.Port+`"`, `external_ids:attached-mac="`+v.MAC+`"`, `external_ids:vm-uuid="`+v.Pod+`"`, "external_ids:iface-status=active")
}

// Unplug implements Wirer.
func (w wirer) Unplug(ctx context.Context, v VIF) error {
	if v.Type != vifOVS {
		return nil
	}
	err := w.vsctl(ctx, "--if-exists", "del-port", integrationBridge, v.Name)
	if errors.Is(err, exec.ErrNotFound) {
		return nil // no switch, no port: a Pod must be able to go
	}
	return err
}

func (w wirer) vsctl(ctx context.Context, args ...string) error {
	ctx, cancel := context.WithTimeout(ctx, switchTimeout)
	defer cancel()
	args = append([]string{fmt.Sprintf("--timeout=%d", int(switchTimeout.Seconds()))}, args...)
	if text, err := w.run(ctx, "ovs-vsctl", args...); err != nil {
		return provider.Faultf("SwitchFailed", "ovs-vsctl %s: %s: is Open vSwitch running on this node?: %w: %w", args[1], cmp.Or(strings.TrimSpace(text), "no answer"), errdefs.ErrUnavailable, err)
	}
	return nil
}

func run(ctx context.Context, name string, args ...string) (string, error) {
	var text bytes.Buffer
	cmd := exec.CommandContext(ctx, name, args...)
	cmd.Stderr, cmd.WaitDelay = &text, time.Second
	err := cmd.Run()
	return text.String(), err
}

// watched is a Port as the watch has it; nil if it has none of that UID.
func (n *network) watched(p *v1alpha1.Port) *v1alpha1.Port {
	n.watches.Lock()
	defer n.watches.Unlock()
	if n.ports == nil {
		return nil
	}
	is, ok := n.ports.get(client.ObjectKeyFromObject(p).String())
	if !ok || is.UID != p.UID {
		return nil
	}
	return is
}

// current is a condition that is about a Port as it is now: one claimed beforehand keeps
// those of its last Pod for a moment.
func current(p *v1alpha1.Port, kind string, generation int64) *metav1.Condition {
	if c := meta.FindStatusCondition(p.Status.Conditions, kind); c != nil && c.ObservedGeneration >= generation {
		return c
	}
	return nil
}

// made waits until the provider has a port for p, and returns it with what is known of
// that.
func (d *Daemon) made(ctx context.Context, n *network, p *v1alpha1.Port) (*v1alpha1.Port, error) {
	ctx, cancel := context.WithTimeout(ctx, d.patient.Made)
	defer cancel()
	var is *v1alpha1.Port
	var ready *metav1.Condition
	if poll(ctx, func() bool {
		if is = n.watched(p); is == nil {
			return false
		}
		ready = current(is, v1alpha1.ConditionReady, p.Generation)
		return ready != nil && (is.Status.Phase == v1alpha1.PortFailed || is.Status.Phase == v1alpha1.PortActive && ready.Status == metav1.ConditionTrue)
	}) {
		if is.Status.Phase == v1alpha1.PortActive {
			return is, nil
		}
		var class error = errdefs.ErrFailedPrecondition
		if ready.Reason == v1alpha1.ReasonAddressInUse {
			class = errdefs.ErrAlreadyExists
		}
		return nil, provider.Faultf(ready.Reason, "port %s: %s: %w", p.Name, ready.Message, class)
	}
	reason, why := "ProviderPortPending", "its controller has not said anything of it: is h8s-controller running?"
	if ready != nil && ready.Message != "" {
		reason, why = cmp.Or(ready.Reason, reason), ready.Message
	}
	return nil, provider.Faultf(reason, "port %s: the provider has no port for it after %s: %s: %w", p.Name, d.patient.Made, why, errdefs.ErrUnavailable)
}

// wired waits until the provider carries a NIC's packets.
func (d *Daemon) wired(ctx context.Context, n *network, r *record, c nic, p *v1alpha1.Port) error {
	bounded, cancel := context.WithTimeout(ctx, d.patient.Wired)
	defer cancel()
	start := time.Now()
	var last *metav1.Condition
	if !poll(bounded, func() bool {
		is := n.watched(p)
		if is == nil {
			return false
		}
		last = current(is, v1alpha1.ConditionWired, p.Generation)
		return last != nil && last.Status == metav1.ConditionTrue
	}) {
		reason, why := "NotWired", "the controller has not said anything of it"
		if last != nil && last.Message != "" {
			reason, why = cmp.Or(last.Reason, reason), last.Message
		}
		return provider.Faultf(reason, "network %s: port %s: %s is plugged, but the provider does not carry its packets after %s: %s: %w",
			n.key, p.Name, c.VIF.Name, time.Since(start).Round(time.Second), why, errdefs.ErrUnavailable)
	}
	d.announce(ctx, r, c)
	return nil
}

// announce tells others on a NIC's layer 2 where it is: they may remember who had its
// addresses before, for half a minute. What is said first may be lost on its way, as what
// says that it is wired may be early, so it is said again, while the daemon lives.
func (d *Daemon) announce(ctx context.Context, r *record, c nic) {
	say := func(ctx context.Context) bool {
		is, ok := d.records.get(r.key())
		if !ok || is.NetNS != r.NetNS {
			return false
		}
		e, err := d.edges.Get(c.Edge)
		if err == nil {
			err = e.Announce(ctx, r.attachment(c))
		}
		if err != nil {
			log.G(ctx).WithError(err).WithField("pod", r.PodNamespace+"/"+r.PodName).Debug("announce addresses")
		}
		return true
	}
	if !say(ctx) {
		return
	}
	d.later.Go(func() {
		for _, wait := range []time.Duration{time.Second, 3 * time.Second, 10 * time.Second} {
			select {
			case <-d.ctx.Done():
				return
			case <-time.After(wait):
			}
			if !say(d.ctx) {
				return
			}
		}
	})
}

// rewire plugs anew what has another port at the provider than it was plugged with: the
// controller has made one in the place of one that somebody deleted. The edge has renamed
// the link already.
func (d *Daemon) rewire(ctx context.Context, s *snapshot, spec edge.Spec) error {
	if !spec.Uplinks {
		return nil
	}
	key := client.ObjectKeyFromObject(s.Network)
	byLink := map[string]*VIF{}
	for _, p := range s.ports() {
		if p.link != "" && p.vif != nil {
			byLink[p.link] = p.vif
		}
	}
	for _, r := range d.records.list() {
		changed := false
		for _, n := range r.NICs {
			v := byLink[n.Link]
			changed = changed || v != nil && n.VIF != nil && *v != *n.VIF
		}
		if !changed {
			continue
		}
		if err := d.rewireOne(ctx, key, r, byLink); err != nil {
			return err
		}
	}
	return nil
}

func (d *Daemon) rewireOne(ctx context.Context, key types.NamespacedName, r *record, byLink map[string]*VIF) error {
	unlock, ok := d.calls.tryLock(r.ContainerID)
	if !ok {
		d.enqueue(key) // a call is under way: look again
		return nil
	}
	defer unlock()
	if is, ok := d.records.get(r.key()); !ok || is != r {
		return nil
	}
	again := *r
	again.NICs = append([]nic(nil), r.NICs...)
	for i, n := range again.NICs {
		v := byLink[n.Link]
		if v == nil || n.VIF == nil || *v == *n.VIF {
			continue
		}
		if n.VIF.Name != v.Name {
			if err := d.wirer.Unplug(ctx, *n.VIF); err != nil {
				return fmt.Errorf("network %s: %w", n.Network, err)
			}
		}
		if err := d.wirer.Plug(ctx, *v); err != nil {
			return fmt.Errorf("network %s: %w", n.Network, err)
		}
		log.G(ctx).WithFields(log.Fields{"pod": r.PodNamespace + "/" + r.PodName, "port": n.Port, "was": n.VIF.Name, "is": v.Name}).Warn("the provider has another port for it: plugged anew")
		again.NICs[i].VIF = v
	}
	return d.records.put(&again)
}
