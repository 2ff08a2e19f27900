package supervisor

import (
	"strings"
	"testing"
)

func TestLastWords(t *testing.T) {
	for _, c := range []struct{ name, log, want string }{
		{"empty", "", "none"},
		{"blank", "\n\n  \n", "none"},
		{"plain", "one\ntwo\n\n", "two"},
		{"not utf-8", "bad \xff\n", "bad ?"},
		{"klog", `E1121 10:00:00.0 1 run.go:74] "command failed" err="unknown flag"` + "\n", `E1121 10:00:00.0 1 run.go:74] "command failed" err="unknown flag"`},
		{"json", `{"level":"fatal","msg":"discovery failed","error":"no such host"}` + "\n", "discovery failed: no such host"},
		{"json without error", `{"msg":"closed"}`, "closed"},
		{"etcd panics", `{"level":"panic","msg":"failed to create WAL","error":"no space left on device","stacktrace":"x\n\ty"}
panic: failed to create WAL

goroutine 1 [running]:
go.uber.org/zap/zapcore.CheckWriteAction.OnWrite(0x1?, 0xe21845?, {0x0?, 0x0?})
	go.uber.org/zap@v1.28.0/zapcore/entry.go:196 +0x54
go.etcd.io/etcd/server/v3/etcdserver.bootstrapStorage(...)
	go.etcd.io/etcd/server/v3@v3.6.8/etcdserver/bootstrap.go:171
main.init.func5()
	github.com/hypernetes/hypernetes/dist/kubernetes/main.go:55 +0x28
main.main()
	github.com/hypernetes/hypernetes/dist/kubernetes/main.go:77 +0x216
exit status 2
`, "failed to create WAL: no space left on device"},
		{"plain panic", "starting\npanic: runtime error: index out of range\n\ngoroutine 7 [running]:\nmain.f(0x1)\n\t/x.go:1 +0x2\n", "panic: runtime error: index out of range"},
		{"long", strings.Repeat("x", 1000), strings.Repeat("x", 300)},
	} {
		if got := lastWords([]byte(c.log)); got != c.want {
			t.Errorf("%s: got %q, want %q", c.name, got, c.want)
		}
	}
}

func FuzzLastWords(f *testing.F) {
	f.Add([]byte("panic: x\n\ngoroutine 1 [running]:\nmain.main()\n"))
	f.Add([]byte(`{"msg":"a","error":"b"}`))
	f.Fuzz(func(t *testing.T, b []byte) {
		if got := lastWords(b); got == "" || len(got) > 300 {
			t.Errorf("%q of %d bytes", got, len(got))
		}
	})
}
