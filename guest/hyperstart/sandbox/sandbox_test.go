package sandbox

import (
	"os"
	"path/filepath"
	"testing"
)

func TestSysctlPath(t *testing.T) {
	for name, want := range map[string]string{
		"net.ipv4.ip_forward":            "/p/net/ipv4/ip_forward",
		"net/ipv4/conf/eth0.1/rp_filter": "/p/net/ipv4/conf/eth0.1/rp_filter",
		"net.ipv4.conf.eth0/1.rp_filter": "/p/net/ipv4/conf/eth0.1/rp_filter",
		"kernel":                         "/p/kernel",
	} {
		if got, err := SysctlPath("/p", name); err != nil || got != want {
			t.Errorf("%s: %s %v", name, got, err)
		}
	}
	for _, name := range []string{"", "..", "a..b", "../x", "/etc/passwd", "a/../b", "a b", "a\x00"} {
		if got, err := SysctlPath("/p", name); err == nil {
			t.Errorf("%q was taken: %s", name, got)
		}
	}
	dir := t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, "x"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := WriteSysctls(dir, map[string]string{"x": "1"}); err != nil {
		t.Error(err)
	}
	if err := WriteSysctls(dir, map[string]string{"y": "1"}); err == nil {
		t.Error("an unknown setting was set")
	}
}
