package kubeconfig

import (
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
)

var entry = Entry{Name: "h8s", Server: "https://127.0.0.1:6443", CA: []byte("ca"), Cert: []byte("crt"), Key: []byte("key")}

const users = `apiVersion: v1
clusters:
- cluster:
    server: https://work.example
    x-unknown: kept
  name: work
contexts:
- context:
    cluster: work
    user: work
  name: work
current-context: work
extensions:
- name: mine
kind: Config
preferences: {}
users:
- name: work
  user:
    token: secret
`

func TestMergeAndUnmerge(t *testing.T) {
	path := filepath.Join(t.TempDir(), "config")
	if err := os.WriteFile(path, []byte(users), 0o600); err != nil {
		t.Fatal(err)
	}
	for range 2 { // merging twice changes nothing more
		if err := Merge(path, entry); err != nil {
			t.Fatal(err)
		}
	}
	merged := readFile(t, path)
	for _, want := range []string{"current-context: h8s", "x-unknown: kept", "https://127.0.0.1:6443", "https://work.example", "name: mine"} {
		if !strings.Contains(merged, want) {
			t.Errorf("no %q in:\n%s", want, merged)
		}
	}
	if n := strings.Count(merged, "name: h8s"); n != 3 {
		t.Errorf("%d entries called h8s:\n%s", n, merged)
	}
	changed, err := Unmerge(path, "h8s")
	if err != nil || !changed {
		t.Fatalf("unmerge: %t %v", changed, err)
	}
	want := strings.Replace(users, "current-context: work", `current-context: ""`, 1)
	if got := readFile(t, path); got != want {
		t.Errorf("after unmerge:\n%s\nwant:\n%s", got, want)
	}
	if changed, err := Unmerge(path, "h8s"); err != nil || changed {
		t.Errorf("second unmerge: %t %v", changed, err)
	}
}

func readFile(t *testing.T, path string) string {
	t.Helper()
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

func TestMergeIntoNothing(t *testing.T) {
	path := filepath.Join(t.TempDir(), "sub", "config")
	if err := Merge(path, entry); err != nil {
		t.Fatal(err)
	}
	st, err := os.Stat(path)
	if err != nil || st.Mode().Perm() != 0o600 {
		t.Errorf("%v %v", st.Mode(), err)
	}
}

func TestUnmergeWithoutFile(t *testing.T) {
	if changed, err := Unmerge(filepath.Join(t.TempDir(), "none"), "h8s"); err != nil || changed {
		t.Errorf("%t %v", changed, err)
	}
}

func TestMergeRefusesNonsense(t *testing.T) {
	path := filepath.Join(t.TempDir(), "config")
	if err := os.WriteFile(path, []byte("- a list\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := Merge(path, entry); err == nil {
		t.Error("a file that is no kubeconfig was overwritten")
	}
}

func TestMergeKeepsTheFileAsItIsKept(t *testing.T) {
	dir := t.TempDir()
	kept, path := filepath.Join(dir, "dotfiles", "config"), filepath.Join(dir, "config")
	if err := os.Mkdir(filepath.Dir(kept), 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(kept, []byte(users), 0o640); err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(kept, 0o640); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink(kept, path); err != nil {
		t.Fatal(err)
	}
	if err := Merge(path, entry); err != nil {
		t.Fatal(err)
	}
	if st, err := os.Lstat(path); err != nil || st.Mode()&os.ModeSymlink == 0 {
		t.Errorf("the link was replaced: %v %v", st, err)
	}
	st, err := os.Stat(kept)
	if err != nil || st.Mode().Perm() != 0o640 {
		t.Errorf("mode %v %v", st.Mode(), err)
	}
	if b, err := os.ReadFile(kept); err != nil || !strings.Contains(string(b), entry.Server) {
		t.Errorf("%s %v", b, err)
	}
}

func TestLoad(t *testing.T) {
	path := filepath.Join(t.TempDir(), "config")
	want := Entry{Name: "x", Server: "https://127.0.0.1:1", CA: []byte("ca"), Cert: []byte("cert"), Key: []byte("key"), Namespace: "web"}
	if err := Write(path, want); err != nil {
		t.Fatal(err)
	}
	got, err := Load(path)
	if err != nil || !reflect.DeepEqual(got, want) {
		t.Errorf("%+v %v", got, err)
	}
	for text, class := range map[string]func(error) bool{
		"[":                     errdefs.IsInvalidArgument,
		"{}":                    errdefs.IsInvalidArgument,
		"current-context: none": errdefs.IsInvalidArgument,
		`{current-context: a, contexts: [{name: a, context: {cluster: a, user: a}}], clusters: [{name: a, cluster: {server: s}}], users: [{name: a, user: {exec: {command: x}}}]}`: errdefs.IsNotImplemented,
	} {
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		if _, err := Load(path); !class(err) {
			t.Errorf("%s: %v", text, err)
		}
	}
	if err := os.WriteFile(filepath.Join(filepath.Dir(path), "c.pem"), []byte("cert"), 0o600); err != nil {
		t.Fatal(err)
	}
	text := `{current-context: a, contexts: [{name: a, context: {cluster: a, user: a}}], clusters: [{name: a, cluster: {server: s}}], users: [{name: a, user: {client-certificate: c.pem, token: t}}]}`
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	if e, err := Load(path); err != nil || string(e.Cert) != "cert" || e.Token != "t" {
		t.Errorf("%+v %v", e, err)
	}
}
