package kubestack

import "sync"

// keyed are locks by name.
type keyed struct {
	mu    sync.Mutex
	locks map[string]*counted
}

type counted struct {
	sync.Mutex
	users int
}

// lock takes the lock of a name; call the result to give it back.
func (k *keyed) lock(name string) func() {
	k.mu.Lock()
	if k.locks == nil {
		k.locks = map[string]*counted{}
	}
	l := k.locks[name]
	if l == nil {
		l = &counted{}
		k.locks[name] = l
	}
	l.users++
	k.mu.Unlock()
	l.Lock()
	return func() { k.unlock(name, l) }
}

// tryLock takes the lock of a name if nobody has it.
func (k *keyed) tryLock(name string) (unlock func(), ok bool) {
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.locks[name] != nil {
		return nil, false
	}
	if k.locks == nil {
		k.locks = map[string]*counted{}
	}
	l := &counted{users: 1}
	l.Lock()
	k.locks[name] = l
	return func() { k.unlock(name, l) }, true
}

func (k *keyed) unlock(name string, l *counted) {
	l.Unlock()
	k.mu.Lock()
	defer k.mu.Unlock()
	if l.users--; l.users == 0 {
		delete(k.locks, name)
	}
}
