package sealed

import (
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"

	"github.com/containerd/errdefs"
	"golang.org/x/crypto/curve25519"
	"golang.org/x/crypto/nacl/box"
	"golang.org/x/sys/unix"
)

// Key is a node's key pair.
type Key struct {
	public, private [keySize]byte
}

// Public is the half to announce.
func (k *Key) Public() Public { return Public(k.public) }

// Generate makes a key that is kept nowhere.
func Generate() (*Key, error) {
	public, private, err := box.GenerateKey(rand.Reader)
	if err != nil {
		return nil, fmt.Errorf("make a key: %w", err)
	}
	return &Key{*public, *private}, nil
}

// Load reads the private key in a file, which is made, mode 0600, if it is not there. A
// process that is killed meanwhile leaves no half of one.
func Load(path string) (*Key, error) {
	for range 2 {
		k, err := read(path)
		if !errors.Is(err, os.ErrNotExist) {
			return k, err
		}
		if err := create(path); err != nil && !errors.Is(err, os.ErrExist) {
			return nil, fmt.Errorf("make key file %s: %w", path, err)
		}
	}
	return nil, fmt.Errorf("key file %s vanishes: %w", path, errdefs.ErrUnavailable)
}

func read(path string) (*Key, error) {
	f, err := os.OpenFile(path, os.O_RDONLY|unix.O_NOFOLLOW|unix.O_NONBLOCK, 0)
	if err != nil {
		return nil, fmt.Errorf("key file: %w", err)
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return nil, fmt.Errorf("key file: %w", err)
	}
	if !info.Mode().IsRegular() || info.Mode().Perm()&0o077 != 0 {
		return nil, fmt.Errorf("key file %s has mode %s: make it a file that only its owner reads (chmod 600), or remove it for a new key: %w", path, info.Mode(), errdefs.ErrPermissionDenied)
	}
	text, err := io.ReadAll(io.LimitReader(f, 2*keySize))
	if err != nil {
		return nil, fmt.Errorf("key file: %w", err)
	}
	k := &Key{}
	if len(text) != encoding.EncodedLen(keySize)+1 || text[len(text)-1] != '\n' {
		return nil, broken(path)
	}
	if _, err := encoding.Decode(k.private[:], text[:len(text)-1]); err != nil {
		return nil, broken(path)
	}
	public, err := curve25519.X25519(k.private[:], curve25519.Basepoint)
	if err != nil {
		return nil, broken(path)
	}
	copy(k.public[:], public)
	return k, nil
}

func broken(path string) error {
	return fmt.Errorf("key file %s holds no key: remove it for a new one; volumes that are attached to this node must then be attached again: %w", path, errdefs.ErrDataLoss)
}

// create makes the file under its name in one step; os.ErrExist if another was first.
func create(path string) error {
	k, err := Generate()
	if err != nil {
		return err
	}
	dir := filepath.Dir(path)
	f, err := os.CreateTemp(dir, ".key-*") // mode 0600
	if err != nil {
		return err
	}
	defer os.Remove(f.Name())
	defer f.Close()
	if _, err := f.WriteString(encoding.EncodeToString(k.private[:]) + "\n"); err != nil {
		return err
	}
	if err := f.Sync(); err != nil {
		return err
	}
	if err := os.Link(f.Name(), path); err != nil {
		return err
	}
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	defer d.Close()
	return d.Sync()
}
