package node

import (
	"bytes"
	"os"
	"path/filepath"
	"testing"
)

func TestTrimLog(t *testing.T) {
	path := filepath.Join(t.TempDir(), "c.log")
	if err := TrimLog(path); err != nil {
		t.Errorf("a log that is not there: %v", err)
	}
	writer, err := OpenLog(path)
	if err != nil {
		t.Fatal(err)
	}
	defer writer.Close()
	write := func(b []byte) {
		t.Helper()
		if _, err := writer.Write(b); err != nil {
			t.Fatal(err)
		}
	}
	sizes := func() (now, aside int64) {
		t.Helper()
		st, err := os.Stat(path)
		if err != nil {
			t.Fatal(err)
		}
		if old, err := os.Stat(path + ".1"); err == nil {
			aside = old.Size()
		}
		return st.Size(), aside
	}
	write(bytes.Repeat([]byte("x"), maxLog))
	if err := TrimLog(path); err != nil {
		t.Fatal(err)
	}
	if now, aside := sizes(); now != maxLog || aside != 0 {
		t.Errorf("a log of just the limit was trimmed: %d, %d", now, aside)
	}
	write([]byte("y"))
	if err := TrimLog(path); err != nil {
		t.Fatal(err)
	}
	// The writer was not told, and goes on at the new end.
	write([]byte("z"))
	if now, aside := sizes(); now != 1 || aside != maxLog+1 {
		t.Errorf("after trimming: %d, %d", now, aside)
	}
}
