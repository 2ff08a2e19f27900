package storage

import (
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

// TestISCSI serves a LUN of tgt, which Cinder's LVM driver uses.
func TestISCSI(t *testing.T) {
	need(t, "qemu-storage-daemon", "qemu-io", "tgtd", "tgtadm")
	const target, user, password = "iqn.2010-10.org.openstack:volume-1", "chap-user", "a password,=\""
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	portal := l.Addr().String()
	_ = l.Close()
	dir := t.TempDir()
	disk := filepath.Join(dir, "disk")
	if err := errors.Join(os.WriteFile(disk, nil, 0o600), os.Truncate(disk, 8<<20)); err != nil {
		t.Fatal(err)
	}
	env := append(os.Environ(), "TGT_IPC_SOCKET="+filepath.Join(dir, "ipc"))
	tgtd := exec.Command("tgtd", "-f", "-C", "77", "--iscsi", "portal="+portal)
	tgtd.Env, tgtd.SysProcAttr = env, &syscall.SysProcAttr{Setpgid: true}
	if err := tgtd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = tgtd.Process.Kill()
		_ = tgtd.Wait()
	})
	admin := func(args ...string) error {
		cmd := exec.Command("tgtadm", append([]string{"-C", "77", "--lld", "iscsi"}, args...)...)
		cmd.Env = env
		if out, err := cmd.CombinedOutput(); err != nil {
			return fmt.Errorf("tgtadm %q: %w: %s", args, err, out)
		}
		return nil
	}
	for until := time.Now().Add(30 * time.Second); ; <-time.After(50 * time.Millisecond) {
		if err := admin("--op", "new", "--mode", "target", "--tid", "1", "-T", target); err == nil {
			break
		} else if time.Now().After(until) {
			t.Fatal(err)
		}
	}
	for _, args := range [][]string{
		{"--op", "new", "--mode", "logicalunit", "--tid", "1", "--lun", "1", "-b", disk},
		{"--op", "new", "--mode", "account", "--user", user, "--password", password},
		{"--op", "bind", "--mode", "account", "--tid", "1", "--user", user},
		{"--op", "bind", "--mode", "target", "--tid", "1", "-I", "ALL"},
	} {
		if err := admin(args...); err != nil {
			t.Fatal(err)
		}
	}
	v := Volume{
		Serial:  "v",
		Source:  record.Source{ISCSI: &record.ISCSI{Portal: portal, Target: target, LUN: 1, Initiator: "iqn.2026-11.io.hypernetes:n1", User: user}},
		Secrets: map[string][]byte{record.SecretPassword: []byte(password)},
	}
	d, err := start(t, Config{Volumes: []Volume{v}})
	if err != nil {
		t.Fatal(err)
	}
	if size, err := d.Size("v"); err != nil || size != 8<<20 {
		t.Errorf("%d, %v", size, err)
	}
	if out := d.io(t, "v0-1", "write -P 7 0 64k", "flush"); !strings.Contains(out, "wrote 65536/65536") {
		t.Fatal(out)
	}
	if b, err := os.ReadFile(disk); err != nil || b[0] != 7 {
		t.Error("nothing is written", err)
	}
	v.Secrets = map[string][]byte{record.SecretPassword: []byte("another one")}
	if _, err := start(t, Config{Volumes: []Volume{v}}); !errdefs.IsUnavailable(err) || !strings.Contains(err.Error(), portal) {
		t.Errorf("a wrong password: %v", err)
	} else {
		t.Log(err)
	}
}
