package convert

import (
	"bytes"
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
)

var update = flag.Bool("update", false, "write testdata/*.out")

// cluster is a Resolver with one tenant.
type cluster struct{}

var _ Resolver = cluster{}

func (cluster) ByProject(id string) (string, error) {
	if id == "065f210a2ca9442aad898ab129426350" {
		return "blue", nil
	}
	return "", errdefs.ErrNotFound
}

func (cluster) ByNetwork(name string) (string, error) {
	switch name {
	case "net1":
		return "blue", nil
	case "twice":
		return "", fmt.Errorf("tenants blue, red: %w", errdefs.ErrFailedPrecondition)
	}
	return "", errdefs.ErrNotFound
}

// TestGolden translates testdata/*.in; a first line "# tenant: NAME" is --tenant.
func TestGolden(t *testing.T) {
	files, err := filepath.Glob("testdata/*.in")
	if err != nil || len(files) == 0 {
		t.Fatalf("no files: %v", err)
	}
	for _, file := range files {
		t.Run(filepath.Base(file), func(t *testing.T) {
			b, err := os.ReadFile(file)
			if err != nil {
				t.Fatal(err)
			}
			tenant := ""
			if first, _, _ := strings.Cut(string(b), "\n"); strings.HasPrefix(first, "# tenant: ") {
				tenant = strings.TrimPrefix(first, "# tenant: ")
			}
			docs, err := Parse(filepath.Base(file), bytes.NewReader(b))
			if err != nil {
				t.Fatal(err)
			}
			results, err := Convert(docs, tenant, cluster{})
			if err != nil {
				t.Fatal(err)
			}
			var out bytes.Buffer
			if err := Print(&out, results); err != nil {
				t.Fatal(err)
			}
			golden := strings.TrimSuffix(file, ".in") + ".out"
			if *update {
				if err := os.WriteFile(golden, out.Bytes(), 0o644); err != nil {
					t.Fatal(err)
				}
			}
			want, err := os.ReadFile(golden)
			if err != nil {
				t.Fatal(err)
			}
			if !bytes.Equal(want, out.Bytes()) {
				t.Errorf("got\n%s\nwant\n%s", out.Bytes(), want)
			}
			// What comes out is not translated again.
			docs, err = Parse("again", bytes.NewReader(out.Bytes()))
			if err != nil {
				t.Fatal(err)
			}
			again, err := Convert(docs, "", cluster{})
			if err != nil {
				t.Fatal(err)
			}
			for _, r := range again {
				if r.Changed {
					t.Errorf("%s changes again: %v", r.Object, r.Notes)
				}
			}
		})
	}
}

func TestRefusals(t *testing.T) {
	for text, want := range map[string]string{
		"a: [":                                "x: ",
		"kind: Pod\nmetadata: {name: a}":      "no apiVersion",
		"apiVersion: v1\nmetadata: {name: a}": "no kind",
		"apiVersion: v1\nkind: Pod":           "without metadata.name",
		"apiVersion: v1\nkind: Pod\nkind: Pod\nmetadata: {name: a}": `key "kind" already set`,
		"apiVersion: v1\nkind: List\nitems: [a]":                    "items[0]",
		"- a":                                                       "cannot unmarshal",
		"{apiVersion: v1, kind: Network, metadata: {name: nn}}":     "spec.tenantID is empty; say whose it is with --tenant",
		"{apiVersion: v1, kind: Network, metadata: {name: nn}, spec: {tenantID: ffffffffffffffffffffffffffffffff}}": "h8s tenant create NAME --project-id ffffffffffffffffffffffffffffffff",
		"{apiVersion: v1, kind: Namespace, metadata: {name: nn}, spec: {network: none}}":                            "there is no such Network; apply it before or with this",
		"{apiVersion: v1, kind: Namespace, metadata: {name: nn}, spec: {network: twice}}":                           "tenants blue, red",
		"{apiVersion: v1, kind: Namespace, metadata: {name: nn}, spec: {network: 7}}":                               "spec.network 7: want the name of a Network",
		"{apiVersion: stackube.kubernetes.io/v1, kind: Network, metadata: {name: nn}}":                              "no metadata.namespace",
		"{apiVersion: apps/v1beta1, kind: Deployment, metadata: {name: nn}, spec: 1}":                               "spec.template: want an object",
	} {
		docs, err := Parse("x", strings.NewReader(text))
		if err == nil {
			_, err = Convert(docs, "", cluster{})
		}
		if err == nil || !strings.Contains(err.Error(), want) || !strings.HasPrefix(err.Error(), "x") {
			t.Errorf("%s: %v, want %q", text, err, want)
		}
	}
	if _, err := Parse("big", bytes.NewReader(make([]byte, maxBytes+1))); !errdefs.IsInvalidArgument(err) {
		t.Errorf("too big: %v", err)
	}
}

func TestParseForms(t *testing.T) {
	pod := func(n string) string {
		return `{"apiVersion":"v1","kind":"Pod","metadata":{"name":"` + n + `"}}`
	}
	for name, text := range map[string]string{
		"json stream":    pod("a") + pod("b"),
		"json lines":     pod("a") + "\n" + pod("b") + "\n",
		"yaml":           "---\n" + pod("a") + "\n--- # next\r\n" + pod("b") + "\n---\n# nothing\n---\n",
		"list":           `{apiVersion: v1, kind: List, items: [` + pod("a") + "," + pod("b") + `]}`,
		"separator last": pod("a") + "\n---\n" + pod("b") + "\n---",
	} {
		docs, err := Parse("x", strings.NewReader(text))
		if err != nil || len(docs) != 2 || docs[0].Object.Str("metadata", "name") != "a" || docs[1].Object.String() != "Pod b" {
			t.Errorf("%s: %v %v", name, docs, err)
		}
	}
}

func FuzzConvert(f *testing.F) {
	files, _ := filepath.Glob("testdata/*.in")
	for _, file := range files {
		b, err := os.ReadFile(file)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(b)
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		docs, err := Parse("x", bytes.NewReader(b))
		if err != nil {
			return
		}
		results, err := Convert(docs, "", cluster{})
		if err != nil {
			return
		}
		if err := Print(&bytes.Buffer{}, results); err != nil {
			t.Error(err)
		}
	})
}
