package qemu

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/containerd/errdefs"

	"github.com/hypernetes/hypernetes/runtime/vmm"
	"github.com/hypernetes/hypernetes/runtime/vmm/qemu/qmp"
)

// undoTimeout bounds each command that takes back a failed one, whose ctx may be over.
const undoTimeout = 5 * time.Second

// AddDisk implements vmm.VM. A serial that is there already is errdefs.ErrAlreadyExists.
func (m *VM) AddDisk(ctx context.Context, d vmm.Disk) error {
	if err := validateDisk(d); err != nil {
		return m.named(err)
	}
	if d.NBD != nil || d.Persistent || d.Throttle != nil {
		return fmt.Errorf("vm %s: disk %s: %w: only a VM that starts gets a disk that stays", m.id, d.Serial, errdefs.ErrInvalidArgument)
	}
	img, err := backingOf(d, Host{})
	if err != nil {
		return m.named(err)
	}
	unlock, err := m.lockDisks(ctx)
	if err != nil {
		return err
	}
	defer unlock()
	if _, ok := m.disks[d.Serial]; ok {
		return fmt.Errorf("vm %s: disk %s: %w", m.id, d.Serial, errdefs.ErrAlreadyExists)
	}
	p := plugged{lun: freeLUN(m.disks), fdset: m.nextFDSet}
	if p.lun >= maxDisks {
		return fmt.Errorf("vm %s: disk %s: %w: a VM has at most %d disks", m.id, d.Serial, errdefs.ErrResourceExhausted, maxDisks)
	}
	m.nextFDSet++
	if err := m.plug(ctx, d, img, p); err != nil {
		return fmt.Errorf("vm %s: disk %s: %w", m.id, d.Serial, err)
	}
	m.disks[d.Serial] = p
	return nil
}

// plug gives QEMU the descriptor, makes a block node of it and a LUN of that, or none.
func (m *VM) plug(ctx context.Context, d vmm.Disk, img backing, p plugged) error {
	dup, err := duplicate(d.File)
	if err != nil {
		return err
	}
	defer dup.Close()
	if _, err := m.qmp.Execute(ctx, "add-fd", map[string]any{"fdset-id": p.fdset}, dup); err != nil {
		return errors.Join(err, m.unplug(d.Serial, p, 0))
	}
	if _, err := m.qmp.Execute(ctx, "blockdev-add", rawNode(d, fileNode(d, p.fdset, img), img)); err != nil {
		return errors.Join(err, m.unplug(d.Serial, p, 1))
	}
	if _, err := m.qmp.Execute(ctx, "device_add", scsiDisk(d, p.lun)); err != nil {
		return errors.Join(err, m.unplug(d.Serial, p, 2))
	}
	return nil
}

// unplug takes back the first steps of plug: after a deadline it is not known whether
// QEMU did the last one, so that one is tried too and may have nothing to take back.
func (m *VM) unplug(serial string, p plugged, steps int) error {
	ctx, cancel := context.WithTimeout(context.Background(), undoTimeout)
	defer cancel()
	if steps >= 2 {
		if err := m.removeDevice(ctx, deviceName(serial)); err != nil {
			return err
		}
	}
	if steps >= 1 {
		if err := m.removeNode(ctx, nodeName(serial)); err != nil {
			return err
		}
	}
	return m.removeFDSet(ctx, p.fdset)
}

// RemoveDisk implements vmm.VM. A disk that could not be removed entirely stays known,
// so that the call can be repeated.
func (m *VM) RemoveDisk(ctx context.Context, serial string) error {
	unlock, err := m.lockDisks(ctx)
	if err != nil {
		return err
	}
	defer unlock()
	p, ok := m.disks[serial]
	if !ok {
		return nil
	}
	if p.stays != nil {
		return fmt.Errorf("vm %s: disk %s stays as long as the VM: %w", m.id, serial, errdefs.ErrFailedPrecondition)
	}
	err = m.removeDevice(ctx, deviceName(serial))
	if err == nil {
		err = m.removeNode(ctx, nodeName(serial))
	}
	if err == nil {
		err = m.removeFDSet(ctx, p.fdset)
	}
	if err != nil {
		return fmt.Errorf("vm %s: remove disk %s: %w", m.id, serial, err)
	}
	delete(m.disks, serial)
	return nil
}

// persistent finds a disk that stays; disks are locked.
func (m *VM) persistent(serial string) (plugged, error) {
	p, ok := m.disks[serial]
	switch {
	case !ok:
		return p, fmt.Errorf("vm %s: disk %s: %w", m.id, serial, errdefs.ErrNotFound)
	case p.stays == nil:
		return p, fmt.Errorf("vm %s: disk %s is not persistent: %w", m.id, serial, errdefs.ErrFailedPrecondition)
	}
	return p, nil
}

// GrowDisk implements vmm.VM.
//
// Errors: errdefs.ErrNotFound, errdefs.ErrFailedPrecondition for a disk that is not
// persistent.
func (m *VM) GrowDisk(ctx context.Context, serial string, bytes int64, nbd *vmm.NBD) error {
	unlock, err := m.lockDisks(ctx)
	if err != nil {
		return err
	}
	defer unlock()
	p, err := m.persistent(serial)
	if err != nil {
		return err
	}
	if (p.stays.NBD == nil) != (nbd == nil) {
		return fmt.Errorf("vm %s: disk %s: %w: a new connection is needed for a disk that is served, and only for that", m.id, serial, errdefs.ErrInvalidArgument)
	}
	if nbd != nil {
		err := m.reconnect(ctx, &p, nbd)
		m.disks[serial] = p
		if err != nil {
			return fmt.Errorf("vm %s: disk %s: %w", m.id, serial, err)
		}
	}
	// The topmost node: a throttle does not hear of a change below it. QEMU takes the size
	// for an order, not for news: it is the caller's to be right.
	if _, err := m.qmp.Execute(ctx, "block_resize", map[string]any{"node-name": nodeName(serial), "size": bytes}); err != nil {
		return fmt.Errorf("vm %s: disk %s: %w", m.id, serial, err)
	}
	return nil
}

// ThrottleDisk implements vmm.VM.
//
// Errors: errdefs.ErrNotFound, errdefs.ErrFailedPrecondition for a disk that is not
// persistent.
func (m *VM) ThrottleDisk(ctx context.Context, serial string, t vmm.Throttle) error {
	unlock, err := m.lockDisks(ctx)
	if err != nil {
		return err
	}
	defer unlock()
	if _, err := m.persistent(serial); err != nil {
		return err
	}
	if _, err := m.qmp.Execute(ctx, "qom-set", map[string]any{"path": "/objects/" + groupName(serial), "property": "limits", "value": limits(t)}); err != nil {
		return fmt.Errorf("vm %s: disk %s: %w", m.id, serial, err)
	}
	return nil
}

// reconnect replaces a disk's NBD node: a connection never learns of another size.
func (m *VM) reconnect(ctx context.Context, p *plugged, nbd *vmm.NBD) error {
	d := *p.stays
	d.NBD = nbd
	if err := validateDisk(d); err != nil {
		return err
	}
	conn, err := duplicate(nbd.Conn)
	if err != nil {
		return err
	}
	defer conn.Close()
	p.round++
	name := fmt.Sprintf("nbd%d-%s", p.round, d.Serial)
	if _, err := m.qmp.Execute(ctx, "getfd", map[string]any{"fdname": name}, conn); err != nil {
		return err
	}
	node := nbdNode(d, name)
	node["node-name"] = name
	if _, err := m.qmp.Execute(ctx, "blockdev-add", node); err != nil {
		return err
	}
	if _, err := m.qmp.Execute(ctx, "blockdev-reopen", map[string]any{"options": []any{rawNode(d, name, backing{})}}); err != nil {
		return errors.Join(err, m.removeNode(context.WithoutCancel(ctx), name))
	}
	before := p.node
	p.stays, p.node = &d, name
	if before == "" {
		return nil // the first one is the raw node's own and goes by itself
	}
	return m.removeNode(ctx, before)
}

func (m *VM) removeDevice(ctx context.Context, device string) error {
	deleted := make(chan struct{})
	m.mu.Lock()
	m.unplugs[device] = deleted
	m.mu.Unlock()
	defer func() {
		m.mu.Lock()
		defer m.mu.Unlock()
		delete(m.unplugs, device)
	}()
	_, err := m.qmp.Execute(ctx, "device_del", map[string]any{"id": device})
	if errors.Is(err, errdefs.ErrNotFound) {
		return nil
	}
	if err != nil {
		return err
	}
	select {
	case <-deleted:
		return nil
	case <-m.done:
		return nil // nothing is left to remove it from
	case <-ctx.Done():
		return fmt.Errorf("device %s is still there: %w", device, ctx.Err())
	}
}

// removeNode repeats while the node is in use: DEVICE_DELETED comes shortly before the
// device lets go of it.
func (m *VM) removeNode(ctx context.Context, node string) error {
	var failed *qmp.Error
	for wait := time.Millisecond; ; wait = min(2*wait, 100*time.Millisecond) {
		_, err := m.qmp.Execute(ctx, "blockdev-del", map[string]any{"node-name": node})
		if !errors.As(err, &failed) {
			return err
		}
		if failed.Desc == fmt.Sprintf("Failed to find node with node-name='%s'", node) {
			return nil
		}
		retry := time.NewTimer(wait)
		select {
		case <-retry.C:
		case <-ctx.Done():
			retry.Stop()
			return errors.Join(err, ctx.Err())
		}
	}
}

func (m *VM) removeFDSet(ctx context.Context, id int) error {
	_, err := m.qmp.Execute(ctx, "remove-fd", map[string]any{"fdset-id": id})
	var failed *qmp.Error
	if errors.As(err, &failed) {
		return nil // the set goes with its last user; there is nothing else it refuses
	}
	return err
}

func (m *VM) lockDisks(ctx context.Context) (func(), error) {
	select {
	case m.plugging <- struct{}{}:
		return func() { <-m.plugging }, nil
	case <-m.done:
		return nil, fmt.Errorf("vm %s is gone: %w", m.id, errdefs.ErrUnavailable)
	case <-ctx.Done():
		return nil, fmt.Errorf("vm %s: disks are being changed: %w", m.id, ctx.Err())
	}
}

// freeLUN returns the lowest number no disk has.
func freeLUN(disks map[string]plugged) int {
	used := map[int]bool{}
	for _, d := range disks {
		used[d.lun] = true
	}
	n := 0
	for used[n] {
		n++
	}
	return n
}
