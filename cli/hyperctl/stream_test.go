package hyperctl

import (
	"bytes"
	"context"
	"errors"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"testing/iotest"

	"github.com/containerd/errdefs"
)

func TestDecodeStatus(t *testing.T) {
	if err := decodeStatus(nil); err != nil {
		t.Errorf("nothing: %v", err)
	}
	if err := decodeStatus([]byte(`{"status":"Success"}`)); err != nil {
		t.Errorf("success: %v", err)
	}
	var exit *ExitError
	err := decodeStatus([]byte(`{"status":"Failure","reason":"NonZeroExitCode","details":{"causes":[{"reason":"ExitCode","message":"137"}]}}`))
	if !errors.As(err, &exit) || exit.Code != 137 {
		t.Errorf("exit code: %v", err)
	}
	for text, want := range map[string]string{
		`{"status":"Failure","message":"no such container"}`:                                                                          "no such container",
		`{"status":"Failure","reason":"NonZeroExitCode","details":{"causes":[{"reason":"ExitCode","message":"many"}]}}`:               "many",
		`{"status":"Failure","reason":"NonZeroExitCode","message":"exit code without a cause","details":{"causes":[{"reason":"x"}]}}`: "without a cause",
		`plain text`: "plain text",
	} {
		if err := decodeStatus([]byte(text)); err == nil || !strings.Contains(err.Error(), want) || errors.As(err, &exit) && err == error(exit) {
			t.Errorf("%s: %v", text, err)
		}
	}
}

func FuzzDecodeStatus(f *testing.F) {
	f.Add([]byte(`{"status":"Failure","reason":"NonZeroExitCode","details":{"causes":[{"reason":"ExitCode","message":"1"}]}}`))
	f.Fuzz(func(t *testing.T, text []byte) {
		var exit *ExitError
		if err := decodeStatus(text); errors.As(err, &exit) && (exit.Code < 0 || exit.Code > 255) {
			t.Errorf("exit code %d", exit.Code)
		}
	})
}

func TestDetachReader(t *testing.T) {
	for name, tc := range map[string]struct {
		in, out  string
		detached bool
	}{
		"plain":            {"abc", "abc", false},
		"detach":           {"abc\x10\x11def", "abc", true},
		"^P alone":         {"a\x10b", "a\x10b", false},
		"^P ^P ^Q":         {"\x10\x10\x11", "\x10", true},
		"^Q alone":         {"\x11", "\x11", false},
		"nothing":          {"", "", false},
		"detach at once":   {"\x10\x11", "", true},
		"ends within keys": {"ab\x10", "ab", false},
	} {
		for kind, r := range map[string]io.Reader{"whole": strings.NewReader(tc.in), "by byte": iotest.OneByteReader(strings.NewReader(tc.in))} {
			out, err := io.ReadAll(&detachReader{r: r})
			if string(out) != tc.out || errors.Is(err, errDetached) != tc.detached {
				t.Errorf("%s, %s: %q, %v; want %q", name, kind, out, err, tc.out)
			}
		}
	}
}

const logText = `2026-11-21T10:00:00.1Z stdout F one
2026-11-21T10:00:01.1Z stderr F oops
2026-11-21T10:00:02.1Z stdout P tw
2026-11-21T10:00:02.2Z stdout F o
`

func TestFollowLog(t *testing.T) {
	file := filepath.Join(t.TempDir(), "x.log")
	must(t, os.WriteFile(file, []byte(logText), 0o600))
	for name, tc := range map[string]struct {
		o        logOptions
		out, err string
	}{
		"all":   {logOptions{}, "one\ntwo\n", "oops\n"},
		"times": {logOptions{times: true}, "2026-11-21T10:00:00.1Z one\n2026-11-21T10:00:02.1Z two\n", "2026-11-21T10:00:01.1Z oops\n"},
		"tail":  {logOptions{tail: 3}, "two\n", "oops\n"},
		"much":  {logOptions{tail: 100}, "one\ntwo\n", "oops\n"},
	} {
		var out, err bytes.Buffer
		tc.o.stdout, tc.o.stderr = &out, &err
		must(t, followLog(context.Background(), file, tc.o))
		if out.String() != tc.out || err.String() != tc.err {
			t.Errorf("%s: %q %q", name, out.String(), err.String())
		}
	}
}

func TestFollowLogReadsWhatComesAndWhatCameLast(t *testing.T) {
	file := filepath.Join(t.TempDir(), "x.log")
	must(t, os.WriteFile(file, nil, 0o600))
	r, w := io.Pipe()
	done, ended := make(chan struct{}), make(chan error, 1)
	go func() {
		ended <- followLog(context.Background(), file, logOptions{follow: true, done: done, stdout: w, stderr: w})
	}()
	f, err := os.OpenFile(file, os.O_APPEND|os.O_WRONLY, 0)
	must(t, err)
	defer f.Close()
	_, err = f.WriteString("2026 stdout F first\n2026 stdout F sec")
	must(t, err)
	buf := make([]byte, 100)
	n, err := r.Read(buf)
	must(t, err)
	if string(buf[:n]) != "first\n" {
		t.Errorf("read %q", buf[:n])
	}
	_, err = f.WriteString("ond\n")
	must(t, err)
	close(done)
	n, err = r.Read(buf)
	must(t, err)
	if string(buf[:n]) != "second\n" {
		t.Errorf("read %q", buf[:n])
	}
	must(t, <-ended)
}

func TestLogOfAnotherFormat(t *testing.T) {
	file := filepath.Join(t.TempDir(), "x.log")
	must(t, os.WriteFile(file, []byte("nonsense\n"), 0o600))
	if err := followLog(context.Background(), file, logOptions{stdout: io.Discard, stderr: io.Discard}); !errors.Is(err, errdefs.ErrDataLoss) {
		t.Errorf("got %v", err)
	}
}
