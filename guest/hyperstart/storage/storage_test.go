package storage

import (
	"os"
	"path/filepath"
	"testing"
)

func TestSerial(t *testing.T) {
	for page, want := range map[string]string{
		"\x00\x80\x00\x06layer0": "layer0", "\x00\x80\x00\x08layer0  ": "layer0",
		"\x00\x80\x00\xfflayer0": "", "\x00\x83\x00\x01x": "", "\x00": "", "": "",
	} {
		if got := vpdSerial([]byte(page)); got != want {
			t.Errorf("%q: %q, want %q", page, got, want)
		}
	}
	sys := t.TempDir()
	for name, data := range map[string]string{
		"sda/device/vpd_pg80": "\x00\x80\x00\x03one", "sdb/device/vpd_pg80": "\x00\x80\x00\x03two", "vda/serial": "three\n", "loop0/serial": "four",
	} {
		p := filepath.Join(sys, name)
		if err := os.MkdirAll(filepath.Dir(p), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(p, []byte(data), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	for serial, want := range map[string]string{"one": "/dev/sda", "two": "/dev/sdb", "three": "/dev/vda", "four": "", "": ""} {
		if got := bySerial(sys, serial); got != want {
			t.Errorf("%q: %q, want %q", serial, got, want)
		}
	}
	if _, err := Find(t.Context(), "../x"); err == nil {
		t.Error("a malformed serial was looked for")
	}
}

func FuzzSerial(f *testing.F) {
	f.Add([]byte("\x00\x80\x00\x06layer0"))
	f.Fuzz(func(t *testing.T, page []byte) {
		if s := vpdSerial(page); len(s) > len(page) {
			t.Fatalf("%q of %q", s, page)
		}
	})
}

func TestWalk(t *testing.T) {
	dir := t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, "a"), make([]byte, 8192), 0o600); err != nil {
		t.Fatal(err)
	}
	u, err := Walk(dir)
	if err != nil || u.Inodes != 2 || u.Bytes < 8192 {
		t.Errorf("%v %v", u, err)
	}
}
