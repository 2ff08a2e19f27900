package bootstrap

import (
	"bytes"
	"strings"
	"testing"
	"time"
)

func TestLogIsLimited(t *testing.T) {
	var out bytes.Buffer
	now := time.Unix(1, 0)
	l := &lossy{write: func(p []byte) { out.Write(p) }, now: func() time.Time { return now }, credit: logBurst}
	line := []byte(strings.Repeat("x", 1023) + "\n")
	for range 100 * logBurst / len(line) {
		if n, err := l.Write(line); n != len(line) || err != nil {
			t.Fatal(n, err)
		}
	}
	if out.Len() != logBurst {
		t.Errorf("%d bytes at once, want %d", out.Len(), logBurst)
	}
	out.Reset()
	for range 10 * 1000 { // ten seconds, in steps that earn less than a byte each
		now = now.Add(time.Millisecond / 4)
		_, _ = l.Write(line)
	}
	if got, most := out.Len(), 10*logRate; got == 0 || got > most {
		t.Errorf("%d bytes in 2.5 s, at most %d are allowed", got, most)
	}
	if !strings.Contains(out.String(), "messages of this shim were too many") {
		t.Error("nothing says that messages are lost")
	}
	out.Reset()
	now = now.Add(time.Hour)
	_, _ = l.Write(line)
	if out.String()[out.Len()-len(line):] != string(line) {
		t.Errorf("after a pause: %.100q", out.String())
	}
}
