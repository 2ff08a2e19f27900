package kubestack

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"sync"

	"github.com/containerd/errdefs"
	"k8s.io/apimachinery/pkg/types"

	v1alpha1 "github.com/hypernetes/hypernetes/api/hypernetes/v1alpha1"
	"github.com/hypernetes/hypernetes/atomicfile"
	"github.com/hypernetes/hypernetes/network/edge"
	"github.com/hypernetes/hypernetes/network/policy"
)

// record is one CNI attachment that this node made or was about to make: all that DEL, GC
// and a restart need without the API server.
type record struct {
	ContainerID  string `json:"containerID"`
	Interface    string `json:"interface"`
	NetNS        string `json:"netns"`
	PodNamespace string `json:"podNamespace"`
	PodName      string `json:"podName"`
	PodUID       string `json:"podUID"`
	NICs         []nic  `json:"nics"`
	// Labels and Ports of the Pod when it was added: a Pod whose object is gone while it
	// still runs is selected by policies as before.
	Labels map[string]string  `json:"labels,omitempty"`
	Ports  []policy.NamedPort `json:"ports,omitempty"`
}

// nic is one interface of an attachment.
type nic struct {
	Network    types.NamespacedName `json:"network"`
	NetworkUID types.UID            `json:"networkUID"`
	Edge       string               `json:"edge"`
	Port       string               `json:"port"`
	PortUID    types.UID            `json:"portUID"`
	Interface  string               `json:"interface"`
	Link       string               `json:"link"`
	MAC        string               `json:"mac"`
	MTU        int                  `json:"mtu"`
	Addresses  []netip.Addr         `json:"addresses"`
	Gateways   []netip.Addr         `json:"gateways"`
	Default    bool                 `json:"default"`
	Subnets    []netip.Prefix       `json:"subnets,omitempty"`
	// VIF is the NIC's uplink, where a provider wires one.
	VIF *VIF `json:"vif,omitempty"`
}

func (r *record) key() string { return attachmentKey(r.ContainerID, r.Interface) }

// attachment is what the edge is asked for.
func (r *record) attachment(n nic) edge.Attachment {
	mac, _ := net.ParseMAC(n.MAC)
	a := edge.Attachment{
		Link: n.Link, NetNS: r.NetNS, Interface: n.Interface, MAC: mac, MTU: n.MTU,
		Addresses: n.Addresses, Gateways: n.Gateways, Default: n.Default, Subnets: n.Subnets,
	}
	if n.VIF != nil {
		a.Uplink = n.VIF.Name
	}
	return a
}

// attachmentKey is the name of an attachment's file without its ending; the CNI plugin
// knows it too (AttachmentFile).
func attachmentKey(container, iface string) string { return container + "-" + iface }

var name = regexp.MustCompile(`^[a-zA-Z0-9][a-zA-Z0-9_.-]{0,127}$`)

// validAttachment checks what becomes part of a file's name.
func validAttachment(container, iface string) error {
	if !name.MatchString(container) {
		return fmt.Errorf("container ID %q: want letters, digits, _ . -: %w", container, errdefs.ErrInvalidArgument)
	}
	if len(iface) > 15 || !name.MatchString(iface) {
		return fmt.Errorf("interface %q: want at most 15 letters, digits, _ . -: %w", iface, errdefs.ErrInvalidArgument)
	}
	return nil
}

// records are the attachments of this node, on disk and in memory.
type records struct {
	dir string
	mu  sync.Mutex
	all map[string]*record
}

// openRecords reads what a former process left; files that cannot be read are told of and
// left: the links they stood for go when the runtime collects garbage.
func openRecords(dir string) (*records, error, error) {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, nil, err
	}
	entries, err := os.ReadDir(dir)
	if err != nil {
		return nil, nil, err
	}
	s := &records{dir: dir, all: map[string]*record{}}
	var unreadable []error
	for _, e := range entries {
		path := filepath.Join(dir, e.Name())
		key, ok := strings.CutSuffix(e.Name(), ".json")
		if !ok { // what a killed put left
			_ = os.Remove(path)
			continue
		}
		text, err := os.ReadFile(path)
		r := &record{}
		if err == nil {
			err = json.Unmarshal(text, r)
		}
		if err == nil && r.key() != key {
			err = fmt.Errorf("it is %s's", r.key())
		}
		if err != nil {
			unreadable = append(unreadable, fmt.Errorf("%s: %w", path, err))
			continue
		}
		s.all[key] = r
	}
	return s, errors.Join(unreadable...), nil
}

// put keeps a record; it is on disk when put returns. The lock of its container is held.
func (s *records) put(r *record) error {
	text, err := json.Marshal(r)
	if err != nil {
		return err
	}
	if err := atomicfile.Write(filepath.Join(s.dir, r.key()+".json"), text, 0o600); err != nil {
		return fmt.Errorf("keep attachment %s: %w", r.key(), err)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.all[r.key()] = r
	return nil
}

func (s *records) drop(key string) error {
	if err := os.Remove(filepath.Join(s.dir, key+".json")); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.all, key)
	return nil
}

func (s *records) get(key string) (*record, bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	r, ok := s.all[key]
	return r, ok
}

// has tells whether a container has an attachment, be it one that cannot be read.
func (s *records) has(container string) bool {
	if !name.MatchString(container) {
		return false
	}
	files, err := filepath.Glob(filepath.Join(s.dir, container+"-*.json"))
	return err != nil || len(files) > 0
}

func (s *records) list() []*record {
	s.mu.Lock()
	defer s.mu.Unlock()
	out := make([]*record, 0, len(s.all))
	for _, r := range s.all {
		out = append(out, r)
	}
	return out
}

// pods are what policies need to know of the Pods here whose objects are gone or not seen
// yet.
func (s *records) pods() map[types.UID]*record {
	s.mu.Lock()
	defer s.mu.Unlock()
	out := map[types.UID]*record{}
	for _, r := range s.all {
		out[types.UID(r.PodUID)] = r
	}
	return out
}

// nics are a Network's NICs here, by Port. Of two of one Port, as there are when a Pod has
// another sandbox before its former one is gone, it is that of the sandbox the Port names.
func (s *records) nics(network types.NamespacedName, ports []*v1alpha1.Port) map[string]nic {
	sandboxes := map[string]string{}
	for _, p := range ports {
		if p.Spec.Pod != nil {
			sandboxes[p.Name] = p.Spec.Pod.Sandbox
		}
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	out := map[string]nic{}
	for _, r := range s.all {
		for _, n := range r.NICs {
			if _, have := out[n.Port]; n.Network == network && (!have || sandboxes[n.Port] == r.ContainerID) {
				out[n.Port] = n
			}
		}
	}
	return out
}
