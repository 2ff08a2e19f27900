package command

import (
	"context"
	"fmt"
	"sync"
	"time"

	"github.com/containerd/errdefs"
	storagev1 "k8s.io/api/storage/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"github.com/hypernetes/hypernetes/volume/driver"
)

// nodeIDs reads CSINodes, and remembers them for the length of a list.
type nodeIDs struct {
	reader client.Reader

	mu    sync.Mutex
	known map[string]knownNode
}

type knownNode struct {
	id    string
	until time.Time
}

const (
	remember = 10 * time.Second
	// maxKnown bounds what is remembered: names come from the provider.
	maxKnown = 10000
)

var _ driver.Nodes = (*nodeIDs)(nil)

// NodeID implements driver.Nodes.
func (n *nodeIDs) NodeID(ctx context.Context, name, node string) (string, error) {
	n.mu.Lock()
	k, ok := n.known[node]
	n.mu.Unlock()
	if ok && time.Now().Before(k.until) {
		return k.id, nil
	}
	object := &storagev1.CSINode{}
	err := n.reader.Get(ctx, client.ObjectKey{Name: node}, object)
	if err != nil && !apierrors.IsNotFound(err) {
		return "", fmt.Errorf("CSINode %s: %w: %w", node, errdefs.ErrUnavailable, err)
	}
	id := ""
	for _, d := range object.Spec.Drivers {
		if d.Name == name {
			id = d.NodeID
		}
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.known == nil || len(n.known) >= maxKnown {
		n.known = map[string]knownNode{}
	}
	n.known[node] = knownNode{id, time.Now().Add(remember)}
	return id, nil
}
