package hyperctl

import (
	"bytes"
	"errors"
	"flag"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/hypernetes/hypernetes/cluster/image"
)

var update = flag.Bool("update", false, "write the golden files")

func golden(t *testing.T, name, got string) {
	t.Helper()
	file := "testdata/" + name
	if *update {
		if err := os.WriteFile(file, []byte(got), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	if got != string(want) {
		t.Errorf("%s: got\n%swant\n%s", name, got, want)
	}
}

var (
	now  = time.Date(2026, 11, 21, 12, 0, 0, 0, time.UTC)
	rows = []podRow{
		{ID: strings.Repeat("a1", 32), Name: "web", Runtime: "hyper", Status: "running", IP: "10.0.0.7", Created: now.Add(-90 * time.Second),
			Containers: []containerRow{{Image: "docker.io/library/nginx:latest", Status: "running"}}},
		{ID: strings.Repeat("b2", 32), Name: "debian-0123456789", Status: "exited (137, OOMKilled)", Created: now.Add(-50 * time.Hour),
			Containers: []containerRow{{Image: "debian:12", Status: "exited"}, {Image: "x", Status: "exited"}}},
		{ID: strings.Repeat("c3", 32), Name: "empty", Status: "created", Created: now},
	}
)

func TestTables(t *testing.T) {
	var all, running, none, images, about bytes.Buffer
	shown, hidden := filterRows(rows, true)
	must(t, writePods(&all, shown, hidden, now))
	golden(t, "ps-a.txt", all.String())
	shown, hidden = filterRows(rows, false)
	must(t, writePods(&running, shown, hidden, now))
	golden(t, "ps.txt", running.String())
	must(t, writePods(&none, nil, 0, now))
	golden(t, "ps-none.txt", none.String())
	must(t, writeImages(&images, []image.Stored{{ID: "sha256:" + strings.Repeat("d", 64), Tags: []string{"docker.io/library/busybox:latest", "h8s.local/busybox:1"}, Size: 1659392}}))
	golden(t, "images.txt", images.String())
	must(t, writeInfo(&about, &nodeInfo{Node: "hyper", Socket: "/run/x.sock", Runtime: "containerd", Version: "v2", Handlers: []string{"hyper"},
		Conditions: map[string]string{"RuntimeReady": "ok"}, Pods: 2, Running: 1, Images: 3}))
	golden(t, "info.txt", about.String())
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func TestPodStatus(t *testing.T) {
	for want, tc := range map[string]struct {
		state      cri.PodSandboxState
		containers []containerRow
	}{
		"running":           {cri.PodSandboxState_SANDBOX_READY, []containerRow{{Status: "exited"}, {Status: "running"}}},
		"exited (3)":        {cri.PodSandboxState_SANDBOX_READY, []containerRow{{Status: "exited", ExitCode: 3}}},
		"exited (1, Error)": {cri.PodSandboxState_SANDBOX_NOTREADY, []containerRow{{Status: "exited", ExitCode: 1, Reason: "Error"}}},
		"created":           {cri.PodSandboxState_SANDBOX_READY, nil},
		"stopped":           {cri.PodSandboxState_SANDBOX_NOTREADY, nil},
	} {
		if got := podStatus(tc.state, tc.containers); got != want {
			t.Errorf("got %q, want %q", got, want)
		}
	}
}

func TestPick(t *testing.T) {
	list := []named{{"abc123", "web"}, {"abd456", "db"}, {"web999", "other"}, {"fff", "twin"}, {"ffe", "twin"}}
	for ref, want := range map[string]int{"abc123": 0, "abd": 1, "web": 0, "web9": 2, "other": 2, "fff": 3} {
		if got, err := pick("Pod", ref, list); err != nil || got != want {
			t.Errorf("%s: %d, %v; want %d", ref, got, err, want)
		}
	}
	for ref, want := range map[string]error{"zzz": errdefs.ErrNotFound, "ab": errdefs.ErrInvalidArgument, "twin": errdefs.ErrInvalidArgument, "": errdefs.ErrInvalidArgument} {
		if _, err := pick("Pod", ref, list); !errors.Is(err, want) {
			t.Errorf("%q: %v, want %v", ref, err, want)
		}
	}
}

func TestContainerOf(t *testing.T) {
	pod := &cri.PodSandbox{Id: "p", Metadata: &cri.PodSandboxMetadata{Name: "pod"}}
	all := []*cri.Container{
		{Id: "1", PodSandboxId: "p", Metadata: &cri.ContainerMetadata{Name: "a"}},
		{Id: "2", PodSandboxId: "p", Metadata: &cri.ContainerMetadata{Name: "b"}},
		{Id: "3", PodSandboxId: "q", Metadata: &cri.ContainerMetadata{Name: "a"}},
	}
	if c, err := containerOf(pod, all, "b"); err != nil || c.Id != "2" {
		t.Errorf("b: %v, %v", c, err)
	}
	if _, err := containerOf(pod, all, ""); err == nil || !strings.Contains(err.Error(), "a, b") {
		t.Errorf("several: %v", err)
	}
	if _, err := containerOf(pod, all, "z"); !errors.Is(err, errdefs.ErrNotFound) {
		t.Errorf("none: %v", err)
	}
}

func TestAge(t *testing.T) {
	for d, want := range map[time.Duration]string{-time.Second: "0s", 59 * time.Second: "59s", 61 * time.Minute: "1h", 47 * time.Hour: "47h", 72 * time.Hour: "3d"} {
		if got := age(d); got != want {
			t.Errorf("%s: %s, want %s", d, got, want)
		}
	}
}
