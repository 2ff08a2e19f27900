package drain

import (
	"context"
	"encoding/json"
	"errors"
	"net/http"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/containerd/errdefs"

	"github.com/hypernetes/hypernetes/cluster/apiclient"
)

// server holds Pods; those it evicts are gone at once.
type server struct {
	mu      sync.Mutex
	pods    map[string]string // JSON by name
	blocked map[string]bool   // by a budget
	merged  []string
}

func (s *server) Get(_ context.Context, path string, out any) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if path != "/api/v1/pods?fieldSelector=spec.nodeName%3Dn1" {
		return errdefs.ErrNotFound
	}
	var items []string
	for _, p := range s.pods {
		items = append(items, p)
	}
	return json.Unmarshal([]byte(`{"items":[`+strings.Join(items, ",")+`]}`), out)
}

func (s *server) Create(_ context.Context, path string, _, _ any) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	name := strings.Split(path, "/")[6]
	if s.blocked[name] {
		delete(s.blocked, name) // the next time it may
		return &apiclient.StatusError{Code: http.StatusTooManyRequests, Message: "the budget needs 2"}
	}
	delete(s.pods, name)
	return nil
}

func (s *server) Merge(_ context.Context, path string, patch any) error {
	b, err := json.Marshal(patch)
	s.merged = append(s.merged, path+" "+string(b))
	return err
}

func (s *server) Delete(context.Context, string) error { return nil }

var _ API = (*server)(nil)

const (
	owned  = `{"metadata":{"name":"owned","namespace":"a","uid":"1","ownerReferences":[{"kind":"ReplicaSet","controller":true}]}}`
	daemon = `{"metadata":{"name":"daemon","namespace":"a","uid":"2","ownerReferences":[{"kind":"DaemonSet","controller":true}]}}`
	bare   = `{"metadata":{"name":"bare","namespace":"a","uid":"3"}}`
	done   = `{"metadata":{"name":"done","namespace":"a","uid":"4"},"status":{"phase":"Succeeded"}}`
)

func TestDrain(t *testing.T) {
	s := &server{pods: map[string]string{"owned": owned, "daemon": daemon, "done": done}, blocked: map[string]bool{"owned": true}}
	if err := Cordon(t.Context(), s, "n1", true); err != nil || s.merged[0] != `/api/v1/nodes/n1 {"spec":{"unschedulable":true}}` {
		t.Errorf("%v %v", s.merged, err)
	}
	var gone []string
	if err := Drain(t.Context(), s, "n1", false, func(p string) { gone = append(gone, p) }); err != nil {
		t.Fatal(err)
	}
	slices.Sort(gone)
	if !slices.Equal(gone, []string{"a/done", "a/owned"}) {
		t.Errorf("gone: %v", gone)
	}
}

func TestDrainSaysWhatBlocks(t *testing.T) {
	s := &server{pods: map[string]string{"bare": bare}}
	err := Drain(t.Context(), s, "n1", false, func(string) {})
	var blocked *BlockedError
	if !errors.As(err, &blocked) || !strings.Contains(err.Error(), "a/bare: nobody makes it anew") {
		t.Errorf("bare: %v", err)
	}
	if err := Drain(t.Context(), s, "n1", true, func(string) {}); err != nil {
		t.Errorf("forced: %v", err)
	}
	s = &server{pods: map[string]string{"owned": owned}, blocked: map[string]bool{"owned": true}}
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Millisecond)
	defer cancel()
	err = Drain(ctx, s, "n1", false, func(string) {})
	if !errors.As(err, &blocked) || !strings.Contains(err.Error(), "the budget needs 2") || !errdefs.IsFailedPrecondition(err) {
		t.Errorf("budget: %v", err)
	}
}
