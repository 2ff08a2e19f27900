package openstack

import (
	"bytes"
	"encoding/base64"
	"errors"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/hypernetes/hypernetes/mountinfo"
	"github.com/hypernetes/hypernetes/test/e2e/testcloud"
	backend "github.com/hypernetes/hypernetes/volume/backend/cinder"
)

// noKey looks for Ceph's key while a Pod has a volume of its: no process may have it in its
// arguments or environment, and no file of the cluster's nodes (etcd, logs, records, shims)
// but the secret of the volume, on the node that has it, in memory, for its owner only.
func noKey(t *testing.T, c *testcloud.Cloud) {
	t.Helper()
	b, err := os.ReadFile(filepath.Join(c.OpenStack.Dir, "ceph", "ceph.client.cinder.keyring"))
	if errors.Is(err, fs.ErrNotExist) {
		t.Log("this Cinder's volumes are files, which need no key: nothing to look for (H8S_OS_VOLUME=rbd)")
		return
	}
	if err != nil {
		t.Fatal(err)
	}
	keys, err := backend.ParseKeyring(b)
	if err != nil {
		t.Fatal(err)
	}
	key := keys["cinder"]
	raw, err := base64.StdEncoding.DecodeString(key)
	if err != nil || len(raw) < 16 {
		t.Fatalf("a key of %d bytes, %v", len(raw), err)
	}
	needles := [][]byte{[]byte(key), raw, []byte(base64.StdEncoding.EncodeToString([]byte(key)))[:len(key)]}

	processes, _ := filepath.Glob("/proc/[0-9]*")
	for _, p := range processes {
		for _, what := range []string{"cmdline", "environ"} {
			if text, _ := os.ReadFile(filepath.Join(p, what)); holds(bytes.NewReader(text), needles) {
				t.Errorf("%s/%s has Ceph's key", p, what)
			}
		}
	}
	for _, name := range c.Nodes {
		node := c.Further(name)
		root := node.NodeRoot(t)
		files, sealed := 0, false
		for _, dir := range []string{"/var/lib/h8s/" + name, "/run/h8s/" + name, root + "/run/h8s-volumes", root + "/run/h8s-shim", root + "/var/lib/h8s-volumes", root + "/var/log/pods"} {
			err := filepath.WalkDir(dir, func(path string, e fs.DirEntry, err error) error {
				if errors.Is(err, fs.ErrNotExist) {
					return nil // gone meanwhile
				}
				if err != nil {
					return err
				}
				if e.IsDir() && (e.Name() == "containerd" || e.Name() == "local") {
					return filepath.SkipDir // images and disks
				}
				if !e.Type().IsRegular() {
					return nil
				}
				f, err := os.Open(path)
				if err != nil {
					return nil
				}
				defer f.Close()
				files++
				if strings.Contains(path, "/etcd/") && !sealed {
					sealed = holds(f, [][]byte{[]byte(`sealed`)})
					_, _ = f.Seek(0, io.SeekStart)
				}
				if !holds(f, needles) {
					return nil
				}
				if info, err := f.Stat(); err == nil && strings.HasPrefix(path, root+"/run/h8s-volumes/secrets/") && info.Mode() == 0o400 && tmpfs(node.NodeMounts(t), strings.TrimPrefix(path, root)) {
					return nil
				}
				t.Errorf("%s has Ceph's key", path)
				return nil
			})
			if err != nil {
				t.Error(err)
			}
		}
		if files < 10 || (name == c.Node && !sealed) {
			t.Errorf("looked at %d files of node %s, etcd's word found: %v", files, name, sealed)
		}
	}
}

// holds says whether a stream has one of the needles, which are shorter than a KiB.
func holds(r io.Reader, needles [][]byte) bool {
	const overlap = 1 << 10
	buf, have := make([]byte, 1<<20), 0
	for {
		n, err := r.Read(buf[have:])
		have += n
		for _, s := range needles {
			if bytes.Contains(buf[:have], s) {
				return true
			}
		}
		if err != nil {
			return false
		}
		if have > overlap {
			have = copy(buf, buf[have-overlap:have])
		}
	}
}

// tmpfs says whether a path is in memory, by the longest mount above it.
func tmpfs(mounts []mountinfo.Mount, path string) bool {
	longest := mountinfo.Mount{}
	for _, m := range mounts {
		if (m.Target == "/" || path == m.Target || strings.HasPrefix(path, m.Target+"/")) && len(m.Target) >= len(longest.Target) {
			longest = m
		}
	}
	return longest.Type == "tmpfs"
}
