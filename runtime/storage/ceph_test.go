package storage

import (
	"bytes"
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/containerd/errdefs"

	"github.com/hypernetes/hypernetes/volume/record"
)

// ceph is a cluster of one monitor and one OSD on loopback, in user space.
type ceph struct {
	t       *testing.T
	dir     string
	monitor string
}

const cephConf = `[global]
fsid = %[2]s
mon_host = [v2:%[3]s,v1:%[4]s]
run_dir = %[1]s/run
admin_socket = %[1]s/run/$name.asok
log_file = %[1]s/$type.log
mon_cluster_log_file = %[1]s/ceph.log
keyring = %[1]s/keyring
mon_data = %[1]s/mon
osd_data = %[1]s/osd
mon_allow_pool_size_one = true
mon_data_avail_warn = 2
mon_data_avail_crit = 1
auth_allow_insecure_global_id_reclaim = false
osd_pool_default_size = 1
osd_pool_default_min_size = 1
osd_pool_default_pg_autoscale_mode = off
osd_crush_chooseleaf_type = 0
osd_objectstore = bluestore
bluestore_block_size = 4294967296
bluestore_cache_autotune = false
bluestore_cache_size = 67108864
osd_op_num_shards = 2
osd_class_update_on_start = false
`

func startCeph(t *testing.T) *ceph {
	t.Helper()
	need(t, "qemu-storage-daemon", "qemu-io", "ceph-mon", "ceph-osd", "ceph-authtool", "monmaptool", "ceph", "rbd")
	dir, err := os.MkdirTemp("/var/tmp", "h8s-ceph-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	c := &ceph{t: t, dir: dir}
	v2, v1 := freePort(t), freePort(t)
	c.monitor = v1
	for _, d := range []string{"run", "mon", "osd"} {
		if err := os.Mkdir(filepath.Join(dir, d), 0o700); err != nil {
			t.Fatal(err)
		}
	}
	fsid, uuid := newUUID(), newUUID()
	c.write("ceph.conf", fmt.Sprintf(cephConf, dir, fsid, v2, v1))
	ring := filepath.Join(dir, "keyring")
	c.run("ceph-authtool", "-C", ring, "-n", "mon.", "--gen-key", "--cap", "mon", "allow *")
	c.run("ceph-authtool", ring, "-n", "client.admin", "--gen-key", "--cap", "mon", "allow *", "--cap", "osd", "allow *")
	c.run("ceph-authtool", ring, "-n", "client.cinder", "--gen-key", "--cap", "mon", "profile rbd", "--cap", "osd", "profile rbd pool=volumes")
	monmap := filepath.Join(dir, "monmap")
	c.run("monmaptool", "--create", "--fsid", fsid, "--addv", "a", "[v2:"+v2+",v1:"+v1+"]", monmap)
	c.run("ceph-mon", "-c", c.conf(), "-i", "a", "--mkfs", "--monmap", monmap, "--keyring", ring)
	c.daemon("ceph-mon", "-f", "-c", c.conf(), "-i", "a")
	key := strings.TrimSpace(c.run("ceph-authtool", "--gen-print-key"))
	c.write("osd.json", fmt.Sprintf(`{"cephx_secret":%q}`, key))
	c.run("ceph", "-c", c.conf(), "osd", "new", uuid, "-i", filepath.Join(dir, "osd.json"))
	c.run("ceph-osd", "-c", c.conf(), "-i", "0", "--mkfs", "--key", key, "--osd-uuid", uuid)
	c.write("osd/keyring", "[osd.0]\n\tkey = "+key+"\n")
	c.daemon("ceph-osd", "-f", "-c", c.conf(), "-i", "0", "--keyring", filepath.Join(dir, "osd/keyring"))
	c.run("ceph", "-c", c.conf(), "osd", "pool", "create", "volumes", "8", "8")
	c.run("ceph", "-c", c.conf(), "osd", "pool", "application", "enable", "volumes", "rbd")
	return c
}

func newUUID() string {
	var b [16]byte
	_, _ = rand.Read(b[:])
	b[6], b[8] = b[6]&0x0f|0x40, b[8]&0x3f|0x80
	return fmt.Sprintf("%x-%x-%x-%x-%x", b[:4], b[4:6], b[6:8], b[8:10], b[10:])
}

func freePort(t *testing.T) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	return l.Addr().String()
}

func (c *ceph) conf() string { return filepath.Join(c.dir, "ceph.conf") }

func (c *ceph) write(name, content string) {
	c.t.Helper()
	if err := os.WriteFile(filepath.Join(c.dir, name), []byte(content), 0o600); err != nil {
		c.t.Fatal(err)
	}
}

func (c *ceph) run(name string, args ...string) string {
	c.t.Helper()
	var errb bytes.Buffer
	cmd := exec.CommandContext(c.t.Context(), name, args...)
	cmd.Stderr = &errb
	out, err := cmd.Output()
	if err != nil {
		c.t.Fatalf("%s %q: %v: %s", name, args, err, errb.String())
	}
	return string(out)
}

func (c *ceph) rbd(args ...string) string {
	c.t.Helper()
	return c.run("rbd", append([]string{"-c", c.conf()}, args...)...)
}

// daemon runs until the test's end.
func (c *ceph) daemon(name string, args ...string) {
	c.t.Helper()
	cmd := exec.Command(name, args...)
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	if err := cmd.Start(); err != nil {
		c.t.Fatal(err)
	}
	c.t.Cleanup(func() {
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
	})
}

func (c *ceph) volume(image string) Volume {
	key := strings.TrimSpace(c.run("ceph-authtool", filepath.Join(c.dir, "keyring"), "-n", "client.cinder", "-p"))
	return Volume{
		Serial: "v" + image, Source: record.Source{RBD: &record.RBD{Pool: "volumes", Image: image, Monitors: []string{c.monitor}, User: "cinder"}},
		Secrets: map[string][]byte{record.SecretKey: []byte(key)},
	}
}

// watchers are the clients that have an image open.
func (c *ceph) watchers(image string) []string {
	c.t.Helper()
	var st struct {
		Watchers []struct{ Address string }
	}
	if err := json.Unmarshal([]byte(c.rbd("status", "--format", "json", "volumes/"+image)), &st); err != nil {
		c.t.Fatal(err)
	}
	var out []string
	for _, w := range st.Watchers {
		out = append(out, w.Address)
	}
	return out
}

// TestCeph serves images of a real cluster.
func TestCeph(t *testing.T) {
	if testing.Short() {
		t.Skip("skipped: -short, and starting Ceph takes 10 s")
	}
	c := startCeph(t)
	c.rbd("create", "--size", "64", "volumes/one")
	c.rbd("create", "--size", "32", "volumes/two")
	began := time.Now()
	d, err := start(t, Config{Volumes: []Volume{c.volume("one"), c.volume("two")}})
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("two images are served after %v", time.Since(began).Round(time.Millisecond))
	if out := d.io(t, "v0-1", "write -P 7 0 64k", "flush"); !strings.Contains(out, "wrote 65536/65536") {
		t.Fatal(out)
	}
	if out := c.rbd("export", "volumes/one", "-"); out[:3] != "\x07\x07\x07" || len(out) != 64<<20 {
		t.Errorf("the image has %d bytes, %q", len(out), out[:3])
	}
	c.rbd("resize", "--size", "128", "volumes/one")
	size, err := d.Grow(t.Context(), "vone")
	if err != nil || size != 128<<20 {
		t.Fatalf("%d, %v", size, err)
	}
	if out := d.io(t, "v0-2", "read -P 7 0 64k", "write -P 8 120M 64k", "flush"); !strings.Contains(out, "wrote 65536/65536") || strings.Contains(out, "failed") {
		t.Error(out)
	}
	if info := c.rbd("info", "volumes/one"); !strings.Contains(info, "128 MiB") {
		t.Errorf("growing has changed the image: %s", info)
	}
	wrong := c.volume("one")
	wrong.Secrets[record.SecretKey] = []byte(keyringKey)
	began = time.Now()
	if _, err := start(t, Config{Volumes: []Volume{wrong}}); !errdefs.IsUnavailable(err) || !strings.Contains(err.Error(), c.monitor) || strings.Contains(err.Error(), keyringKey) {
		t.Errorf("a wrong key: %v", err)
	} else {
		t.Logf("a wrong key after %v: %v", time.Since(began).Round(time.Millisecond), err)
	}
	if _, err := start(t, Config{Volumes: []Volume{c.volume("none")}}); err == nil {
		t.Error("an image that is not there is served")
	}
	// A fenced client cannot write any more, and its VM hears of it.
	for _, w := range c.watchers("two") {
		c.run("ceph", "-c", c.conf(), "osd", "blocklist", "add", w)
	}
	if out := d.io(t, "v1-1", "write -P 9 0 64k", "flush"); strings.Contains(out, "wrote 65536/65536") && !strings.Contains(out, "failed") {
		t.Errorf("a fenced client writes: %s", out)
	}
	if err := d.Close(); err != nil && !errors.Is(err, os.ErrProcessDone) {
		t.Fatal(err)
	}
}
