package ledger

import (
	"os"
	"path/filepath"
	"testing"
)

// write opens a ledger, which has so many records, and appends to it.
func write(t *testing.T, dir string, has, more int) {
	t.Helper()
	l, s, err := Open(dir)
	if err != nil || s.Records != has {
		t.Fatalf("opened with %d records, %v, want %d", s.Records, err, has)
	}
	for i := range more {
		if n, err := l.Append(); err != nil || n != has+i+1 {
			t.Fatalf("appended %d, %v, want %d", n, err, has+i+1)
		}
	}
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
}

func TestLedger(t *testing.T) {
	dir := t.TempDir()
	if s, err := Read(dir); err != nil || s != (State{}) {
		t.Fatalf("nothing: %+v, %v", s, err)
	}
	write(t, dir, 0, 0)
	write(t, dir, 0, perFile-1)
	write(t, dir, perFile-1, 1)
	write(t, dir, perFile, 0)
	write(t, dir, perFile, perFile+7)
	all := 2*perFile + 7
	first, _ := Read(dir)
	// What was begun is not there, and is written over.
	last := filepath.Join(dir, name(2*perFile))
	f, err := os.OpenFile(last, os.O_APPEND|os.O_WRONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := f.WriteString(line(first.ID, all, length(all))[:40]); err != nil {
		t.Fatal(err)
	}
	_ = f.Close()
	write(t, dir, all, 3)
	if s, err := Read(dir); err != nil || s.Records != all+3 || s.ID != first.ID {
		t.Errorf("%+v, %v, was %+v", s, err, first)
	}
}

// TestDamage: whatever is lost that was acknowledged, somebody is told.
func TestDamage(t *testing.T) {
	for name, damage := range map[string]func(dir string) error{
		"a file":           func(dir string) error { return os.Remove(filepath.Join(dir, name(perFile))) },
		"the last file":    func(dir string) error { return os.Remove(filepath.Join(dir, name(2*perFile))) },
		"a file's end":     func(dir string) error { return os.Truncate(filepath.Join(dir, name(0)), 100) },
		"the last's end":   func(dir string) error { return os.Truncate(filepath.Join(dir, name(2*perFile)), 100) },
		"a byte":           func(dir string) error { return poke(filepath.Join(dir, name(perFile)), 60) },
		"the last's byte":  func(dir string) error { return poke(filepath.Join(dir, name(2*perFile)), 60) },
		"all of the files": func(dir string) error { return os.RemoveAll(filepath.Join(dir, name(0))) },
	} {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			write(t, dir, 0, 2*perFile+5)
			if err := damage(dir); err != nil {
				t.Fatal(err)
			}
			if s, err := Read(dir); err == nil {
				t.Errorf("%+v", s)
			}
			if _, _, err := Open(dir); err == nil {
				t.Error("goes on with a damaged ledger")
			}
		})
	}
}

func poke(path string, at int64) error {
	f, err := os.OpenFile(path, os.O_WRONLY, 0)
	if err != nil {
		return err
	}
	defer f.Close()
	_, err = f.WriteAt([]byte{'x'}, at)
	return err
}

func FuzzRead(f *testing.F) {
	f.Add([]byte(line("0123456789abcdef", 0, length(0))+"\n"), []byte(line("0123456789abcdef", 1, headLength)+"\n"))
	f.Fuzz(func(t *testing.T, records, head []byte) {
		dir := t.TempDir()
		if err := os.WriteFile(filepath.Join(dir, name(0)), records, 0o600); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(dir, headName), head, 0o600); err != nil {
			t.Fatal(err)
		}
		_, _ = Read(dir)
	})
}
