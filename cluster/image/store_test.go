package image

import "testing"

func TestReason(t *testing.T) {
	for output, want := range map[string]string{
		"ctr: gone": "gone",
		"time=x level=warning\nctr: a: b\n\n: c\n": "a: b : c",
		"no prefix\x1b[31m":                        "no prefix [31m",
		"":                                         "",
	} {
		if got := reason(output); got != want {
			t.Errorf("%q: %q, want %q", output, got, want)
		}
	}
}
