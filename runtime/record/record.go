// Package record is what a shim writes down about its Pod before it takes anything of
// the host, so that somebody else can give it back after a crash.
//
// It owns the files: one directory a sandbox, one JSON document in it, replaced as a
// whole. It must not know how anything in it is made or removed.
package record

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"

	"github.com/containerd/errdefs"

	"github.com/hypernetes/hypernetes/atomicfile"
	"github.com/hypernetes/hypernetes/proc"
	"github.com/hypernetes/hypernetes/runtime/cgroup"
	"github.com/hypernetes/hypernetes/runtime/nic"
)

// Record is the document. Fields are set before what they describe comes to be.
type Record struct {
	ID        string `json:"id"`
	Namespace string `json:"namespace"`
	Bundle    string `json:"bundle"`
	// Socket is the shim's, Shim its process, VMM the virtual machine's.
	Socket string  `json:"socket"`
	Shim   proc.ID `json:"shim"`
	VMM    proc.ID `json:"vmm,omitzero"`
	// Storage is the storage daemon's process, if the Pod has one.
	Storage proc.ID       `json:"storage,omitzero"`
	Cgroup  *cgroup.Group `json:"cgroup,omitempty"`
	Network nic.State     `json:"network,omitzero"`
	// Pod is for people.
	Pod string `json:"pod,omitempty"`
}

var validID = regexp.MustCompile(`^[a-zA-Z0-9][a-zA-Z0-9._-]{0,127}$`)

// Dir is where the sandbox's files are below the shims' state directory.
//
// Errors: errdefs.ErrInvalidArgument for names that are no file names.
func Dir(stateDir, namespace, id string) (string, error) {
	if !validID.MatchString(namespace) || !validID.MatchString(id) {
		return "", fmt.Errorf("namespace %.200q and id %.200q must be letters, digits and ._-, at most 128: %w", namespace, id, errdefs.ErrInvalidArgument)
	}
	return filepath.Join(stateDir, "sandboxes", namespace, id), nil
}

// Save replaces the record; it is on disk when Save returns.
func (r *Record) Save(stateDir string) error {
	dir, err := Dir(stateDir, r.Namespace, r.ID)
	if err != nil {
		return err
	}
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return fmt.Errorf("sandbox state: %w", err)
	}
	b, err := json.Marshal(r)
	if err != nil {
		return fmt.Errorf("sandbox state: %w", err)
	}
	if err := atomicfile.Write(filepath.Join(dir, "state.json"), b, 0o600); err != nil {
		return fmt.Errorf("sandbox state: %w", err)
	}
	return nil
}

// Load reads a sandbox's record.
//
// Errors: errdefs.ErrNotFound, errdefs.ErrDataLoss if it cannot be read.
func Load(stateDir, namespace, id string) (*Record, error) {
	dir, err := Dir(stateDir, namespace, id)
	if err != nil {
		return nil, err
	}
	b, err := os.ReadFile(filepath.Join(dir, "state.json"))
	if errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("sandbox %s: %w", id, errdefs.ErrNotFound)
	}
	if err != nil {
		return nil, fmt.Errorf("sandbox state: %w", err)
	}
	var r Record
	if err := json.Unmarshal(b, &r); err != nil {
		return nil, fmt.Errorf("sandbox state of %s: %w: %w", id, err, errdefs.ErrDataLoss)
	}
	return &r, nil
}

// List returns all records; what cannot be read is in the error, with the others.
func List(stateDir string) ([]*Record, error) {
	files, err := filepath.Glob(filepath.Join(stateDir, "sandboxes", "*", "*", "state.json"))
	if err != nil {
		return nil, err
	}
	var out []*Record
	var errs []error
	for _, f := range files {
		dir := filepath.Dir(f)
		r, err := Load(stateDir, filepath.Base(filepath.Dir(dir)), filepath.Base(dir))
		if errdefs.IsNotFound(err) {
			continue
		}
		if err != nil {
			errs = append(errs, err)
			continue
		}
		out = append(out, r)
	}
	return out, errors.Join(errs...)
}

// Remove removes the record; it succeeds if there is none.
func (r *Record) Remove(stateDir string) error {
	dir, err := Dir(stateDir, r.Namespace, r.ID)
	if err != nil {
		return err
	}
	return os.RemoveAll(dir)
}
