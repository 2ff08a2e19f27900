package storage

import (
	"errors"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/containerd/errdefs"

	"github.com/hypernetes/hypernetes/test/ceph"
	"github.com/hypernetes/hypernetes/volume/record"
)

func image(c *ceph.Cluster, name string) Volume {
	return Volume{
		Serial: "v" + name, Source: record.Source{RBD: &record.RBD{Pool: "volumes", Image: name, Monitors: []string{c.Monitor}, User: "cinder"}},
		Secrets: map[string][]byte{record.SecretKey: []byte(c.Key())},
	}
}

// TestCeph serves images of a real cluster.
func TestCeph(t *testing.T) {
	if testing.Short() {
		t.Skip("skipped: -short, and starting Ceph takes 10 s")
	}
	need(t, "qemu-storage-daemon", "qemu-io")
	c := ceph.Start(t)
	c.RBD("create", "--size", "64", "volumes/one")
	c.RBD("create", "--size", "32", "volumes/two")
	began := time.Now()
	d, err := start(t, Config{Volumes: []Volume{image(c, "one"), image(c, "two")}})
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("two images are served after %v", time.Since(began).Round(time.Millisecond))
	if out := d.io(t, "v0-1", "write -P 7 0 64k", "flush"); !strings.Contains(out, "wrote 65536/65536") {
		t.Fatal(out)
	}
	if out := c.RBD("export", "volumes/one", "-"); out[:3] != "\x07\x07\x07" || len(out) != 64<<20 {
		t.Errorf("the image has %d bytes, %q", len(out), out[:3])
	}
	c.RBD("resize", "--size", "128", "volumes/one")
	size, err := d.Grow(t.Context(), "vone")
	if err != nil || size != 128<<20 {
		t.Fatalf("%d, %v", size, err)
	}
	if out := d.io(t, "v0-2", "read -P 7 0 64k", "write -P 8 120M 64k", "flush"); !strings.Contains(out, "wrote 65536/65536") || strings.Contains(out, "failed") {
		t.Error(out)
	}
	if info := c.RBD("info", "volumes/one"); !strings.Contains(info, "128 MiB") {
		t.Errorf("growing has changed the image: %s", info)
	}
	wrong := image(c, "one")
	wrong.Secrets[record.SecretKey] = []byte(keyringKey)
	began = time.Now()
	if _, err := start(t, Config{Volumes: []Volume{wrong}}); !errdefs.IsUnavailable(err) || !strings.Contains(err.Error(), c.Monitor) || strings.Contains(err.Error(), keyringKey) {
		t.Errorf("a wrong key: %v", err)
	} else {
		t.Logf("a wrong key after %v: %v", time.Since(began).Round(time.Millisecond), err)
	}
	if _, err := start(t, Config{Volumes: []Volume{image(c, "none")}}); err == nil {
		t.Error("an image that is not there is served")
	}
	// A fenced client cannot write any more, and its VM hears of it.
	for _, w := range c.Watchers("two") {
		c.Run("ceph", "-c", c.Conf(), "osd", "blocklist", "add", w)
	}
	if out := d.io(t, "v1-1", "write -P 9 0 64k", "flush"); strings.Contains(out, "wrote 65536/65536") && !strings.Contains(out, "failed") {
		t.Errorf("a fenced client writes: %s", out)
	}
	if err := d.Close(); err != nil && !errors.Is(err, os.ErrProcessDone) {
		t.Fatal(err)
	}
}
