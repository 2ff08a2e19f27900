package image

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"

	"github.com/containerd/errdefs"

	"github.com/hypernetes/hypernetes/guest/kernel"
)

// Kernel describes a variant that is in the cache; it is also out/share/kernel.json.
type Kernel struct {
	// Variant is "stock" or "hyper".
	Variant string `json:"variant"`
	// Release is what uname -r says in the guest; Package is where it came from.
	Release string `json:"release"`
	Package string `json:"package"`
	// Modules tells whether the initramfs carries modules to load.
	Modules bool `json:"modules"`
	// Cmdline is what this kernel wants on its command line, whatever the machine.
	Cmdline string `json:"cmdline"`

	dir string
}

// Debian's kernel enables host-wide policies a Pod's VM has no use for.
const (
	stockCmdline = "apparmor=0 audit=0"
	hyperCmdline = ""
)

func (k Kernel) modulesDir() string { return filepath.Join(k.dir, "modules") }

func loadKernel(dir string) (Kernel, error) {
	b, err := os.ReadFile(filepath.Join(dir, "kernel.json"))
	if err != nil {
		return Kernel{}, err
	}
	k := Kernel{dir: dir}
	if err := json.Unmarshal(b, &k); err != nil {
		return Kernel{}, fmt.Errorf("%s: %w", dir, err)
	}
	return k, nil
}

// save makes dir the home of k, last: a directory without kernel.json is unfinished.
func (k Kernel) save(dir string) error {
	b, err := json.MarshalIndent(k, "", "  ")
	if err != nil {
		return err
	}
	return writeFile(filepath.Join(dir, "kernel.json"), append(b, '\n'), 0o644)
}

// stock returns Debian's current cloud kernel, downloading and unpacking it when the
// cache does not have it. Without a network the newest cached one is used.
func (b *builder) stock(ctx context.Context) (Kernel, error) {
	p, err := b.stockPackage(ctx)
	if err != nil {
		return b.cachedStock(err)
	}
	dir := filepath.Join(b.Cache, "stock", p.name+"_"+p.version)
	if k, err := loadKernel(dir); err == nil {
		return k, nil
	}
	b.say("fetching Debian's kernel %s", p)
	tmp, err := unpack(ctx, b.Cache, p)
	if err != nil {
		return b.cachedStock(err)
	}
	defer os.RemoveAll(tmp)
	release := strings.TrimPrefix(p.name, "linux-image-")
	if err := installStock(tmp, dir, release); err != nil {
		return Kernel{}, fmt.Errorf("kernel of %s: %w", p, err)
	}
	k := Kernel{Variant: "stock", Release: release, Package: p.String(), Modules: true, Cmdline: stockCmdline, dir: dir}
	return k, k.save(dir)
}

func (b *builder) stockPackage(ctx context.Context) (pkg, error) {
	meta, depends, err := b.candidate(ctx, "linux-image-cloud-amd64")
	if err != nil {
		return pkg{}, err
	}
	name := firstDependency(depends, "linux-image-")
	if name == "" {
		return pkg{}, fmt.Errorf("package %s depends on no linux-image: %w", meta, errdefs.ErrNotFound)
	}
	p, _, err := b.candidate(ctx, name)
	return p, err
}

func (b *builder) cachedStock(cause error) (Kernel, error) {
	dirs, err := filepath.Glob(filepath.Join(b.Cache, "stock", "*", "kernel.json"))
	if err != nil || len(dirs) == 0 {
		return Kernel{}, cause
	}
	b.say("using the cached kernel: %v", cause)
	return loadKernel(filepath.Dir(dirs[len(dirs)-1]))
}

func installStock(tree, dir, release string) error {
	bz, err := os.ReadFile(filepath.Join(tree, "boot", "vmlinuz-"+release))
	if err != nil {
		return err
	}
	vmlinux, err := ExtractVmlinux(bz)
	if err != nil {
		return err
	}
	if pvh, err := HasPVH(vmlinux); err != nil {
		return err
	} else if !pvh {
		vmlinux = bz // QEMU then decompresses it in the guest: slower, but it boots
	}
	from := filepath.Join(tree, "lib", "modules", release)
	mods, builtin, err := ScanModules(from)
	if err != nil {
		return err
	}
	order, err := LoadOrder(mods, builtin, ReadModuleList(kernel.StockModules))
	if err != nil {
		return err
	}
	if err := os.RemoveAll(dir); err != nil {
		return err
	}
	var list strings.Builder
	for _, m := range order {
		data, err := os.ReadFile(filepath.Join(from, m.Path))
		if err != nil {
			return err
		}
		if err := writeFile(filepath.Join(dir, "modules", m.Path), data, 0o644); err != nil {
			return err
		}
		list.WriteString(m.Path + "\n")
	}
	if err := writeFile(filepath.Join(dir, "modules", "order"), []byte(list.String()), 0o644); err != nil {
		return err
	}
	return writeFile(filepath.Join(dir, "vmlinux"), vmlinux, 0o644)
}

// hyper returns HyperKernel. It is compiled (ten minutes and more on two cores) only if
// the cache does not have it for this source, configuration and compiler; with
// cachedOnly an absent one is errdefs.ErrNotFound.
func (b *builder) hyper(ctx context.Context, cachedOnly bool) (Kernel, error) {
	p, _, err := b.candidate(ctx, "linux-source-6.1")
	if err != nil {
		return Kernel{}, err
	}
	gcc, err := command(ctx, "", "gcc", "-dumpfullversion", "-dumpversion")
	if err != nil && !cachedOnly {
		return Kernel{}, fmt.Errorf("compiler: %w: install %s", err, strings.Join(hyperTools, " "))
	}
	h := sha256.Sum256(fmt.Appendf(nil, "%s\n%s\n%s", p.version, gcc, kernel.Config))
	dir := filepath.Join(b.Cache, "hyper", hex.EncodeToString(h[:8]))
	if k, err := loadKernel(dir); err == nil {
		return k, nil
	}
	if cachedOnly {
		return Kernel{}, fmt.Errorf("hyperkernel of %s: %w in %s", p, errdefs.ErrNotFound, b.Cache)
	}
	if err := b.compile(ctx, p, dir); err != nil {
		return Kernel{}, fmt.Errorf("build hyperkernel of %s: %w", p, err)
	}
	return loadKernel(dir)
}

// hyperTools are the Debian packages a kernel build needs.
var hyperTools = []string{"gcc", "make", "flex", "bison", "bc", "lz4", "libelf-dev", "libc6-dev", "xz-utils"}

func (b *builder) compile(ctx context.Context, p pkg, dir string) error {
	for _, tool := range []string{"make", "flex", "bison", "bc", "lz4", "xz"} {
		if _, err := exec.LookPath(tool); err != nil {
			return fmt.Errorf("%s: %w: install the Debian packages %s", tool, errdefs.ErrNotFound, strings.Join(hyperTools, " "))
		}
	}
	src, err := b.kernelSource(ctx, p)
	if err != nil {
		return err
	}
	work := dir + ".build"
	fragment := filepath.Join(work, "hyperkernel.config")
	if err := writeFile(fragment, kernel.Config, 0o644); err != nil {
		return err
	}
	objects := filepath.Join(work, "objects")
	if err := os.MkdirAll(objects, 0o755); err != nil {
		return err
	}
	mk := func(args ...string) error {
		args = append([]string{"-n", "19", "make", "-s", "-C", src, "O=" + objects, fmt.Sprintf("-j%d", b.jobs()), "KBUILD_BUILD_USER=h8s",
			"KBUILD_BUILD_HOST=h8s", "KCONFIG_ALLCONFIG=" + fragment}, args...)
		_, err := command(ctx, "", "nice", args...)
		return err
	}
	if err := mk("allnoconfig"); err != nil {
		return err
	}
	config, err := os.ReadFile(filepath.Join(objects, ".config"))
	if err != nil {
		return err
	}
	if missing := MissingOptions(string(kernel.Config), string(config)); len(missing) > 0 {
		return fmt.Errorf("options that Kconfig did not accept: %s: %w", strings.Join(missing, " "), errdefs.ErrInvalidArgument)
	}
	b.say("compiling HyperKernel from %s (ten minutes and more on two cores, once)", p)
	if err := mk("vmlinux", "bzImage"); err != nil {
		return err
	}
	if err := installHyper(ctx, objects, dir, p); err != nil {
		return err
	}
	return errors.Join(os.RemoveAll(work), os.RemoveAll(filepath.Dir(src))) // gigabytes nobody needs again
}

// kernelSource unpacks the source into the cache unless an interrupted build left it
// there, and returns its directory.
func (b *builder) kernelSource(ctx context.Context, p pkg) (string, error) {
	home := filepath.Join(b.Cache, "hyper", "source-"+p.version)
	src, done := filepath.Join(home, "linux-source-6.1"), filepath.Join(home, "unpacked")
	if _, err := os.Stat(done); err == nil {
		return src, nil
	}
	b.say("unpacking %s", p)
	tarball := "/usr/src/linux-source-6.1.tar.xz"
	installed, err := command(ctx, "", "dpkg-query", "-W", "-f", "${Version}", p.name)
	if err != nil || string(installed) != p.version {
		tmp, err := unpack(ctx, b.Cache, p)
		if err != nil {
			return "", err
		}
		defer os.RemoveAll(tmp)
		tarball = filepath.Join(tmp, tarball)
	}
	if err := errors.Join(os.RemoveAll(home), os.MkdirAll(home, 0o755)); err != nil {
		return "", err
	}
	if _, err := command(ctx, home, "nice", "-n", "19", "tar", "-xJf", tarball); err != nil {
		return "", err
	}
	return src, writeFile(done, nil, 0o644)
}

func installHyper(ctx context.Context, objects, dir string, p pkg) error {
	release, err := os.ReadFile(filepath.Join(objects, "include", "config", "kernel.release"))
	if err != nil {
		return err
	}
	if err := errors.Join(os.RemoveAll(dir), os.MkdirAll(dir, 0o755)); err != nil {
		return err
	}
	if _, err := command(ctx, objects, "strip", "-o", filepath.Join(dir, "vmlinux"), "vmlinux"); err != nil {
		return err
	}
	for from, to := range map[string]string{"arch/x86/boot/bzImage": "bzImage", ".config": "config"} {
		data, err := os.ReadFile(filepath.Join(objects, from))
		if err != nil {
			return err
		}
		if err := writeFile(filepath.Join(dir, to), data, 0o644); err != nil {
			return err
		}
	}
	k := Kernel{Variant: "hyper", Release: strings.TrimSpace(string(release)), Package: p.String(), Cmdline: hyperCmdline, dir: dir}
	return k.save(dir)
}

// MissingOptions returns what a fragment asks for (=y, =n, =value) and the resulting
// .config does not have: Kconfig drops options with unmet dependencies silently.
func MissingOptions(fragment, config string) []string {
	have := map[string]string{}
	for line := range strings.Lines(config) {
		if k, v, ok := strings.Cut(strings.TrimSpace(line), "="); ok && !strings.HasPrefix(k, "#") {
			have[k] = v
		}
	}
	var missing []string
	for line := range strings.Lines(fragment) {
		line = strings.TrimSpace(line)
		name, isOff := strings.CutSuffix(strings.TrimPrefix(line, "# "), " is not set")
		k, v, ok := strings.Cut(line, "=")
		switch {
		case strings.HasPrefix(line, "# CONFIG_") && isOff:
			if have[name] != "" {
				missing = append(missing, line)
			}
		case strings.HasPrefix(line, "#") || !ok:
		case v == "n" && have[k] == "", have[k] == v:
		default:
			missing = append(missing, line)
		}
	}
	return missing
}
