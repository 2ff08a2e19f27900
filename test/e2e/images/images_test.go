package images

import (
	"archive/tar"
	"crypto/md5" //nolint:gosec // to compare, not to protect
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-containerregistry/pkg/compression"
	v1 "github.com/google/go-containerregistry/pkg/v1"

	"github.com/hypernetes/hypernetes/test/e2e/testcluster"
)

func TestMain(m *testing.M) { testcluster.Main(m) }

// run starts a Pod that waits, on an image that is on the node, and returns its name.
func run(n *testcluster.Namespace, image string) string {
	const pod = "looker"
	n.Kubectl("run", pod, "--image="+image, "--image-pull-policy=Never", "--command", "--", "/testbox", "signals") // ends at once on SIGTERM
	n.Ready(pod)
	return pod
}

// load loads an image into the node for the time of a test.
func load(t *testing.T, c *testcluster.Cluster, tag, file string) {
	t.Helper()
	c.H8S(t, "image", "load", file)
	t.Cleanup(func() { remove(t, c, tag) })
	if list := c.H8S(t, "image", "list"); !strings.Contains(list, tag) {
		t.Errorf("h8s image list does not show %s:\n%s", tag, list)
	}
}

// lines returns what a shell script prints, line by line.
func lines(n *testcluster.Namespace, pod, script string) []string {
	return strings.Split(n.Shell(pod, script), "\n")
}

func want(t *testing.T, what string, got, expected any) {
	t.Helper()
	if got != expected {
		t.Errorf("%s: %v, want %v", what, got, expected)
	}
}

const manyLayers = 40

// difficult are the layers of an image in which one layer takes back what another said.
func difficult(t *testing.T) []v1.Layer {
	t.Helper()
	capability := "\x01\x00\x00\x02\x00\x20\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00" // cap_net_raw+ep
	layers := []v1.Layer{
		layer(t, compression.GZip,
			entry{name: "data/"},
			entry{name: "data/hard1", text: "one inode"},
			entry{name: "data/hard2", header: tar.Header{Typeflag: tar.TypeLink, Linkname: "data/hard1"}},
			entry{name: "data/hard3", header: tar.Header{Typeflag: tar.TypeLink, Linkname: "/data/hard1"}},
			entry{name: "data/sticky/", header: tar.Header{Mode: 0o1777}},
			entry{name: "data/setuid", text: "#!", header: tar.Header{Mode: 0o4755, Uid: 1234, Gid: 567890}},
			entry{name: "data/link", header: tar.Header{Typeflag: tar.TypeSymlink, Linkname: "hard1", Mode: 0o777}},
			entry{name: "data/fifo", header: tar.Header{Typeflag: tar.TypeFifo}},
			entry{name: "data/null", header: tar.Header{Typeflag: tar.TypeChar, Devmajor: 1, Devminor: 3, Mode: 0o666}},
			entry{name: "data/attributes", text: "x", header: tar.Header{PAXRecords: map[string]string{
				"SCHILY.xattr.user.colour": "blue", "SCHILY.xattr.security.capability": capability,
			}}},
			entry{name: "data/" + strings.Repeat("n", 254), text: "long"},
			entry{name: "data/ünï ço\tdé", text: "odd"},
			entry{name: "data/empty"},
			entry{name: "gone/"}, entry{name: "gone/file", text: "old"}, entry{name: "gone/keep", text: "kept"},
			entry{name: "gone/dir/"}, entry{name: "gone/dir/sub/"}, entry{name: "gone/dir/sub/file", text: "old"},
			entry{name: "opaque/"}, entry{name: "opaque/old", text: "old"}, entry{name: "opaque/sub/"}, entry{name: "opaque/sub/old", text: "old"},
			entry{name: "opaque/sub2/"}, entry{name: "opaque/sub2/old", text: "old"},
			entry{name: "becomes-dir", text: "file"}, entry{name: "becomes-file/"}, entry{name: "becomes-file/inner", text: "x"},
			entry{name: "reborn", text: "first life"},
		),
		layer(t, compression.ZStd,
			entry{name: "gone/"}, entry{name: "gone/.wh.file"}, entry{name: "gone/.wh.dir"},
			entry{name: "opaque/"}, entry{name: "opaque/.wh..wh..opq"}, entry{name: "opaque/new", text: "new"},
			entry{name: "opaque/sub2/"}, entry{name: "opaque/sub2/new", text: "new"},
			entry{name: "becomes-dir/"}, entry{name: "becomes-dir/inner", text: "x"}, entry{name: "becomes-file", text: "file"},
			entry{name: ".wh.reborn"},
			entry{name: "data/hard2", text: "another inode"},
		),
	}
	kinds := []compression.Compression{compression.None, compression.GZip, compression.ZStd}
	for i := range manyLayers {
		entries := []entry{
			{name: "last", text: fmt.Sprint(i)}, {name: "layers/"}, {name: fmt.Sprintf("layers/%02d", i), text: fmt.Sprint(i)},
		}
		if i%10 == 9 { // takes the one below back
			entries = append(entries, entry{name: fmt.Sprintf("layers/.wh.%02d", i-1)})
		}
		layers = append(layers, layer(t, kinds[i%3], entries...))
	}
	return append(layers, layer(t, compression.GZip, entry{name: "reborn", text: "second life"}))
}

func TestManyDifficultLayers(t *testing.T) {
	t.Parallel()
	c := testcluster.Up(t)
	const tag = "h8s.local/difficult:1"
	layers := difficult(t)
	load(t, c, tag, save(t, tag, onTestbox(t, c.Out, layers...), nil))
	n := c.Namespace(t)
	pod := run(n, tag)

	stat := map[string]string{}
	for _, line := range lines(n, pod, `cd /data; /testbox stat hard1 hard2 hard3 sticky setuid link fifo null attributes empty n*`) {
		name, rest, _ := strings.Cut(line, " ")
		stat[name] = rest
	}
	inode := func(s string) string { _, s, _ = strings.Cut(s, "inode="); s, _, _ = strings.Cut(s, " "); return s }
	want(t, "the hard links' inode", inode(stat["hard1"]), inode(stat["hard3"]))
	if inode(stat["hard2"]) == inode(stat["hard1"]) {
		t.Error("a hard link that was replaced still is one")
	}
	for name, part := range map[string]string{
		"hard1": "file 0644 0:0 links=3", "hard2": "file 0644 0:0 links=1",
		"sticky": "dir 1777 0:0", "setuid": "file 4755 1234:567890", "link": " to=hard1", "fifo": "fifo 0644",
		"null": "char 0666 0:0 links=1", "empty": "file 0644", strings.Repeat("n", 254): "file 0644",
		"attributes": `user.colour="blue"`,
	} {
		if !strings.Contains(stat[name], part) {
			t.Errorf("%.20s: %q, want %q", name, stat[name], part)
		}
	}
	if !strings.Contains(stat["null"], "device=1:3") || !strings.Contains(stat["attributes"], `security.capability="\x01\x00\x00\x02\x00 `) {
		t.Errorf("device %q, attributes %q", stat["null"], stat["attributes"])
	}
	for script, expected := range map[string]string{
		`cat /data/hard3 "/data/ünï ço	dé"`: "one inodeodd",
		`ls -A /gone`:                       "keep",
		`cd /opaque; find . | sort`:         ".\n./new\n./sub2\n./sub2/new",
		`cat /becomes-dir/inner`:            "x",
		`cat /becomes-file`:                 "file",
		`cat /reborn`:                       "second life",
		`cat /last`:                         fmt.Sprint(manyLayers - 1),
		`ls /layers | wc -l`:                fmt.Sprint(manyLayers - manyLayers/10),
		`ls -A / | grep -c '\.wh\.'; true`:  "0",
		`cat /layers/00 /layers/07 /layers/39; ls /layers/38 2>&1 | grep -c 'No such'`: "07391",
	} {
		want(t, script, n.Shell(pod, script), expected)
	}
	// What an image deletes can be made again, and its files changed, in the container.
	want(t, "writing", n.Shell(pod, `echo -n new > /gone/file; echo -n more >> /data/hard1; rm -r /opaque/sub2; mkdir /gone/dir; cat /gone/file /data/hard1; ls /opaque /gone/dir`),
		"newone inodemore/gone/dir:\n\n/opaque:\nnew")
}

// TestBigImage reads every byte of an image of more than 200 MB in a VM that has less
// memory than that.
func TestBigImage(t *testing.T) {
	t.Parallel()
	c := testcluster.Up(t)
	const tag, files, size = "h8s.local/big:1", 10, 22 << 20
	sum := md5.New() //nolint:gosec
	layers := make([]v1.Layer, 2)
	for i := range layers {
		var entries []entry
		for k := range files / len(layers) {
			content := noise(byte(i*files+k), size)
			_, _ = sum.Write(content)
			entries = append(entries, entry{name: fmt.Sprintf("big/%d%d", i, k), text: string(content)})
		}
		layers[i] = layer(t, compression.None, entries...)
	}
	load(t, c, tag, save(t, tag, onTestbox(t, c.Out, layers...), nil))
	n := c.Namespace(t)
	n.Kubectl("run", "big", "--image="+tag, "--image-pull-policy=Never", "--restart=Never",
		`--overrides={"spec":{"containers":[{"name":"big","image":"`+tag+`","command":["sh","-c","cat /big/* | md5sum"],"resources":{"limits":{"memory":"128Mi"}}}]}}`)
	want(t, "exit code", n.Ended("big", "big").ExitCode, 0)
	want(t, "checksum of everything", strings.TrimSuffix(strings.TrimSpace(n.Logs("big")), "  -"), fmt.Sprintf("%x", sum.Sum(nil)))
}

// TestImagesThatCameAlong pulls by names that imply imagePullPolicy Always.
func TestImagesThatCameAlong(t *testing.T) {
	t.Parallel()
	n := testcluster.Up(t).Namespace(t)
	n.Kubectl("run", "web", "--image=nginx")
	n.Kubectl("run", "nowhere", "--image=h8s.local/nowhere")
	n.Ready("web")
	want(t, "policy", n.Get("pod/web", ".spec.containers[0].imagePullPolicy"), "Always")
	n.Wait("pod/nowhere", "jsonpath={.status.containerStatuses[0].state.waiting.reason}=ErrImagePull")
	if message := n.Get("pod/nowhere", ".status.containerStatuses[0].state.waiting.message"); !strings.Contains(message, "h8s.local/nowhere:latest: not found") {
		t.Errorf("an image that does not exist: %s", message)
	}
}

// remove removes an image and waits until its layers have gone from the disk.
func remove(t *testing.T, c *testcluster.Cluster, tag string) {
	t.Helper()
	if list := c.H8S(t, "image", "rm", tag); !strings.Contains(list, "removed "+tag) {
		t.Errorf("h8s image rm says %q", list)
	}
	if list := c.H8S(t, "image", "list"); strings.Contains(list, tag) {
		t.Errorf("%s is still listed:\n%s", tag, list)
	}
}

// TestBrokenImages loads archives that lie; each is refused in one line, and the node
// keeps nothing of it.
func TestBrokenImages(t *testing.T) {
	t.Parallel()
	c := testcluster.Up(t)
	fine := layer(t, compression.GZip, entry{name: "file", text: "content"})
	digest, err := fine.Digest()
	if err != nil {
		t.Fatal(err)
	}
	outside := filepath.Join(t.TempDir(), "outside")
	for what, tc := range map[string]struct {
		layer v1.Layer
		edit  func(string, []byte) []byte
		says  string
	}{
		"another content than its digest says": {layer: fine, says: digest.Hex, edit: func(d string, b []byte) []byte {
			if d == digest.String() {
				b[len(b)/2] ^= 1
			}
			return b
		}},
		"no tar":          {layer: layerOf(t, compression.None, []byte(strings.Repeat("this is no tar. ", 100))), says: "invalid tar header"},
		"cut short":       {layer: layerOf(t, compression.None, tarOf(t, entry{name: "file", text: strings.Repeat("x", 4096)})[:1024]), says: "unexpected EOF"},
		"a name too long": {layer: layer(t, compression.GZip, entry{name: strings.Repeat("n", 255)}), says: "at most 254 bytes"},
		"a way out":       {layer: layer(t, compression.GZip, entry{name: "../../../../../../.." + outside, text: "out"}), says: ""},
		"a link that is":  {layer: layer(t, compression.GZip, entry{name: "way", header: tar.Header{Typeflag: tar.TypeSymlink, Linkname: filepath.Dir(outside)}}, entry{name: "way/outside", text: "out"}), says: ""},
	} {
		t.Run(what, func(t *testing.T) {
			tag := "h8s.local/broken:1"
			out, err := c.TryH8S("image", "load", save(t, tag, onTestbox(t, c.Out, tc.layer), tc.edit))
			if _, statErr := os.Lstat(outside); statErr == nil {
				t.Fatalf("the layer wrote %s", outside)
			}
			if tc.says == "" {
				if err == nil {
					remove(t, c, tag)
				}
				return
			}
			if err == nil || !strings.Contains(out, tc.says) || strings.Count(strings.TrimSpace(out), "\n") > 1 {
				t.Errorf("h8s image load: %v, want a line with %q and one of advice:\n%s", err, tc.says, out)
			}
			if list := c.H8S(t, "image", "list"); strings.Contains(list, "broken") {
				t.Errorf("the broken image is listed:\n%s", list)
			}
		})
	}
	t.Run("no archive", func(t *testing.T) {
		file := filepath.Join(t.TempDir(), "x.tar")
		if err := os.WriteFile(file, []byte("no"), 0o600); err != nil {
			t.Fatal(err)
		}
		if out, err := c.TryH8S("image", "load", file); err == nil || !strings.Contains(out, "not a complete tar") {
			t.Errorf("%v %s", err, out)
		}
	})
}

// tarOf is the tar of a layer.
func tarOf(t *testing.T, entries ...entry) []byte {
	t.Helper()
	r, err := layer(t, compression.None, entries...).Uncompressed()
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	b, err := io.ReadAll(r)
	if err != nil {
		t.Fatal(err)
	}
	return b
}
