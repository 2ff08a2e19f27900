package cluster

import (
	"crypto/rand"
	"encoding/base64"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"

	"github.com/hypernetes/hypernetes/atomicfile"
	"github.com/hypernetes/hypernetes/cluster/component"
	"github.com/hypernetes/hypernetes/cluster/kubeconfig"
	"github.com/hypernetes/hypernetes/cluster/pki"
)

// prepare writes everything the components read: certificates, the encryption key,
// kubeconfigs and configuration files. It is idempotent. An agent's certificates come
// from the cluster it joins.
func prepare(in component.Input, components []component.Component) error {
	switch {
	case in.Settings.RuntimeOnly:
	case in.Settings.IsAgent():
		if err := writeAgentKubeconfigs(in); err != nil {
			return err
		}
	default:
		if _, err := ensureCertificates(in); err != nil {
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

// ensureCertificates makes the certificates that are missing or about to expire, and
// returns their names. Those who read them notice new ones.
func ensureCertificates(in component.Input) ([]string, error) {
	store := pki.Store{Dir: in.Node.StatePath("pki")}
	return store.Ensure(component.Authorities(), component.Leaves(in), component.SigningKeys())
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
	for _, u := range component.Users(in) {
		if err := writeInner(in, u.Name); err != nil {
			return err
		}
	}
	e, err := AdminEntry(in)
	if err != nil {
		return err
	}
	return kubeconfig.Write(in.Node.Kubeconfig(), e)
}

// writeInner writes a component's kubeconfig, which names its certificate's files: they
// are read again when they were renewed.
func writeInner(in component.Input, user string) error {
	ca, err := os.ReadFile(in.Node.PKI("ca.crt"))
	if err != nil {
		return err
	}
	return kubeconfig.Write(in.Node.InnerKubeconfig(user), kubeconfig.Entry{
		Name: in.Node.Name, Server: in.Settings.APIServer(), CA: ca,
		CertFile: in.Node.PKI(user + ".crt"), KeyFile: in.Node.PKI(user + ".key"),
	})
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
