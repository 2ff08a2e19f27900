package image

import (
	"bytes"
	"context"
	"fmt"
	"os/exec"
	"path/filepath"
	"slices"
	"sort"
	"strings"
	"time"
	"unicode"

	"github.com/containerd/errdefs"
	"github.com/google/go-containerregistry/pkg/name"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// Store is the image store of one containerd, in the namespace that kubelet
// and hyperctl see. Safe for concurrent use.
type Store struct {
	// Socket is containerd's socket as seen from this process.
	Socket string
	// Containerd is the containerd executable, which is also its client
	// `ctr` when called by that name.
	Containerd string
	// Snapshotter unpacks what is loaded; empty leaves it to containerd.
	Snapshotter string
}

// Stored is one image of a store.
type Stored struct {
	ID     string   `json:"id"`
	Tags   []string `json:"tags"`
	Size   uint64   `json:"size"` // bytes, compressed layers
	Pinned bool     `json:"pinned,omitempty"`
}

// Load checks the archive and imports it. Images are pinned: nothing could
// bring them back after kubelet's garbage collection took them.
func (s Store) Load(ctx context.Context, file string) (Info, error) {
	info, err := Inspect(file)
	if err != nil {
		return Info{}, err
	}
	if len(info.Tags) == 0 {
		return Info{}, fmt.Errorf("image archive %s: it names no image; save it with a tag: %w", file, errdefs.ErrInvalidArgument)
	}
	abs, err := filepath.Abs(file)
	if err != nil {
		return Info{}, fmt.Errorf("image archive: %w", err)
	}
	args := []string{"--address", s.Socket, "--namespace", "k8s.io", "images", "import", "--label", "io.cri-containerd.pinned=pinned"}
	if s.Snapshotter != "" {
		args = append(args, "--snapshotter", s.Snapshotter)
	}
	cmd := exec.CommandContext(ctx, s.Containerd, append(args, abs)...)
	cmd.Args[0] = "ctr"
	var out bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &out
	if err := cmd.Run(); err != nil {
		return Info{}, fmt.Errorf("load %s: %s", file, reason(out.String()))
	}
	return info, s.await(ctx, info)
}

// visibleTimeout bounds how long the runtime takes to learn of an image.
const visibleTimeout = 20 * time.Second

// await waits until Pods can use what was imported: the runtime's own index of images
// follows containerd's by events.
func (s Store) await(ctx context.Context, info Info) error {
	client, done, err := s.client()
	if err != nil {
		return err
	}
	defer done()
	ctx, cancel := context.WithTimeout(ctx, visibleTimeout)
	defer cancel()
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	for _, tag := range info.Tags {
		for {
			st, err := client.ImageStatus(ctx, &runtimeapi.ImageStatusRequest{Image: &runtimeapi.ImageSpec{Image: tag}})
			if err == nil && st.Image != nil {
				break
			}
			select {
			case <-tick.C:
			case <-ctx.Done():
				if err != nil {
					return s.explain("load "+info.File, err)
				}
				return fmt.Errorf("load %s: the image is there, but not as %q; save it with its full name: %w", info.File, tag, errdefs.ErrInvalidArgument)
			}
		}
	}
	return nil
}

// reason is what ctr says last, in one line and without what a terminal would take for
// commands: parts of it may come from the image.
func reason(output string) string {
	if i := strings.LastIndex(output, "ctr: "); i >= 0 {
		output = output[i+len("ctr: "):]
	}
	words := strings.FieldsFunc(output, func(r rune) bool { return unicode.IsSpace(r) || !unicode.IsPrint(r) })
	return strings.Join(words, " ")
}

// List returns the images, sorted by first tag.
func (s Store) List(ctx context.Context) ([]Stored, error) {
	client, done, err := s.client()
	if err != nil {
		return nil, err
	}
	defer done()
	resp, err := client.ListImages(ctx, &runtimeapi.ListImagesRequest{})
	if err != nil {
		return nil, s.explain("list images", err)
	}
	out := make([]Stored, 0, len(resp.Images))
	for _, i := range resp.Images {
		tags := i.RepoTags
		if len(tags) == 0 {
			tags = i.RepoDigests
		}
		out = append(out, Stored{ID: i.Id, Tags: tags, Size: i.Size, Pinned: i.Pinned})
	}
	sort.Slice(out, func(i, j int) bool { return strings.Join(out[i].Tags, " ") < strings.Join(out[j].Tags, " ") })
	return out, nil
}

// Remove deletes an image with all its tags. Unknown images are an error.
func (s Store) Remove(ctx context.Context, ref string) error {
	client, done, err := s.client()
	if err != nil {
		return err
	}
	defer done()
	spec := &runtimeapi.ImageSpec{Image: ref}
	st, err := client.ImageStatus(ctx, &runtimeapi.ImageStatusRequest{Image: spec})
	if err != nil {
		return s.explain("remove image", err)
	}
	if st.Image == nil {
		return fmt.Errorf("image %q: not on this node; `h8s image list` shows what is: %w", ref, errdefs.ErrNotFound)
	}
	if _, err := client.RemoveImage(ctx, &runtimeapi.RemoveImageRequest{Image: spec}); err != nil {
		return s.explain("remove image "+ref, err)
	}
	return nil
}

func (s Store) client() (runtimeapi.ImageServiceClient, func(), error) {
	conn, err := grpc.NewClient("unix://"+s.Socket, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		return nil, nil, fmt.Errorf("containerd socket %s: %w", s.Socket, err)
	}
	return runtimeapi.NewImageServiceClient(conn), func() { _ = conn.Close() }, nil
}

func (s Store) explain(what string, err error) error {
	if status.Code(err) == codes.Unavailable {
		return fmt.Errorf("%s: no containerd at %s; start the node with `h8s up`: %w", what, s.Socket, errdefs.ErrUnavailable)
	}
	return fmt.Errorf("%s: %s", what, status.Convert(err).Message())
}

// FindArchive looks in dir for an archive that carries the image ref, spelt in
// any way users may. It fails with errdefs.ErrNotFound if there is none; files
// that are not image archives are passed over.
func FindArchive(dir, ref string) (string, error) {
	parsed, err := name.ParseReference(ref)
	if err != nil {
		return "", fmt.Errorf("image %q: %w: %w", ref, err, errdefs.ErrInvalidArgument)
	}
	full := parsed.Name()
	if rest, ok := strings.CutPrefix(full, name.DefaultRegistry+"/"); ok {
		full = "docker.io/" + rest
	}
	files, err := filepath.Glob(filepath.Join(dir, "*.tar"))
	if err != nil {
		return "", fmt.Errorf("image directory: %w", err)
	}
	for _, f := range files {
		if info, err := Inspect(f); err == nil && slices.Contains(info.Tags, full) {
			return f, nil
		}
	}
	return "", fmt.Errorf("image %s: no archive in %s has it: %w", full, dir, errdefs.ErrNotFound)
}
