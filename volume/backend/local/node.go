package local

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"sync"
	"time"

	"github.com/containerd/errdefs"
	"github.com/containerd/log"
	"github.com/go-logr/logr"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/fields"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/client-go/rest"
	ctrl "sigs.k8s.io/controller-runtime"
	"sigs.k8s.io/controller-runtime/pkg/cache"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/config"
	"sigs.k8s.io/controller-runtime/pkg/controller"
	"sigs.k8s.io/controller-runtime/pkg/controller/controllerutil"
	metricsserver "sigs.k8s.io/controller-runtime/pkg/metrics/server"
	"sigs.k8s.io/controller-runtime/pkg/reconcile"

	v1alpha1 "github.com/hypernetes/hypernetes/api/hypernetes/v1alpha1"
	"github.com/hypernetes/hypernetes/volume/backend"
	"github.com/hypernetes/hypernetes/volume/record"
)

const (
	// copies is how many files are copied at a time, workers how many things are done: an
	// empty volume does not wait for large copies, unless there are many.
	copies  = 2
	workers = 8
	// refreshEvery is how often a node says how much room it has, at the least.
	refreshEvery = 30 * time.Second
	// busyAgain is when a volume in use is looked at again.
	busyAgain = 2 * time.Second
)

// Leases are what VMs have of volumes.
type Leases interface {
	// Lease takes a volume's lease: errdefs.ErrUnavailable if a VM has it,
	// errdefs.ErrNotFound if it is not staged.
	Lease(key string, exclusive bool) (interface{ Close() error }, error)
	// Pods that the volume is published to.
	Pods(key string) ([]string, error)
}

// recordLeases are the leases of the records.
type recordLeases struct{ store record.Store }

func (l recordLeases) Lease(key string, exclusive bool) (interface{ Close() error }, error) {
	f, err := l.store.Lease(key, exclusive)
	if err != nil {
		return nil, err
	}
	return f, nil
}

func (l recordLeases) Pods(key string) ([]string, error) {
	published, err := l.store.Publications(key)
	var out []string
	for _, p := range published {
		out = append(out, p.PodUID)
	}
	return out, err
}

// Node makes the files of one node's LocalVolumes and LocalSnapshots.
type Node struct {
	name   string
	driver string
	store  *Store
	leases Leases
	scheme *runtime.Scheme
	rest   *rest.Config
	client client.Client
	// tell is told of limits that changed; nil for nobody.
	tell backend.Limits

	// mu guards copying: volumes whose bytes are being copied must not get a VM, and
	// changed: the room has.
	mu      sync.Mutex
	copying map[string]int
	changed chan struct{}
	// slots are taken by copies.
	slots chan struct{}
}

var _ backend.Files = (*Node)(nil)

// NodeOptions are what a Node consists of.
type NodeOptions struct {
	// Name of the node, Driver the CSI driver's, by which records know its volumes.
	Name, Driver string
	// Dir has the files, Records the leases.
	Dir     string
	Records record.Store
	REST    *rest.Config
	// Client does not cache, and knows this project's objects.
	Client client.Client
}

// NewNode opens a node's files. Run makes it work.
func NewNode(o NodeOptions) (*Node, error) {
	store, err := OpenStore(o.Dir)
	if err != nil {
		return nil, err
	}
	return &Node{
		name: o.Name, driver: o.Driver, store: store, leases: recordLeases{o.Records}, rest: o.REST, client: o.Client,
		scheme: o.Client.Scheme(), copying: map[string]int{}, changed: make(chan struct{}, 1), slots: make(chan struct{}, copies),
	}, nil
}

// Connect implements backend.Files.
func (n *Node) Connect(_ context.Context, id string) (backend.Connection, error) {
	n.mu.Lock()
	busy := n.copying[id] > 0
	n.mu.Unlock()
	if busy {
		return backend.Connection{}, fmt.Errorf("volume %s is being copied: its Pod starts when that is done: %w", id, errdefs.ErrUnavailable)
	}
	d, err := n.store.Volume(id)
	if err != nil {
		return backend.Connection{}, err
	}
	return connection(d), nil
}

func connection(d Disk) backend.Connection {
	format := record.FormatNever
	if d.Blank {
		format = record.FormatBlank
	}
	return backend.Connection{SizeBytes: d.SizeBytes, Format: format, Source: record.Source{File: &record.File{Path: d.Path}}, Throttle: d.Throttle}
}

// Run works until ctx ends.
func (n *Node) Run(ctx context.Context) error {
	mine := fields.OneTermEqualSelector("spec.node", n.name)
	skip := true // several nodes in one process of tests
	mgr, err := ctrl.NewManager(n.rest, ctrl.Options{
		Scheme: n.scheme, Logger: logr.Discard(), LeaderElection: false, Metrics: metricsserver.Options{BindAddress: "0"}, HealthProbeBindAddress: "0",
		Cache: cache.Options{ByObject: map[client.Object]cache.ByObject{
			&v1alpha1.LocalVolume{}:   {Field: mine},
			&v1alpha1.LocalSnapshot{}: {Field: mine},
		}},
		Controller: config.Controller{SkipNameValidation: &skip},
	})
	if err != nil {
		return fmt.Errorf("local volumes: %w", err)
	}
	options := controller.Options{MaxConcurrentReconciles: workers}
	volumes := reconcile.AsReconciler(n.client, reconcile.ObjectReconciler[*v1alpha1.LocalVolume](reconcilerFunc[*v1alpha1.LocalVolume](n.volume)))
	snapshots := reconcile.AsReconciler(n.client, reconcile.ObjectReconciler[*v1alpha1.LocalSnapshot](reconcilerFunc[*v1alpha1.LocalSnapshot](n.snapshot)))
	err = errors.Join(
		ctrl.NewControllerManagedBy(mgr).For(&v1alpha1.LocalVolume{}).Named("localvolume").WithOptions(options).Complete(volumes),
		ctrl.NewControllerManagedBy(mgr).For(&v1alpha1.LocalSnapshot{}).Named("localsnapshot").WithOptions(options).Complete(snapshots),
	)
	if err != nil {
		return fmt.Errorf("local volumes: %w", err)
	}
	var refreshing sync.WaitGroup
	refreshing.Go(func() { n.refresh(ctx) })
	defer refreshing.Wait()
	return mgr.Start(ctx)
}

// reconcilerFunc is a function as an ObjectReconciler.
type reconcilerFunc[T client.Object] func(context.Context, T) (reconcile.Result, error)

func (f reconcilerFunc[T]) Reconcile(ctx context.Context, o T) (reconcile.Result, error) {
	r, err := f(ctx, o)
	if err != nil && ctx.Err() == nil {
		log.G(ctx).WithError(err).WithField("object", o.GetName()).Warn("tried again")
	}
	return r, err
}

// volume makes, grows or removes a volume's file.
func (n *Node) volume(ctx context.Context, v *v1alpha1.LocalVolume) (reconcile.Result, error) {
	if v.Spec.Node != n.name {
		return reconcile.Result{}, nil
	}
	id := ID(v)
	if !v.DeletionTimestamp.IsZero() {
		if !controllerutil.ContainsFinalizer(v, v1alpha1.FinalizerLocal) {
			return reconcile.Result{}, nil
		}
		return n.removeVolume(ctx, v, id)
	}
	if v.Status.Phase == v1alpha1.LocalFailed {
		return reconcile.Result{}, nil
	}
	have, err := n.store.Volume(id)
	status := v1alpha1.LocalVolumeStatus{Phase: v1alpha1.LocalReady, SizeBytes: have.SizeBytes, ObservedBytes: v.Spec.SizeBytes, ObservedGeneration: v.Generation}
	switch {
	case errdefs.IsNotFound(err) && v.Status.Phase == v1alpha1.LocalReady:
		// Never an empty one in its place.
		status = v1alpha1.LocalVolumeStatus{Phase: v1alpha1.LocalFailed, Reason: v1alpha1.LocalInvalid,
			Message: fmt.Sprintf("the file of the volume is gone from node %s: %v", n.name, err)}
	case errdefs.IsNotFound(err):
		if err := n.makeVolume(v, id); err != nil {
			reason, final := reasonOf(err)
			if !final {
				return reconcile.Result{}, err
			}
			log.G(ctx).WithError(err).WithField("volume", v.Name).Warn("local volume cannot be made")
			status = v1alpha1.LocalVolumeStatus{Phase: v1alpha1.LocalFailed, Reason: reason, Message: err.Error()}
			break
		}
		if have, err = n.store.Volume(id); err != nil {
			return reconcile.Result{}, err
		}
		status.SizeBytes = have.SizeBytes
		log.G(ctx).WithField("volume", v.Name).WithField("bytes", have.SizeBytes).Info("local volume made")
	case err != nil:
		return reconcile.Result{}, err
	case have.SizeBytes < v.Spec.SizeBytes:
		status.SizeBytes, err = n.store.GrowVolume(id, v.Spec.SizeBytes)
		if err != nil {
			reason, final := reasonOf(err)
			if !final {
				return reconcile.Result{}, err
			}
			status.Reason, status.Message = reason, "cannot grow: "+err.Error()
		}
	}
	n.roomChanged()
	var limiting error
	if status.Phase == v1alpha1.LocalReady {
		limiting = n.limit(ctx, id, recordThrottle(v.Spec.Throttle))
		if limiting != nil && v.Status.Phase != v1alpha1.LocalReady {
			return reconcile.Result{}, limiting // nobody has it before it is bounded
		}
		if limiting != nil {
			status.ObservedGeneration = v.Status.ObservedGeneration
		}
	}
	if err := n.setVolume(ctx, v, status); err != nil {
		return reconcile.Result{}, errors.Join(limiting, err)
	}
	switch {
	case errdefs.IsUnavailable(limiting), errdefs.IsAborted(limiting):
		// A VM that starts, or a call that is under way.
		return reconcile.Result{RequeueAfter: busyAgain}, nil
	case limiting != nil:
		return reconcile.Result{}, limiting
	}
	if status.Reason == v1alpha1.LocalNoSpace && status.Phase == v1alpha1.LocalReady {
		return reconcile.Result{RequeueAfter: refreshEvery}, nil
	}
	return reconcile.Result{}, nil
}

func (n *Node) makeVolume(v *v1alpha1.LocalVolume, id string) error {
	s := v.Spec.Source
	if s == nil {
		return n.store.CreateVolume(id, v.Spec.SizeBytes)
	}
	if s.Snapshot != "" {
		from, err := n.store.Snapshot(s.Snapshot)
		if err != nil {
			return err
		}
		n.slots <- struct{}{}
		defer func() { <-n.slots }()
		return n.store.CopyVolume(id, from, v.Spec.SizeBytes)
	}
	return n.copyOf(s.Volume, func(from Disk) error { return n.store.CopyVolume(id, from, v.Spec.SizeBytes) })
}

// copyOf calls copy with a volume that changes for nobody meanwhile, or whose file system
// does not mind.
func (n *Node) copyOf(id string, copy func(Disk) error) error {
	n.slots <- struct{}{}
	defer func() { <-n.slots }()
	n.mu.Lock()
	n.copying[id]++
	n.mu.Unlock()
	defer func() {
		n.mu.Lock()
		if n.copying[id]--; n.copying[id] == 0 {
			delete(n.copying, id)
		}
		n.mu.Unlock()
	}()
	from, err := n.store.Volume(id)
	if err != nil {
		return err
	}
	lease, err := n.leases.Lease(record.Key(n.driver, id), false)
	switch {
	case errdefs.IsNotFound(err): // no VM has it, and none gets it now
	case errdefs.IsUnavailable(err) && n.store.Reflink():
	case errdefs.IsUnavailable(err):
		return fmt.Errorf("volume %s is in use (%v), and the file system of node %s cannot copy it at a moment: stop its Pod, or keep the node's volumes on XFS or Btrfs: %w",
			id, err, n.name, errdefs.ErrFailedPrecondition)
	case err != nil:
		return err
	default:
		defer lease.Close()
	}
	return copy(from)
}

// reasonOf is why something failed for good; false if it should be tried again.
func reasonOf(err error) (string, bool) {
	switch {
	case errdefs.IsResourceExhausted(err):
		return v1alpha1.LocalNoSpace, true
	case errdefs.IsFailedPrecondition(err):
		return v1alpha1.LocalInUse, true
	case errdefs.IsNotFound(err), errdefs.IsInvalidArgument(err), errdefs.IsDataLoss(err):
		return v1alpha1.LocalInvalid, true
	}
	return "", false
}

// removeVolume removes the file when no VM has it, and lets the object go.
func (n *Node) removeVolume(ctx context.Context, v *v1alpha1.LocalVolume, id string) (reconcile.Result, error) {
	key := record.Key(n.driver, id)
	pods, err := n.leases.Pods(key)
	if err != nil {
		return reconcile.Result{}, err
	}
	lease, err := n.leases.Lease(key, true)
	switch {
	case len(pods) > 0 || errdefs.IsUnavailable(err):
		if lease != nil {
			_ = lease.Close()
		}
		status := v.Status
		status.Reason, status.Message = v1alpha1.LocalInUse, fmt.Sprintf("is deleted when it is not in use any more (Pods %v)", pods)
		return reconcile.Result{RequeueAfter: busyAgain}, n.setVolume(ctx, v, status)
	case errdefs.IsNotFound(err):
	case err != nil:
		return reconcile.Result{}, err
	default:
		defer lease.Close()
	}
	if err := n.store.DeleteVolume(id); err != nil {
		return reconcile.Result{}, err
	}
	n.roomChanged()
	log.G(ctx).WithField("volume", v.Name).Info("local volume removed")
	return reconcile.Result{}, n.letGo(ctx, v)
}

// snapshot makes or removes a snapshot's file.
func (n *Node) snapshot(ctx context.Context, s *v1alpha1.LocalSnapshot) (reconcile.Result, error) {
	if s.Spec.Node != n.name {
		return reconcile.Result{}, nil
	}
	id := ID(s)
	if !s.DeletionTimestamp.IsZero() {
		if !controllerutil.ContainsFinalizer(s, v1alpha1.FinalizerLocal) {
			return reconcile.Result{}, nil
		}
		if err := n.store.DeleteSnapshot(id); err != nil {
			return reconcile.Result{}, err
		}
		n.roomChanged()
		return reconcile.Result{}, n.letGo(ctx, s)
	}
	if s.Status.Phase == v1alpha1.LocalFailed {
		return reconcile.Result{}, nil
	}
	have, err := n.store.Snapshot(id)
	if errdefs.IsNotFound(err) && s.Status.Phase == v1alpha1.LocalReady {
		return reconcile.Result{}, n.setSnapshot(ctx, s, v1alpha1.LocalSnapshotStatus{Phase: v1alpha1.LocalFailed, Reason: v1alpha1.LocalInvalid,
			Message: fmt.Sprintf("the file of the snapshot is gone from node %s", n.name)})
	}
	at := metav1.Now()
	if errdefs.IsNotFound(err) {
		err = n.copyOf(s.Spec.Volume, func(from Disk) error { at = metav1.Now(); return n.store.CopySnapshot(id, from) })
		if reason, final := reasonOf(err); err != nil && final {
			log.G(ctx).WithError(err).WithField("snapshot", s.Name).Warn("local snapshot cannot be made")
			return reconcile.Result{}, n.setSnapshot(ctx, s, v1alpha1.LocalSnapshotStatus{Phase: v1alpha1.LocalFailed, Reason: reason, Message: err.Error()})
		}
		if err == nil {
			have, err = n.store.Snapshot(id)
		}
	}
	if err != nil {
		return reconcile.Result{}, err
	}
	n.roomChanged()
	if s.Status.CreatedAt != nil {
		at = *s.Status.CreatedAt
	}
	return reconcile.Result{}, n.setSnapshot(ctx, s, v1alpha1.LocalSnapshotStatus{Phase: v1alpha1.LocalReady, SizeBytes: have.SizeBytes, CreatedAt: &at})
}

func (n *Node) setVolume(ctx context.Context, v *v1alpha1.LocalVolume, status v1alpha1.LocalVolumeStatus) error {
	if v.Status == status {
		return nil
	}
	before := v.DeepCopy()
	v.Status = status
	return client.IgnoreNotFound(n.client.Status().Patch(ctx, v, client.MergeFrom(before)))
}

func (n *Node) setSnapshot(ctx context.Context, s *v1alpha1.LocalSnapshot, status v1alpha1.LocalSnapshotStatus) error {
	if s.Status.Phase == status.Phase && s.Status.Message == status.Message {
		return nil
	}
	before := s.DeepCopy()
	s.Status = status
	return client.IgnoreNotFound(n.client.Status().Patch(ctx, s, client.MergeFrom(before)))
}

// letGo takes the finalizer off what has no file any more.
func (n *Node) letGo(ctx context.Context, o client.Object) error {
	before := o.DeepCopyObject().(client.Object)
	controllerutil.RemoveFinalizer(o, v1alpha1.FinalizerLocal)
	return client.IgnoreNotFound(n.client.Patch(ctx, o, client.MergeFromWithOptions(before, client.MergeFromWithOptimisticLock{})))
}

func (n *Node) roomChanged() {
	select {
	case n.changed <- struct{}{}:
	default:
	}
}

// refresh keeps the node's LocalStore true until ctx ends.
func (n *Node) refresh(ctx context.Context) {
	tick := time.NewTicker(refreshEvery)
	defer tick.Stop()
	for {
		if err := n.report(ctx); err != nil && ctx.Err() == nil {
			log.G(ctx).WithError(err).Warn("the room for local volumes could not be reported")
		}
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		case <-n.changed:
		}
	}
}

func (n *Node) report(ctx context.Context) error {
	r, err := n.store.Room()
	if err != nil {
		return err
	}
	s := &v1alpha1.LocalStore{}
	err = n.client.Get(ctx, client.ObjectKey{Name: n.name}, s)
	if apierrors.IsNotFound(err) {
		s = &v1alpha1.LocalStore{ObjectMeta: metav1.ObjectMeta{Name: n.name}}
		err = n.client.Create(ctx, s)
	}
	if err != nil {
		return err
	}
	// In steps of a MiB: what others write to the disk all the time is no news.
	status := v1alpha1.LocalStoreStatus{
		TotalBytes: r.TotalBytes, AvailableBytes: r.AvailableBytes &^ (mebibyte - 1), Reflink: r.Reflink,
		Volumes: int32(r.Volumes), Snapshots: int32(r.Snapshots), RefreshedAt: s.Status.RefreshedAt,
	}
	if status == s.Status {
		return nil
	}
	now := metav1.Now()
	status.RefreshedAt = &now
	before := s.DeepCopy()
	s.Status = status
	return n.client.Status().Patch(ctx, s, client.MergeFrom(before))
}

// Dir is where a node's files are below the plugin's state directory.
func Dir(state string) string { return filepath.Join(state, "local") }
