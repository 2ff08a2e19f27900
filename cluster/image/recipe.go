package image

import (
	"fmt"
	"io/fs"
	"path"
	"regexp"
	"strconv"
	"strings"

	"github.com/containerd/errdefs"
	"github.com/google/go-containerregistry/pkg/name"
	"sigs.k8s.io/yaml"
)

// Recipe says what an image holds. Every path is absolute inside the image;
// /bin, /sbin and /lib* name the same files as /usr/bin, /usr/sbin and
// /usr/lib*, because every image has a merged /usr.
type Recipe struct {
	// Name is the file name of the archive, without ".tar", and the name by
	// which other recipes refer to this one.
	Name string `json:"name"`
	// Summary is one line for `h8s image build --help` and `image recipes`.
	Summary string `json:"summary,omitempty"`
	// Tags are the image references the archive carries, at least one.
	Tags []string `json:"tags"`
	// Base names a recipe whose layers come first.
	Base string `json:"base,omitempty"`
	// Packages are Debian packages; they come with the closure of their
	// Depends (not Recommends). Maintainer scripts do not run.
	Packages []string `json:"packages,omitempty"`
	// Pick limits what is taken from the packages to these paths ("/x/**" is
	// a whole subtree) and the shared libraries they need. Empty takes all.
	Pick []string `json:"pick,omitempty"`
	// Drop removes paths after picking; the same patterns.
	Drop []string `json:"drop,omitempty"`
	// PackageDatabase writes /var/lib/dpkg/status, so that dpkg -l and
	// scanners see what the image is made of.
	PackageDatabase bool `json:"packageDatabase,omitempty"`

	Programs []Program `json:"programs,omitempty"`
	Copies   []Copy    `json:"copies,omitempty"`
	Dirs     []Dir     `json:"dirs,omitempty"`
	Files    []File    `json:"files,omitempty"`
	Zips     []Zip     `json:"zips,omitempty"`
	Links    []Link    `json:"links,omitempty"`
	Applets  *Applets  `json:"applets,omitempty"`
	Users    []User    `json:"users,omitempty"`
	Config   Config    `json:"config,omitempty"`
}

// Program is an executable put at Path: either the Go package Go of this
// repository, built static, or the file File (absolute, or below the output
// directory). Shared libraries are added from the recipe's packages.
type Program struct {
	Path string `json:"path"`
	Go   string `json:"go,omitempty"`
	File string `json:"file,omitempty"`
}

// Copy repeats a file of the tree under another path, which is what many
// maintainer scripts do with a template in /usr/share.
type Copy struct {
	From string `json:"from"`
	To   string `json:"to"`
}

// Dir is a directory; Mode is octal text (default "0755"), Owner "uid:gid".
type Dir struct {
	Path  string `json:"path"`
	Mode  string `json:"mode,omitempty"`
	Owner string `json:"owner,omitempty"`
}

// File is a file with its content; Mode is octal text (default "0644").
type File struct {
	Path    string `json:"path"`
	Mode    string `json:"mode,omitempty"`
	Owner   string `json:"owner,omitempty"`
	Content string `json:"content,omitempty"`
}

// Zip is a zip archive (a .war, say) made of Files, whose paths are relative.
type Zip struct {
	Path  string            `json:"path"`
	Files map[string]string `json:"files"`
}

// Link is a symbolic link, or with Hard a hard link within the same layer.
type Link struct {
	Path   string `json:"path"`
	Target string `json:"target"`
	Hard   bool   `json:"hard,omitempty"`
}

// Applets runs Binary with Args at build time and makes every path it prints
// a hard link to Binary: how busybox names its applets.
type Applets struct {
	Binary string   `json:"binary"`
	Args   []string `json:"args"`
}

// User becomes a line in /etc/passwd and one in /etc/group.
type User struct {
	Name  string `json:"name"`
	UID   int    `json:"uid"`
	GID   int    `json:"gid"`
	Home  string `json:"home,omitempty"`
	Shell string `json:"shell,omitempty"`
}

// Config is what the image tells the runtime.
type Config struct {
	Entrypoint []string          `json:"entrypoint,omitempty"`
	Cmd        []string          `json:"cmd,omitempty"`
	Env        []string          `json:"env,omitempty"`
	User       string            `json:"user,omitempty"`
	WorkingDir string            `json:"workingDir,omitempty"`
	Ports      []string          `json:"ports,omitempty"`
	Volumes    []string          `json:"volumes,omitempty"`
	StopSignal string            `json:"stopSignal,omitempty"`
	Labels     map[string]string `json:"labels,omitempty"`
}

var (
	recipeName  = regexp.MustCompile(`^[a-z0-9][a-z0-9._-]{0,62}$`)
	packageName = regexp.MustCompile(`^[a-z0-9][a-z0-9+.-]+$`)
	userName    = regexp.MustCompile(`^[a-z_][a-z0-9_-]{0,31}$`)
	portSpec    = regexp.MustCompile(`^([0-9]{1,5})(/(tcp|udp|sctp))?$`)
)

// ParseRecipe reads one recipe from YAML. Unknown fields are errors: a
// misspelt field would otherwise silently make a different image.
func ParseRecipe(source string, data []byte) (*Recipe, error) {
	var r Recipe
	if err := yaml.UnmarshalStrict(data, &r); err != nil {
		return nil, fmt.Errorf("recipe %s: %w: %w", source, err, errdefs.ErrInvalidArgument)
	}
	if err := r.validate(); err != nil {
		return nil, fmt.Errorf("recipe %s: %w: %w", source, err, errdefs.ErrInvalidArgument)
	}
	return &r, nil
}

func (r *Recipe) validate() error {
	if !recipeName.MatchString(r.Name) {
		return fmt.Errorf("name %q: want lower-case letters, digits, '.', '_', '-'", r.Name)
	}
	if r.Base == r.Name {
		return fmt.Errorf("base %q: a recipe cannot be its own base", r.Base)
	}
	if len(r.Tags) == 0 {
		return fmt.Errorf("tags: at least one image reference is needed, as h8s.local/%s:1", r.Name)
	}
	for _, t := range r.Tags {
		if _, err := name.NewTag(t, name.StrictValidation); err != nil {
			return fmt.Errorf("tags: %q: %w", t, err)
		}
	}
	for _, p := range r.Packages {
		if !packageName.MatchString(p) {
			return fmt.Errorf("packages: %q is not a Debian package name", p)
		}
	}
	if len(r.Packages) == 0 && (len(r.Pick) > 0 || r.PackageDatabase) {
		return fmt.Errorf("pick and packageDatabase need packages")
	}
	if err := r.validatePaths(); err != nil {
		return err
	}
	return r.validateConfig()
}

func (r *Recipe) validatePaths() error {
	paths := map[string][]string{"pick": r.Pick, "drop": r.Drop}
	for _, p := range r.Programs {
		if (p.Go == "") == (p.File == "") {
			return fmt.Errorf("programs: %q: set exactly one of go and file", p.Path)
		}
		paths["programs"] = append(paths["programs"], p.Path)
	}
	for _, c := range r.Copies {
		paths["copies"] = append(paths["copies"], c.From, c.To)
	}
	for _, d := range r.Dirs {
		paths["dirs"] = append(paths["dirs"], d.Path)
		if _, _, _, err := attributes(d.Mode, d.Owner, 0o755); err != nil {
			return fmt.Errorf("dirs: %s: %w", d.Path, err)
		}
	}
	for _, f := range r.Files {
		paths["files"] = append(paths["files"], f.Path)
		if _, _, _, err := attributes(f.Mode, f.Owner, 0o644); err != nil {
			return fmt.Errorf("files: %s: %w", f.Path, err)
		}
	}
	for _, z := range r.Zips {
		paths["zips"] = append(paths["zips"], z.Path)
		for n := range z.Files {
			if !fs.ValidPath(n) {
				return fmt.Errorf("zips: %s: %q is not a relative path", z.Path, n)
			}
		}
	}
	for _, l := range r.Links {
		paths["links"] = append(paths["links"], l.Path)
	}
	if r.Applets != nil {
		paths["applets"] = []string{r.Applets.Binary}
	}
	for field, list := range paths {
		for _, p := range list {
			if !path.IsAbs(p) || path.Clean(p) != p {
				return fmt.Errorf("%s: path %q: want a clean absolute path", field, p)
			}
		}
	}
	return nil
}

func (r *Recipe) validateConfig() error {
	for _, u := range r.Users {
		if !userName.MatchString(u.Name) || u.UID < 0 || u.GID < 0 {
			return fmt.Errorf("users: %q (%d:%d) is not a usable account", u.Name, u.UID, u.GID)
		}
	}
	for _, e := range r.Config.Env {
		if k, _, ok := strings.Cut(e, "="); !ok || k == "" {
			return fmt.Errorf("config.env: %q: want NAME=VALUE", e)
		}
	}
	for _, p := range r.Config.Ports {
		m := portSpec.FindStringSubmatch(p)
		if m == nil {
			return fmt.Errorf("config.ports: %q: want PORT or PORT/tcp|udp|sctp", p)
		}
		if n, _ := strconv.Atoi(m[1]); n < 1 || n > 65535 {
			return fmt.Errorf("config.ports: %q: want 1 to 65535", p)
		}
	}
	return nil
}

// attributes parses octal mode text and "uid:gid".
func attributes(mode, owner string, def int64) (perm int64, uid, gid int, err error) {
	perm = def
	if mode != "" {
		if perm, err = strconv.ParseInt(mode, 8, 64); err != nil || perm < 0 || perm > 0o7777 {
			return 0, 0, 0, fmt.Errorf("mode %q: want octal text as \"0755\"", mode)
		}
	}
	if owner == "" {
		return perm, 0, 0, nil
	}
	u, g, ok := strings.Cut(owner, ":")
	uid, uerr := strconv.Atoi(u)
	gid, gerr := strconv.Atoi(g)
	if !ok || uerr != nil || gerr != nil || uid < 0 || gid < 0 {
		return 0, 0, 0, fmt.Errorf("owner %q: want numbers as \"1000:1000\"", owner)
	}
	return perm, uid, gid, nil
}
