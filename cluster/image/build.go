package image

import (
	"context"
	"crypto/sha256"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"sort"
	"strings"
	"time"

	"github.com/containerd/errdefs"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/tarball"
	"github.com/google/go-containerregistry/pkg/v1/types"
)

// builderVersion is part of every image's key: raise it when the builder
// makes different bytes from the same recipe.
const builderVersion = "3"

// Builder turns recipes into archives. One Build at a time per Builder.
type Builder struct {
	// Catalog holds the recipes, bases included.
	Catalog Catalog
	// Images is the directory the archives go to.
	Images string
	// Cache keeps downloaded packages and compiled programs.
	Cache string
	// Source is the root of this repository, needed by recipes with Go
	// programs; empty when there is none.
	Source string
	// Files is the directory that relative Program.File paths start from.
	Files string
	// Force builds even when the archive is up to date.
	Force bool
	// Progress, if set, is told of every image that is finished.
	Progress func(Result)
}

// Result says what became of one recipe.
type Result struct {
	Name   string
	File   string
	Size   int64 // bytes of the archive
	Digest string
	Tags   []string
	Reused bool // the archive was up to date
	Took   time.Duration
}

// Build builds the named recipes and the bases they need, bases first. It
// stops at the first error; archives finished until then stay.
func (b *Builder) Build(ctx context.Context, names ...string) ([]Result, error) {
	order, err := b.Catalog.order(names)
	if err != nil {
		return nil, err
	}
	if err := os.MkdirAll(b.Images, 0o755); err != nil {
		return nil, fmt.Errorf("image directory: %w", err)
	}
	if err := os.MkdirAll(b.Cache, 0o755); err != nil {
		return nil, fmt.Errorf("image cache: %w", err)
	}
	var results []Result
	keys := map[string]string{}
	for _, r := range order {
		res, err := b.build(ctx, r, keys)
		if err != nil {
			return results, fmt.Errorf("image %s: %w", r.Name, err)
		}
		results = append(results, res)
		if b.Progress != nil {
			b.Progress(res)
		}
	}
	return results, nil
}

func (b *Builder) build(ctx context.Context, r *Recipe, keys map[string]string) (Result, error) {
	start := time.Now()
	res := Result{Name: r.Name, File: filepath.Join(b.Images, r.Name+".tar"), Tags: r.Tags}
	programs, err := b.programs(ctx, r)
	if err != nil {
		return res, err
	}
	key, err := recipeKey(r, keys[r.Base], programs)
	if err != nil {
		return res, err
	}
	keys[r.Name] = key
	if old, err := Inspect(res.File); err == nil && old.Key == key && !b.Force {
		res.Reused = true
	} else if err := b.write(ctx, r, key, programs, res.File); err != nil {
		return res, err
	}
	info, err := Inspect(res.File)
	if err != nil {
		return res, err
	}
	res.Digest, res.Size, res.Took = info.Digest, info.Size, time.Since(start)
	return res, nil
}

// programs compiles or finds every executable; the result is by image path.
func (b *Builder) programs(ctx context.Context, r *Recipe) (map[string]string, error) {
	out := map[string]string{}
	for _, p := range r.Programs {
		if p.Go != "" {
			bin, err := b.compile(ctx, r.Name, p)
			if err != nil {
				return nil, err
			}
			out[p.Path] = bin
			continue
		}
		file := p.File
		if !filepath.IsAbs(file) {
			file = filepath.Join(b.Files, file)
		}
		if _, err := os.Stat(file); err != nil {
			return nil, fmt.Errorf("program %s: %w; build it first (`make`)", p.Path, err)
		}
		out[p.Path] = file
	}
	return out, nil
}

func (b *Builder) compile(ctx context.Context, recipe string, p Program) (string, error) {
	if _, err := os.Stat(filepath.Join(b.Source, p.Go)); err != nil || b.Source == "" {
		return "", fmt.Errorf("program %s: Go package %s is not here; run inside the source tree or give --source: %w", p.Path, p.Go, errdefs.ErrNotFound)
	}
	bin := filepath.Join(b.Cache, "programs", recipe+"-"+filepath.Base(p.Path))
	cmd := exec.CommandContext(ctx, "go", "build", "-trimpath", "-buildvcs=false", "-ldflags=-s -w", "-o", bin, p.Go)
	cmd.Dir = b.Source
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0", "GOFLAGS=")
	if out, err := cmd.CombinedOutput(); err != nil {
		return "", fmt.Errorf("program %s: go build %s: %w: %s", p.Path, p.Go, err, strings.TrimSpace(string(out)))
	}
	return bin, nil
}

// recipeKey identifies what an image is made of: the recipe, its base and
// the programs' bytes. Newer Debian packages alone do not change it; Force
// (`--force`) takes those in.
func recipeKey(r *Recipe, base string, programs map[string]string) (string, error) {
	text, err := json.Marshal(r)
	if err != nil {
		return "", fmt.Errorf("encode recipe: %w", err)
	}
	h := sha256.New()
	fmt.Fprintf(h, "%s\n%s\n%s\n", builderVersion, base, text)
	paths := make([]string, 0, len(programs))
	for p := range programs {
		paths = append(paths, p)
	}
	sort.Strings(paths)
	for _, p := range paths {
		f, err := os.Open(programs[p])
		if err != nil {
			return "", fmt.Errorf("program %s: %w", p, err)
		}
		fmt.Fprintf(h, "%s\n", p)
		_, err = io.Copy(h, f)
		f.Close()
		if err != nil {
			return "", fmt.Errorf("program %s: %w", p, err)
		}
	}
	return fmt.Sprintf("%x", h.Sum(nil)), nil
}

// write assembles the image and moves it into place in one step.
func (b *Builder) write(ctx context.Context, r *Recipe, key string, programs map[string]string, file string) error {
	img, below, err := b.base(r)
	if err != nil {
		return err
	}
	if below != nil {
		defer below.close()
	}
	t, err := newTree(b.Cache)
	if err != nil {
		return err
	}
	defer t.close()
	a := &assembly{recipe: r, tree: t, below: below, archive: &archive{dir: b.Cache}, spill: b.Cache}
	if err := a.run(ctx, programs); err != nil {
		return err
	}
	layerFile := file + ".layer"
	defer os.Remove(layerFile)
	if err := writeLayer(layerFile, t, below); err != nil {
		return err
	}
	if img, err = finish(img, r, layerFile); err != nil {
		return err
	}
	return writeArchive(file, img, r.Tags, key)
}

// base returns the base image and its tree, or an empty image and nil.
func (b *Builder) base(r *Recipe) (v1.Image, *tree, error) {
	if r.Base == "" {
		img := mutate.MediaType(empty.Image, types.OCIManifestSchema1)
		return mutate.ConfigMediaType(img, types.OCIConfigJSON), nil, nil
	}
	img, err := tarball.ImageFromPath(filepath.Join(b.Images, r.Base+".tar"), nil)
	if err != nil {
		return nil, nil, fmt.Errorf("base %s: %w", r.Base, err)
	}
	layers, err := img.Layers()
	if err != nil {
		return nil, nil, fmt.Errorf("base %s: %w", r.Base, err)
	}
	t, err := newTree(b.Cache)
	if err != nil {
		return nil, nil, err
	}
	next := mutate.ConfigMediaType(mutate.MediaType(empty.Image, types.OCIManifestSchema1), types.OCIConfigJSON)
	for _, l := range layers {
		rc, err := l.Uncompressed()
		if err == nil {
			err = t.readTar(rc, true)
			rc.Close()
		}
		if err == nil {
			next, err = mutate.Append(next, mutate.Addendum{Layer: l, MediaType: types.OCILayer})
		}
		if err != nil {
			t.close()
			return nil, nil, fmt.Errorf("base %s: %w", r.Base, err)
		}
	}
	cf, err := img.ConfigFile()
	if err == nil {
		next, err = mutate.Config(next, cf.Config)
	}
	if err != nil {
		t.close()
		return nil, nil, fmt.Errorf("base %s: %w", r.Base, err)
	}
	return next, t, nil
}

func writeLayer(file string, t, below *tree) error {
	f, err := os.Create(file)
	if err != nil {
		return fmt.Errorf("layer: %w", err)
	}
	if err := t.writeTar(f, below); err != nil {
		f.Close()
		return err
	}
	return f.Close()
}

// finish adds the layer and the recipe's configuration to the base.
func finish(img v1.Image, r *Recipe, layerFile string) (v1.Image, error) {
	layer, err := tarball.LayerFromFile(layerFile, tarball.WithMediaType(types.OCILayer))
	if err != nil {
		return nil, fmt.Errorf("layer: %w", err)
	}
	img, err = mutate.Append(img, mutate.Addendum{Layer: layer, MediaType: types.OCILayer,
		History: v1.History{CreatedBy: "h8s image build " + r.Name, Created: v1.Time{Time: epoch}}})
	if err != nil {
		return nil, fmt.Errorf("append layer: %w", err)
	}
	cf, err := img.ConfigFile()
	if err != nil {
		return nil, fmt.Errorf("image configuration: %w", err)
	}
	cf = cf.DeepCopy()
	cf.Architecture, cf.OS, cf.Created = "amd64", "linux", v1.Time{Time: epoch}
	r.Config.apply(&cf.Config)
	img, err = mutate.ConfigFile(img, cf)
	if err != nil {
		return nil, fmt.Errorf("image configuration: %w", err)
	}
	return img, nil
}

// apply lays the recipe's configuration over the base's. As with a
// Dockerfile, a new entrypoint drops the base's command.
func (c Config) apply(to *v1.Config) {
	if c.Entrypoint != nil {
		to.Entrypoint, to.Cmd = c.Entrypoint, nil
	}
	if c.Cmd != nil {
		to.Cmd = c.Cmd
	}
	to.Env = append(to.Env, c.Env...)
	if c.User != "" {
		to.User = c.User
	}
	if c.WorkingDir != "" {
		to.WorkingDir = c.WorkingDir
	}
	if c.StopSignal != "" {
		to.StopSignal = c.StopSignal
	}
	for _, p := range c.Ports {
		if to.ExposedPorts == nil {
			to.ExposedPorts = map[string]struct{}{}
		}
		if !strings.Contains(p, "/") {
			p += "/tcp"
		}
		to.ExposedPorts[p] = struct{}{}
	}
	for _, v := range c.Volumes {
		if to.Volumes == nil {
			to.Volumes = map[string]struct{}{}
		}
		to.Volumes[v] = struct{}{}
	}
	for k, v := range c.Labels {
		if to.Labels == nil {
			to.Labels = map[string]string{}
		}
		to.Labels[k] = v
	}
}
