package config

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
)

func write(t *testing.T, text string) string {
	t.Helper()
	p := filepath.Join(t.TempDir(), "hyper.toml")
	if err := os.WriteFile(p, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	return p
}

const files = "kernel = '/k/vmlinux'\ninitrd = '/k/initrd'\n"

func TestLoad(t *testing.T) {
	c, err := Load(write(t, files+"default_memory_mib = 128\naccelerator = 'tcg'\n"))
	if err != nil {
		t.Fatal(err)
	}
	if c.DefaultMemoryMiB != 128 || c.Accelerator != "tcg" || c.Machine != "q35" || c.StateDir != "/run/h8s-shim" {
		t.Errorf("got %+v", c)
	}
}

func TestLoadRefuses(t *testing.T) {
	for name, tc := range map[string]struct{ text, want string }{
		"unknown key":    {files + "defualt_vcpus = 2", "defualt_vcpus"},
		"no kernel":      {"initrd = '/i'", "kernel"},
		"relative":       {files + "kubelet_root = 'kubelet'", "kubelet_root"},
		"accelerator":    {files + "accelerator = 'hvf'", "accelerator"},
		"memory":         {files + "default_memory_mib = 1", "default_memory_mib"},
		"max below":      {files + "default_vcpus = 8\nmax_vcpus = 2", "max_vcpus"},
		"syntax":         {"kernel = ", "invalid"},
		"machine":        {files + "machine = 'pc'", "machine"},
		"overflow":       {files + "uid_base = 2147483647", "uid_base"},
		"heartbeat zero": {files + "heartbeat_seconds = 0", "heartbeat_seconds"},
	} {
		t.Run(name, func(t *testing.T) {
			_, err := Load(write(t, tc.text))
			if !errdefs.IsInvalidArgument(err) || !strings.Contains(err.Error(), tc.want) {
				t.Errorf("got %v, want an invalid argument naming %q", err, tc.want)
			}
		})
	}
	if _, err := Load(filepath.Join(t.TempDir(), "none")); !errdefs.IsNotFound(err) {
		t.Errorf("missing file: got %v", err)
	}
}

func TestCmdlineOfKernel(t *testing.T) {
	dir := t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, "kernel.json"), []byte(`{"cmdline":"audit=0"}`), 0o600); err != nil {
		t.Fatal(err)
	}
	c, err := Load(write(t, "kernel = '"+dir+"/vmlinux'\ninitrd = '/i'\n"))
	if err != nil || c.Cmdline != "audit=0" {
		t.Errorf("got %q, %v", c.Cmdline, err)
	}
}
