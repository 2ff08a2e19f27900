package kubestack

import (
	"net/netip"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	v1alpha1 "github.com/hypernetes/hypernetes/api/hypernetes/v1alpha1"
	"github.com/hypernetes/hypernetes/network/announcer"
)

// TestNodesThatSaySo keeps addresses where they are while a node that was ready says that
// it is not, and moves them when it falls silent or stays like that.
func TestNodesThatSaySo(t *testing.T) {
	of := func(s corev1.ConditionStatus) *corev1.Node {
		return &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: "n"}, Status: corev1.NodeStatus{Conditions: []corev1.NodeCondition{{Type: corev1.NodeReady, Status: s}}}}
	}
	for name, x := range map[string]struct {
		states []corev1.ConditionStatus
		ago    time.Duration
		want   bool
	}{
		"ready":       {states: []corev1.ConditionStatus{"True"}, want: true},
		"says no":     {states: []corev1.ConditionStatus{"True", "False"}, want: true},
		"for long":    {states: []corev1.ConditionStatus{"True", "False"}, ago: announcer.Grace + time.Second},
		"silent":      {states: []corev1.ConditionStatus{"True", "Unknown"}},
		"new":         {states: []corev1.ConditionStatus{"False"}},
		"comes back":  {states: []corev1.ConditionStatus{"True", "Unknown", "False"}},
		"again":       {states: []corev1.ConditionStatus{"True", "Unknown", "False", "True", "False"}, want: true},
		"silent then": {states: []corev1.ConditionStatus{"True", "False", "Unknown"}},
	} {
		t.Run(name, func(t *testing.T) {
			k := &cluster{unready: map[string]time.Time{}}
			var was *corev1.Node
			for _, s := range x.states {
				is := of(s)
				k.remember(was, is)
				was = is
			}
			for n, since := range k.unready {
				k.unready[n] = since.Add(-x.ago)
			}
			n := readNode(was, netip.Addr{})
			if got := k.ready(n); got != x.want {
				t.Errorf("ready: %v, want %v", got, x.want)
			}
		})
	}
}

// TestSamePort: a Port of a provider that replaced it is another, one that is further on
// its way is not.
func TestSamePort(t *testing.T) {
	was := &v1alpha1.Port{Spec: v1alpha1.PortSpec{Network: "n"}, Status: v1alpha1.PortStatus{ProviderPortID: "a", MAC: "m", VIFType: "bridge"}}
	for name, x := range map[string]struct {
		change func(*v1alpha1.Port)
		same   bool
	}{
		"phase":         {func(p *v1alpha1.Port) { p.Status.Phase = "Active" }, true},
		"condition":     {func(p *v1alpha1.Port) { p.Status.Conditions = []metav1.Condition{{Type: "Wired"}} }, true},
		"node":          {func(p *v1alpha1.Port) { p.Spec.Node = "n1" }, false},
		"provider port": {func(p *v1alpha1.Port) { p.Status.ProviderPortID = "b" }, false},
		"mac":           {func(p *v1alpha1.Port) { p.Status.MAC = "o" }, false},
		"vif":           {func(p *v1alpha1.Port) { p.Status.VIFType = "ovs" }, false},
		"going":         {func(p *v1alpha1.Port) { p.DeletionTimestamp = &metav1.Time{Time: time.Now()} }, false},
	} {
		is := was.DeepCopy()
		x.change(is)
		if got := samePort(was, is); got != x.same {
			t.Errorf("%s: %v, want %v", name, got, x.same)
		}
	}
}
