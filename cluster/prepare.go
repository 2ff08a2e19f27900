package cluster

import (
	"crypto/rand"
	"encoding/base64"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"

	"github.com/hypernetes/hypernetes/cluster/atomicfile"
	"github.com/hypernetes/hypernetes/cluster/component"
	"github.com/hypernetes/hypernetes/cluster/kubeconfig"
	"github.com/hypernetes/hypernetes/cluster/pki"
	"github.com/hypernetes/hypernetes/cluster/settings"
)

// prepare writes everything the components read: certificates, the encryption key,
// kubeconfigs and configuration files. It is idempotent.
func prepare(in component.Input, components []component.Component) error {
	if !in.Settings.RuntimeOnly {
		store := pki.Store{Dir: in.Node.StatePath("pki")}
		if _, err := store.Ensure(component.Authorities(), component.Leaves(in), component.SigningKeys()); err != nil {
			return err
		}
		if err := ensureEncryptionKey(in.Node.PKI("encryption.yaml")); err != nil {
			return fmt.Errorf("encryption at rest: %w", err)
		}
		if err := writeKubeconfigs(in); err != nil {
			return err
		}
	}
	files := map[string]string{
		in.Node.StatePath("etc", "hyper.toml"):               component.HyperConfig(in),
		in.Node.StatePath("cni", "net.d", "10-h8s.conflist"): component.CNIConfig(in.Settings),
	}
	for _, c := range components {
		for path, content := range c.Files {
			files[path] = content
		}
	}
	for path, content := range files {
		if err := writeFile(path, content); err != nil {
			return err
		}
	}
	return nil
}

func writeFile(path, content string) error {
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return err
	}
	return atomicfile.Write(path, []byte(content), 0o600)
}

// ensureEncryptionKey makes the key Secrets are encrypted with, once: with another
// key, what is in etcd could not be read any more.
func ensureEncryptionKey(path string) error {
	if _, err := os.Stat(path); !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	var key [32]byte
	if _, err := rand.Read(key[:]); err != nil {
		return err
	}
	return writeFile(path, component.Encryption(base64.StdEncoding.EncodeToString(key[:])))
}

func writeKubeconfigs(in component.Input) error {
	inner := fmt.Sprintf("https://%s:%d", in.Settings.NodeIP, settings.APIPort)
	for _, u := range component.Users(in) {
		e, err := credentials(in, u.Name)
		if err != nil {
			return err
		}
		e.Name, e.Server = in.Node.Name, inner
		if err := kubeconfig.Write(in.Node.InnerKubeconfig(u.Name), e); err != nil {
			return err
		}
	}
	e, err := AdminEntry(in)
	if err != nil {
		return err
	}
	return kubeconfig.Write(in.Node.Kubeconfig(), e)
}

// AdminEntry is the administrator's kubeconfig entry as the host uses it.
func AdminEntry(in component.Input) (kubeconfig.Entry, error) {
	e, err := credentials(in, "admin")
	e.Name, e.Server = in.Node.Name, fmt.Sprintf("https://127.0.0.1:%d", in.Settings.APIPort)
	return e, err
}

func credentials(in component.Input, user string) (kubeconfig.Entry, error) {
	ca, err1 := os.ReadFile(in.Node.PKI("ca.crt"))
	cert, err2 := os.ReadFile(in.Node.PKI(user + ".crt"))
	key, err3 := os.ReadFile(in.Node.PKI(user + ".key"))
	return kubeconfig.Entry{CA: ca, Cert: cert, Key: key}, errors.Join(err1, err2, err3)
}
