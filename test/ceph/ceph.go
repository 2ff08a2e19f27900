// Package ceph is a Ceph cluster for tests. It must only be imported by tests.
package ceph

import (
	"bytes"
	"crypto/rand"
	"encoding/json"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
)

// Cluster is one monitor and one OSD on loopback, in user space, with the pool "volumes"
// and the user "cinder" for it.
type Cluster struct {
	// Monitor is where it listens, host:port.
	Monitor string

	t          testing.TB
	dir, netns string
	daemons    map[string]daemon
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

// Missing is why there can be no cluster here, or nil.
func Missing() error {
	for _, p := range []string{"ceph-mon", "ceph-osd", "ceph-authtool", "monmaptool", "ceph", "rbd"} {
		if _, err := exec.LookPath(p); err != nil {
			return fmt.Errorf("%w: install the Debian packages ceph-mon, ceph-osd and ceph-common", err)
		}
	}
	return nil
}

// Start starts a cluster that ends with the test.
func Start(t testing.TB) *Cluster { return StartIn(t, "") }

// StartIn starts one on the loopback of the network namespace at a path, "" for this one.
func StartIn(t testing.TB, netns string) *Cluster {
	t.Helper()
	if err := Missing(); err != nil {
		t.Skipf("skipped: %v", err)
	}
	dir, err := os.MkdirTemp("/var/tmp", "h8s-ceph-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	c := &Cluster{t: t, dir: dir, netns: netns, daemons: map[string]daemon{}}
	v2, v1 := freePort(t), freePort(t)
	c.Monitor = v1
	for _, d := range []string{"run", "mon", "osd"} {
		if err := os.Mkdir(filepath.Join(dir, d), 0o700); err != nil {
			t.Fatal(err)
		}
	}
	fsid, uuid := newUUID(), newUUID()
	c.write("ceph.conf", fmt.Sprintf(cephConf, dir, fsid, v2, v1))
	ring := filepath.Join(dir, "keyring")
	c.Run("ceph-authtool", "-C", ring, "-n", "mon.", "--gen-key", "--cap", "mon", "allow *")
	c.Run("ceph-authtool", ring, "-n", "client.admin", "--gen-key", "--cap", "mon", "allow *", "--cap", "osd", "allow *")
	c.Run("ceph-authtool", ring, "-n", "client.cinder", "--gen-key", "--cap", "mon", "profile rbd", "--cap", "osd", "profile rbd pool=volumes")
	monmap := filepath.Join(dir, "monmap")
	c.Run("monmaptool", "--create", "--fsid", fsid, "--addv", "a", "[v2:"+v2+",v1:"+v1+"]", monmap)
	c.Run("ceph-mon", "-c", c.Conf(), "-i", "a", "--mkfs", "--monmap", monmap, "--keyring", ring)
	c.daemon("ceph-mon", "-f", "-c", c.Conf(), "-i", "a")
	key := strings.TrimSpace(c.Run("ceph-authtool", "--gen-print-key"))
	c.write("osd.json", fmt.Sprintf(`{"cephx_secret":%q}`, key))
	c.Run("ceph", "-c", c.Conf(), "osd", "new", uuid, "-i", filepath.Join(dir, "osd.json"))
	c.Run("ceph-osd", "-c", c.Conf(), "-i", "0", "--mkfs", "--key", key, "--osd-uuid", uuid)
	c.write("osd/keyring", "[osd.0]\n\tkey = "+key+"\n")
	c.daemon("ceph-osd", "-f", "-c", c.Conf(), "-i", "0", "--keyring", filepath.Join(dir, "osd/keyring"))
	c.Run("ceph", "-c", c.Conf(), "osd", "pool", "create", "volumes", "8", "8")
	c.Run("ceph", "-c", c.Conf(), "osd", "pool", "application", "enable", "volumes", "rbd")
	return c
}

func newUUID() string {
	var b [16]byte
	_, _ = rand.Read(b[:])
	b[6], b[8] = b[6]&0x0f|0x40, b[8]&0x3f|0x80
	return fmt.Sprintf("%x-%x-%x-%x-%x", b[:4], b[4:6], b[6:8], b[8:10], b[10:])
}

func freePort(t testing.TB) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	return l.Addr().String()
}

// Conf is the path of its configuration, with the key of its administrator.
func (c *Cluster) Conf() string { return filepath.Join(c.dir, "ceph.conf") }

func (c *Cluster) write(name, content string) {
	c.t.Helper()
	if err := os.WriteFile(filepath.Join(c.dir, name), []byte(content), 0o600); err != nil {
		c.t.Fatal(err)
	}
}

// command is in the cluster's namespace: nsenter becomes the program.
func (c *Cluster) command(name string, args []string) *exec.Cmd {
	if c.netns == "" {
		return exec.Command(name, args...)
	}
	return exec.Command("nsenter", append([]string{"--net=" + c.netns, name}, args...)...)
}

// Run runs a program of Ceph and returns its output.
func (c *Cluster) Run(name string, args ...string) string {
	c.t.Helper()
	var errb bytes.Buffer
	cmd := c.command(name, args)
	cmd.Stderr = &errb
	out, err := cmd.Output()
	if err != nil {
		c.t.Fatalf("%s %q: %v: %s", name, args, err, errb.String())
	}
	return string(out)
}

// RBD runs rbd.
func (c *Cluster) RBD(args ...string) string {
	c.t.Helper()
	return c.Run("rbd", append([]string{"-c", c.Conf()}, args...)...)
}

// daemon runs until the test's end, or until it is killed.
func (c *Cluster) daemon(name string, args ...string) {
	c.t.Helper()
	cmd := c.command(name, args)
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	if err := cmd.Start(); err != nil {
		c.t.Fatal(err)
	}
	d := daemon{cmd, args}
	c.daemons[name] = d
	c.t.Cleanup(d.end)
}

// Kill kills ceph-mon or ceph-osd; Again starts it again.
func (c *Cluster) Kill(name string) { c.daemons[name].end() }

// Again starts what was killed.
func (c *Cluster) Again(name string) {
	c.t.Helper()
	c.daemon(name, c.daemons[name].args...)
}

// daemon is one that was started.
type daemon struct {
	cmd  *exec.Cmd
	args []string
}

func (d daemon) end() {
	_ = d.cmd.Process.Kill()
	_ = d.cmd.Wait()
}

// Watchers are the clients that have an image open.
func (c *Cluster) Watchers(image string) []string {
	c.t.Helper()
	var st struct {
		Watchers []struct{ Address string }
	}
	if err := json.Unmarshal([]byte(c.RBD("status", "--format", "json", "volumes/"+image)), &st); err != nil {
		c.t.Fatal(err)
	}
	var out []string
	for _, w := range st.Watchers {
		out = append(out, w.Address)
	}
	return out
}

// Key is the user cinder's, as in a keyring.
func (c *Cluster) Key() string {
	c.t.Helper()
	return strings.TrimSpace(c.Run("ceph-authtool", filepath.Join(c.dir, "keyring"), "-n", "client.cinder", "-p"))
}
