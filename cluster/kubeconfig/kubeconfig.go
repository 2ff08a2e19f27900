// Package kubeconfig owns kubeconfig files: writing ours, and merging an entry into
// a user's file and taking it out again without disturbing what else is there. It
// must not know how the credentials were made.
package kubeconfig

import (
	"encoding/base64"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"syscall"

	"github.com/containerd/errdefs"
	"sigs.k8s.io/yaml"

	"github.com/hypernetes/hypernetes/atomicfile"
)

// Entry is one cluster, user and context, all three called Name.
type Entry struct {
	Name   string
	Server string
	CA     []byte // PEM
	Cert   []byte // PEM
	Key    []byte // PEM
	// CertFile and KeyFile are named instead of Cert and Key if set. Who reads the file
	// then notices when they are renewed.
	CertFile, KeyFile string
	// Token is written instead of a certificate if set.
	Token string
	// Exec is written instead of a certificate or a token if set.
	Exec *Exec
	// Namespace of the context; "default" if empty.
	Namespace string
}

// Exec is a program that prints credentials (client.authentication.k8s.io/v1).
type Exec struct {
	Command string
	Args    []string
	// Env are further variables, as NAME=value.
	Env []string
	// Hint says what to do if the program is not there.
	Hint string
}

// doc keeps a kubeconfig as plain maps so that fields this program does not know
// survive a merge.
type doc = map[string]any

// Render returns a kubeconfig with only the entry.
func Render(e Entry) ([]byte, error) {
	d := doc{"apiVersion": "v1", "kind": "Config", "preferences": doc{}}
	put(d, e)
	return yaml.Marshal(d)
}

// Write renders the entry to path with mode 0600.
func Write(path string, e Entry) error {
	b, err := Render(e)
	if err != nil {
		return err
	}
	return replace(path, b)
}

// Merge puts the entry into the file at path, making it if needed, and selects its context.
func Merge(path string, e Entry) error {
	d, err := read(path)
	if err != nil {
		return err
	}
	put(d, e)
	b, err := yaml.Marshal(d)
	if err != nil {
		return err
	}
	return replace(path, b)
}

// Unmerge takes the entry called name out of the file at path, if both exist, and
// reports whether it changed the file.
func Unmerge(path, name string) (bool, error) {
	if _, err := os.Stat(path); errors.Is(err, fs.ErrNotExist) {
		return false, nil
	}
	d, err := read(path)
	if err != nil {
		return false, err
	}
	changed := false
	for _, list := range []string{"clusters", "users", "contexts"} {
		kept := without(d[list], name)
		if old, ok := d[list].([]any); ok && len(old) != len(kept) {
			changed = true
			d[list] = kept
		}
	}
	if !changed {
		return false, nil
	}
	if d["current-context"] == name {
		d["current-context"] = ""
	}
	b, err := yaml.Marshal(d)
	if err != nil {
		return false, err
	}
	return true, replace(path, b)
}

// UserPath is the file kubectl would use: the first of $KUBECONFIG, else ~/.kube/config.
func UserPath() (string, error) {
	if list := filepath.SplitList(os.Getenv("KUBECONFIG")); len(list) > 0 && list[0] != "" {
		return list[0], nil
	}
	home, err := os.UserHomeDir()
	if err != nil {
		return "", err
	}
	return filepath.Join(home, ".kube", "config"), nil
}

// Load returns the selected context of the file at path with the credentials themselves,
// also where the file only names files. Credentials that programs print (exec plugins)
// are errdefs.ErrNotImplemented.
func Load(path string) (Entry, error) {
	b, err := os.ReadFile(path)
	if err != nil {
		return Entry{}, err
	}
	type file struct {
		Name    string
		Cluster struct {
			Server string
			Data   []byte `json:"certificate-authority-data"`
			File   string `json:"certificate-authority"`
		}
		User struct {
			Cert     []byte `json:"client-certificate-data"`
			CertFile string `json:"client-certificate"`
			Key      []byte `json:"client-key-data"`
			KeyFile  string `json:"client-key"`
			Token    string
			Exec     any
		}
		Context struct{ Cluster, User, Namespace string }
	}
	var d struct {
		Clusters, Users, Contexts []file
		Current                   string `json:"current-context"`
	}
	if err := yaml.Unmarshal(b, &d); err != nil {
		return Entry{}, fmt.Errorf("kubeconfig %s: %w: %w", path, err, errdefs.ErrInvalidArgument)
	}
	find := func(list []file, kind, name string) (file, error) {
		for _, f := range list {
			if f.Name == name {
				return f, nil
			}
		}
		return file{}, fmt.Errorf("kubeconfig %s: no %s %q: %w", path, kind, name, errdefs.ErrInvalidArgument)
	}
	context, err := find(d.Contexts, "context", d.Current)
	if err != nil {
		return Entry{}, err
	}
	cluster, err := find(d.Clusters, "cluster", context.Context.Cluster)
	if err != nil {
		return Entry{}, err
	}
	user, err := find(d.Users, "user", context.Context.User)
	if err != nil {
		return Entry{}, err
	}
	if user.User.Exec != nil {
		return Entry{}, fmt.Errorf("kubeconfig %s: user %s has its credentials from a program, which h8s does not run: %w", path, user.Name, errdefs.ErrNotImplemented)
	}
	e := Entry{Name: d.Current, Server: cluster.Cluster.Server, CA: cluster.Cluster.Data, Cert: user.User.Cert, Key: user.User.Key,
		Token: user.User.Token, Namespace: context.Context.Namespace}
	for _, f := range []struct {
		into *[]byte
		name string
	}{{&e.CA, cluster.Cluster.File}, {&e.Cert, user.User.CertFile}, {&e.Key, user.User.KeyFile}} {
		if len(*f.into) > 0 || f.name == "" {
			continue
		}
		if !filepath.IsAbs(f.name) {
			f.name = filepath.Join(filepath.Dir(path), f.name)
		}
		if *f.into, err = os.ReadFile(f.name); err != nil {
			return Entry{}, fmt.Errorf("kubeconfig %s: %w", path, err)
		}
	}
	return e, nil
}

func read(path string) (doc, error) {
	b, err := os.ReadFile(path)
	if errors.Is(err, fs.ErrNotExist) {
		return doc{"apiVersion": "v1", "kind": "Config", "preferences": doc{}}, nil
	}
	if err != nil {
		return nil, err
	}
	d := doc{}
	if err := yaml.Unmarshal(b, &d); err != nil {
		return nil, fmt.Errorf("kubeconfig %s: %w", path, err)
	}
	return d, nil
}

func put(d doc, e Entry) {
	b64 := base64.StdEncoding.EncodeToString
	add := func(list, field string, value doc) {
		d[list] = append(without(d[list], e.Name), doc{"name": e.Name, field: value})
	}
	add("clusters", "cluster", doc{"server": e.Server, "certificate-authority-data": b64(e.CA)})
	user := doc{"client-certificate-data": b64(e.Cert), "client-key-data": b64(e.Key)}
	switch {
	case e.Exec != nil:
		env := []any{}
		for _, pair := range e.Exec.Env {
			name, value, _ := strings.Cut(pair, "=")
			env = append(env, doc{"name": name, "value": value})
		}
		user = doc{"exec": doc{
			"apiVersion": "client.authentication.k8s.io/v1", "command": e.Exec.Command, "args": e.Exec.Args, "env": env,
			"installHint": e.Exec.Hint, "interactiveMode": "Never", "provideClusterInfo": false,
		}}
	case e.Token != "":
		user = doc{"token": e.Token}
	case e.CertFile != "":
		user = doc{"client-certificate": e.CertFile, "client-key": e.KeyFile}
	}
	add("users", "user", user)
	context := doc{"cluster": e.Name, "user": e.Name}
	if e.Namespace != "" {
		context["namespace"] = e.Namespace
	}
	add("contexts", "context", context)
	d["current-context"] = e.Name
}

func without(list any, name string) []any {
	old, _ := list.([]any)
	kept := make([]any, 0, len(old)+1)
	for _, item := range old {
		if m, ok := item.(doc); ok && m["name"] == name {
			continue
		}
		kept = append(kept, item)
	}
	return kept
}

// replace writes a new file with mode 0600. One that exists keeps its mode, its owner
// and, if it is a link to a file kept elsewhere, its place.
func replace(path string, b []byte) error {
	if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
		return err
	}
	target, err := filepath.EvalSymlinks(path)
	if errors.Is(err, fs.ErrNotExist) {
		return atomicfile.Write(path, b, 0o600)
	}
	if err != nil {
		return err
	}
	st, err := os.Stat(target)
	if err != nil {
		return err
	}
	if err := atomicfile.Write(target, b, st.Mode().Perm()); err != nil {
		return err
	}
	if owner, ok := st.Sys().(*syscall.Stat_t); ok {
		return os.Chown(target, int(owner.Uid), int(owner.Gid))
	}
	return nil
}
