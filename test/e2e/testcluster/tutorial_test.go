package testcluster

import "testing"

func TestMissing(t *testing.T) {
	for _, c := range []struct {
		lines []string
		want  string
	}{
		{[]string{"a b", "c … e"}, ""}, {[]string{"c … e", "a b"}, "a b"}, {[]string{"a"}, "a"}, {[]string{"…d…"}, ""},
	} {
		if got := missing("a   b\nc  d  e\n", c.lines); got != c.want {
			t.Errorf("%q: %q, want %q", c.lines, got, c.want)
		}
	}
}
