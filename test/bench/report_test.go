package bench

import (
	"testing"
	"time"
)

func TestSeries(t *testing.T) {
	for _, c := range []struct {
		in   series
		want float64
		text string
	}{
		{nil, 0, "not measured"},
		{series{3}, 3, "3.0 (3.0 … 3.0)"},
		{series{9, 1, 2}, 2, "2.0 (1.0 … 9.0)"},
		{series{4, 1, 2, 3}, 2.5, "2.5 (1.0 … 4.0)"},
	} {
		if got := c.in.median(); got != c.want {
			t.Errorf("median of %v: %v, want %v", c.in, got, c.want)
		}
		if got := c.in.format("%.1f"); got != c.text {
			t.Errorf("format of %v: %q, want %q", c.in, got, c.text)
		}
	}
}

func TestTable(t *testing.T) {
	m := samples{}
	m.seconds("a", time.Second)
	m.seconds("a", 2*time.Second)
	m.seconds("b", 2*time.Second)
	m.seconds("b", 6*time.Second)
	const want = "| what | seconds: median (least … most) | ÷ floor |\n|---|---|---|\n" +
		"| floor | 1.50 (1.00 … 2.00) | 1.00 |\n| pod | 4.00 (2.00 … 6.00) | 2.50 |\n"
	if got := m.table("seconds", "%.2f", []row{{"a", "floor"}, {"b", "pod"}, {"c", "nothing"}}); got != want {
		t.Errorf("got\n%s\nwant\n%s", got, want)
	}
}

func TestParseStat(t *testing.T) {
	p, err := parseStat([]byte("42 (a) b (c) S 7 1 1 0 -1 0 0 0 0 0 150 50 0 0 20 0 1 0 99"))
	if err != nil {
		t.Fatal(err)
	}
	if want := (process{PID: 42, parent: 7, Command: "a) b (c", CPU: 2 * time.Second}); p != want {
		t.Errorf("got %+v, want %+v", p, want)
	}
	for _, bad := range []string{"", "1 (x", "1 (x) S 1", "x (x) S 7 1 1 0 -1 0 0 0 0 0 150 50 0"} {
		if _, err := parseStat([]byte(bad)); err == nil {
			t.Errorf("parsed %q", bad)
		}
	}
}

func TestField(t *testing.T) {
	const rollup = "00400000-7fff ---p 00000000 00:00 0 [rollup]\nRss:  9000 kB\nPss:   4321 kB\nPss_Anon: 1 kB\n"
	got, err := field([]byte(rollup), "Pss:")
	if err != nil || got != 4321<<10 {
		t.Errorf("got %d, %v", got, err)
	}
	if _, err := field([]byte(rollup), "Swap:"); err == nil {
		t.Error("found what is not there")
	}
}

func TestOverhead(t *testing.T) {
	m := samples{}
	m.megabytes("guest free", 200<<20) // of 256 MiB: 56 MiB have been touched
	m.megabytes("pss vmm", 156<<20)    // 100 MiB beside them
	m.megabytes("pss shim", 12<<20)
	// 96 + (100 + 12) * 1.25 = 236, rounded up to 16.
	if got := m.overhead().Memory; got != "240Mi" {
		t.Errorf("got %s, want 240Mi", got)
	}
}

func TestVersus(t *testing.T) {
	m := samples{"ours": {1, 2, 3}, "theirs": {2, 4, 12}}
	got := m.versus("ms", "%.1f", "upstream", []pair{{"this", "ours", "theirs"}, {"… that", "ours", ""}, {"none", "no", "theirs"}})
	want := "| what (ms) | Hypernetes: median (least … most) | upstream | ratio |\n|---|---|---|---|\n" +
		"| this | 2.0 (1.0 … 3.0) | 4.0 (2.0 … 12.0) | 0.50 |\n" +
		"| … that | 2.0 (1.0 … 3.0) | – | – |\n" +
		"| none | not measured | 4.0 (2.0 … 12.0) | – |\n"
	if got != want {
		t.Errorf("got\n%s\nwant\n%s", got, want)
	}
	if ms := m.scaled(1000); ms["ours"][2] != 3000 || m["ours"][2] != 3 {
		t.Errorf("scaled: %v of %v", ms, m)
	}
}
