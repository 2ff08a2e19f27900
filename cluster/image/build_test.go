package image

import (
	"archive/tar"
	"bytes"
	"context"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/google/go-containerregistry/pkg/v1/tarball"
	"github.com/google/go-containerregistry/pkg/v1/validate"
)

func testBuilder(t *testing.T, texts ...string) *Builder {
	t.Helper()
	b := &Builder{Catalog: Catalog{}, Images: t.TempDir(), Cache: t.TempDir(), Files: t.TempDir()}
	for _, text := range texts {
		r, err := ParseRecipe("test", []byte(text))
		must(t, err)
		b.Catalog[r.Name] = r
	}
	return b
}

const baseRecipe = `
name: base
tags: [h8s.local/base:1, docker.io/library/base:latest]
files: [{path: /etc/passwd, content: "root:x:0:0::/:/bin/sh\n"}]
config: {cmd: [sh], env: [A=1], ports: ["80"]}
`

const topRecipe = `
name: top
base: base
tags: [h8s.local/top:1]
zips: [{path: /app.war, files: {index.html: hello, b/c.txt: c}}]
users: [{name: web, uid: 33, gid: 33}]
config: {entrypoint: [/serve], env: [B=2]}
`

func TestBuildIsReproducibleAndIdempotent(t *testing.T) {
	var digests []string
	for range 2 {
		b := testBuilder(t, baseRecipe, topRecipe)
		results, err := b.Build(context.Background(), "top")
		must(t, err)
		if len(results) != 2 || results[0].Name != "base" || results[0].Reused || results[1].Reused {
			t.Fatalf("first build: %+v", results)
		}
		digests = append(digests, results[1].Digest)
		results, err = b.Build(context.Background(), "top")
		must(t, err)
		if !results[0].Reused || !results[1].Reused {
			t.Errorf("second build: %+v", results)
		}
		b.Catalog["base"].Config.Cmd = []string{"changed"}
		results, err = b.Build(context.Background(), "top")
		must(t, err)
		if results[0].Reused || results[1].Reused {
			t.Errorf("build after a change of the base: %+v", results)
		}
		left, err := filepath.Glob(filepath.Join(b.Images, "*"))
		must(t, err)
		if len(left) != 2 {
			t.Errorf("files left: %v", left)
		}
	}
	if digests[0] != digests[1] {
		t.Errorf("equal recipes gave %v", digests)
	}
}

func TestBuiltImageIsValid(t *testing.T) {
	b := testBuilder(t, baseRecipe, topRecipe)
	_, err := b.Build(context.Background(), "top")
	must(t, err)
	img, err := tarball.ImageFromPath(filepath.Join(b.Images, "top.tar"), nil)
	must(t, err)
	must(t, validate.Image(img))
	cf, err := img.ConfigFile()
	must(t, err)
	if got := strings.Join(cf.Config.Env, " "); got != "A=1 B=2" {
		t.Errorf("env %q", got)
	}
	if len(cf.Config.Cmd) != 0 || strings.Join(cf.Config.Entrypoint, " ") != "/serve" {
		t.Errorf("entrypoint %v, cmd %v: a new entrypoint drops the base's command", cf.Config.Entrypoint, cf.Config.Cmd)
	}
	if _, ok := cf.Config.ExposedPorts["80/tcp"]; !ok {
		t.Errorf("ports %v", cf.Config.ExposedPorts)
	}
	layers, err := img.Layers()
	must(t, err)
	rc, err := layers[1].Uncompressed()
	must(t, err)
	defer rc.Close()
	var layer bytes.Buffer
	_, err = layer.ReadFrom(rc)
	must(t, err)
	if want := "0 0644 0:0 app.war\n0 0644 0:0 etc/group\n0 0644 0:0 etc/passwd\n"; listing(t, layer.Bytes()) != want {
		t.Errorf("layer:\n%swant:\n%s", listing(t, layer.Bytes()), want)
	}
	if !bytes.Contains(layer.Bytes(), []byte("root:x:0:0::/:/bin/sh\nweb:x:33:33:")) {
		t.Error("the base's accounts are not in /etc/passwd")
	}
	info, err := Inspect(filepath.Join(b.Images, "base.tar"))
	must(t, err)
	if len(info.Tags) != 2 || info.Key == "" || info.Digest == "" {
		t.Errorf("inspect: %+v", info)
	}
}

func TestBuildErrorsSayWhatToDo(t *testing.T) {
	for text, want := range map[string]string{
		"name: a\ntags: [h.l/a:1]\nprograms: [{path: /x, go: ./nothing}]":  "--source",
		"name: a\ntags: [h.l/a:1]\nprograms: [{path: /x, file: bin/none}]": "build it first",
		"name: a\ntags: [h.l/a:1]\ncopies: [{from: /x, to: /y}]":           "no such file",
	} {
		b := testBuilder(t, text)
		if _, err := b.Build(context.Background(), "a"); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: error %v, want one with %q", text, err, want)
		}
		if left, _ := filepath.Glob(filepath.Join(b.Images, "*")); len(left) != 0 {
			t.Errorf("left behind: %v", left)
		}
	}
}

func TestInspectRefuses(t *testing.T) {
	b := testBuilder(t, baseRecipe)
	_, err := b.Build(context.Background(), "base")
	must(t, err)
	whole, err := os.ReadFile(filepath.Join(b.Images, "base.tar"))
	must(t, err)
	file := filepath.Join(t.TempDir(), "x.tar")
	for name, tc := range map[string]struct {
		data []byte
		want string
	}{
		"empty":     {nil, "empty file"},
		"text":      {[]byte("this is not a tar file at all"), "not a complete tar"},
		"cut short": {whole[:len(whole)-2000], ""},
		"other tar": {makeTar(t, "README", "hi"), "neither index.json nor manifest.json"},
		"no blob":   {makeTar(t, "index.json", `{"manifests":[{"digest":"sha256:`+strings.Repeat("a", 64)+`"}]}`), "is missing"},
		"bad json":  {makeTar(t, "index.json", `{`), "index.json"},
		"no image":  {makeTar(t, "manifest.json", `[]`), "names no image"},
		"no layer":  {makeTar(t, "manifest.json", `[{"Config":"c","Layers":["../../etc/shadow"]}]`), "is missing"},
	} {
		must(t, os.WriteFile(file, tc.data, 0o600))
		if _, err := Inspect(file); !errors.Is(err, errdefs.ErrInvalidArgument) || !strings.Contains(err.Error(), tc.want) {
			t.Errorf("%s: %v; want an invalid argument with %q", name, err, tc.want)
		}
	}
	if _, err := Inspect(t.TempDir()); !errors.Is(err, errdefs.ErrInvalidArgument) {
		t.Errorf("a directory: %v", err)
	}
}

func makeTar(t *testing.T, name, content string) []byte {
	t.Helper()
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	must(t, writeMember(w, name, int64(len(content)), strings.NewReader(content)), w.Close())
	return b.Bytes()
}

func FuzzInspect(f *testing.F) {
	f.Add([]byte{})
	f.Add([]byte{0x1f, 0x8b, 8})
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	text := `{"manifests":[{"mediaType":"application/vnd.oci.image.manifest.v1+json","digest":"sha256:00"}]}`
	if err := errors.Join(writeMember(w, "index.json", int64(len(text)), strings.NewReader(text)), w.Close()); err != nil {
		f.Fatal(err)
	}
	f.Add(b.Bytes())
	f.Fuzz(func(t *testing.T, data []byte) {
		if info, err := inspect(bytes.NewReader(data)); err != nil && len(info.Tags) > 0 {
			t.Errorf("an error and tags: %v", info)
		}
	})
}

func TestParseSimulation(t *testing.T) {
	out := `NOTE: This is only a simulation!
Inst libc6 (2.36-9+deb12u14 Debian:12.15/oldstable [amd64]) [gcc-12-base:amd64 ]
Inst busybox (1:1.35.0-4+deb12u1+b1 Debian:12.15/oldstable [amd64])
Inst upgraded [1.0] (2.0 Debian:12 [all])
Conf libc6 (2.36-9+deb12u14 Debian:12.15/oldstable [amd64])
`
	var got []string
	for _, d := range parseSimulation([]byte(out), "/c") {
		got = append(got, d.file)
	}
	want := "/c/busybox_1%3a1.35.0-4+deb12u1+b1_amd64.deb /c/libc6_2.36-9+deb12u14_amd64.deb /c/upgraded_2.0_all.deb"
	if strings.Join(got, " ") != want {
		t.Errorf("got %v", got)
	}
}

func TestFindArchive(t *testing.T) {
	b := testBuilder(t, baseRecipe)
	_, err := b.Build(context.Background(), "base")
	must(t, err, os.WriteFile(filepath.Join(b.Images, "broken.tar"), []byte("x"), 0o600))
	for ref, want := range map[string]error{
		"base": nil, "docker.io/library/base:latest": nil, "h8s.local/base:1": nil,
		"base:2": errdefs.ErrNotFound, "other": errdefs.ErrNotFound, "Not An Image": errdefs.ErrInvalidArgument,
	} {
		if got, err := FindArchive(b.Images, ref); !errors.Is(err, want) || (want == nil && filepath.Base(got) != "base.tar") {
			t.Errorf("%s: %q, %v; want %v", ref, got, err, want)
		}
	}
}
