package cinder

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"

	"github.com/containerd/errdefs"
	"sigs.k8s.io/yaml"
)

// Config is what an operator says of a cloud's storage that Cinder does not: a file, which
// holds no secret.
type Config struct {
	// Role is what the cluster's account gives itself in tenants' projects, if it may; member
	// if empty.
	Role string `json:"role,omitempty"`
	// Exports are the directories of nodes where Cinder's NFS exports are mounted, by export.
	Exports map[string]string `json:"exports,omitempty"`
	Ceph    *CephConfig       `json:"ceph,omitempty"`
}

// CephConfig is a Ceph cluster whose images Cinder hands out.
type CephConfig struct {
	// Keyrings are files with the keys of the users that Cinder names.
	Keyrings []string `json:"keyrings,omitempty"`
	// Conf is a ceph.conf: with it, a client that did not let go is shut out as User, "cinder"
	// if empty, whose key is in the first of Keyrings.
	Conf string `json:"conf,omitempty"`
	User string `json:"user,omitempty"`
}

// ReadConfig reads a file; none is an empty one.
func ReadConfig(path string) (Config, error) {
	var c Config
	if path == "" {
		return c, nil
	}
	b, err := os.ReadFile(path)
	if err != nil {
		return c, fmt.Errorf("%w: %w", err, errdefs.ErrInvalidArgument)
	}
	if len(b) > maxInfo {
		return c, fmt.Errorf("%s has %d bytes, over %d: %w", path, len(b), maxInfo, errdefs.ErrInvalidArgument)
	}
	if err := yaml.UnmarshalStrict(b, &c); err != nil {
		return c, fmt.Errorf("%s: %w: %w", path, err, errdefs.ErrInvalidArgument)
	}
	if err := c.check(); err != nil {
		return c, fmt.Errorf("%s: %w: %w", path, err, errdefs.ErrInvalidArgument)
	}
	return c, nil
}

func (c Config) check() error {
	for export, dir := range c.Exports {
		if !exportPattern.MatchString(export) {
			return fmt.Errorf("exports: %.256q: want HOST:/PATH, as Cinder names it", export)
		}
		if !cleanPath(dir) {
			return fmt.Errorf("exports: %s: %.256q: want an absolute and clean directory", export, dir)
		}
	}
	if c.Ceph == nil {
		return nil
	}
	if len(c.Ceph.Keyrings) == 0 {
		return fmt.Errorf("ceph.keyrings: want a file at least, with the keys of the users that Cinder names")
	}
	files := slices.Clone(c.Ceph.Keyrings)
	if c.Ceph.Conf != "" {
		files = append(files, c.Ceph.Conf)
	}
	for _, f := range files {
		if !cleanPath(f) {
			return fmt.Errorf("ceph: %.256q: want an absolute and clean path", f)
		}
	}
	if c.Ceph.User != "" && !cephPattern.MatchString(c.Ceph.User) {
		return fmt.Errorf("ceph.user: %.128q: want the name of a user of Ceph's", c.Ceph.User)
	}
	return nil
}

func cleanPath(p string) bool {
	return filepath.IsAbs(p) && filepath.Clean(p) == p && p != "/"
}

// Roots are the directories of nodes that files of volumes are in.
func (c Config) Roots() []string {
	var out []string
	for _, dir := range c.Exports {
		if !slices.Contains(out, dir) {
			out = append(out, dir)
		}
	}
	slices.Sort(out)
	return out
}

// Apply makes options of it. It reads the keys.
func (c Config) Apply(o *Options) error {
	o.Role, o.Exports = c.Role, c.Exports
	if c.Ceph == nil {
		return nil
	}
	o.Keys = map[string]string{}
	for _, path := range slices.Backward(c.Ceph.Keyrings) {
		info, err := os.Stat(path)
		if err == nil && info.Mode().Perm()&0o077 != 0 {
			err = fmt.Errorf("%s holds keys and has mode %v: chmod 600 it", path, info.Mode().Perm())
		}
		var b []byte
		if err == nil {
			b, err = os.ReadFile(path)
		}
		if err != nil {
			return fmt.Errorf("ceph.keyrings: %w: %w", err, errdefs.ErrInvalidArgument)
		}
		keys, err := ParseKeyring(b)
		if err != nil {
			return fmt.Errorf("ceph.keyrings: %s: %w", path, err)
		}
		for user, key := range keys {
			o.Keys[user] = key
		}
	}
	if c.Ceph.Conf == "" {
		return nil
	}
	user := c.Ceph.User
	if user == "" {
		user = "cinder"
	}
	if o.Keys[user] == "" {
		return fmt.Errorf("ceph.user: %s has no key in %v: %w", user, c.Ceph.Keyrings, errdefs.ErrInvalidArgument)
	}
	o.Fence = &Ceph{Conf: c.Ceph.Conf, Keyring: c.Ceph.Keyrings[0], User: user}
	return nil
}
