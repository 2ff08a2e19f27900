package login

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/containerd/errdefs"
	"go.yaml.in/yaml/v3"
)

// maxFile bounds a clouds.yaml.
const maxFile = 1 << 20

// Options say where credentials are looked for.
type Options struct {
	// Cloud names one of clouds.yaml; $OS_CLOUD if empty. If that is empty too, the OS_*
	// variables are the credentials.
	Cloud string
	// File is clouds.yaml; $OS_CLIENT_CONFIG_FILE, then the usual places, if empty. secure.yaml
	// is looked for beside it.
	File string
	// Getenv reads the environment; os.Getenv if nil.
	Getenv func(string) string
}

func (o Options) env(name string) string {
	if o.Getenv != nil {
		return o.Getenv(name)
	}
	return os.Getenv(name)
}

// Load finds the credentials. The error is errdefs.ErrNotFound if there is no such file or
// cloud, errdefs.ErrInvalidArgument if what is there cannot be used.
func Load(o Options) (Credentials, error) {
	cloud := first(o.Cloud, o.env("OS_CLOUD"))
	if cloud == "" {
		if o.env("OS_AUTH_URL") == "" {
			return Credentials{}, fmt.Errorf("no credentials: name a cloud of clouds.yaml with --cloud or OS_CLOUD, or set OS_AUTH_URL and what belongs to it: %w", errdefs.ErrNotFound)
		}
		return o.fromEnvironment()
	}
	file, err := o.Find()
	if err != nil {
		return Credentials{}, err
	}
	return FromFile(file, cloud)
}

// Find is the name of the clouds.yaml that counts.
func (o Options) Find() (string, error) {
	if file := first(o.File, o.env("OS_CLIENT_CONFIG_FILE")); file != "" {
		return filepath.Abs(file)
	}
	places := []string{"clouds.yaml"}
	if dir := o.env("XDG_CONFIG_HOME"); dir != "" {
		places = append(places, filepath.Join(dir, "openstack", "clouds.yaml"))
	} else if home := o.env("HOME"); home != "" {
		places = append(places, filepath.Join(home, ".config", "openstack", "clouds.yaml"))
	}
	places = append(places, "/etc/openstack/clouds.yaml")
	for _, p := range places {
		if _, err := os.Stat(p); err == nil {
			return filepath.Abs(p)
		}
	}
	return "", fmt.Errorf("no clouds.yaml in %s: make one, or name it with OS_CLIENT_CONFIG_FILE: %w", strings.Join(places, ", "), errdefs.ErrNotFound)
}

// Clouds are the names of those in the clouds.yaml that counts.
func Clouds(o Options) ([]string, error) {
	file, err := o.Find()
	if err != nil {
		return nil, err
	}
	return settings{}.read(file, "")
}

type cloudFile struct {
	Clouds map[string]*struct {
		// Auth is taken as it is written: a password 0123 is no number.
		Auth     map[string]yaml.Node `yaml:"auth"`
		AuthType string               `yaml:"auth_type"`
		CACert   string               `yaml:"cacert"`
		Cert     string               `yaml:"cert"`
		Key      string               `yaml:"key"`
		Verify   *bool                `yaml:"verify"`
		Profile  string               `yaml:"profile"`
		Cloud    string               `yaml:"cloud"`
	} `yaml:"clouds"`
}

// FromFile reads one cloud of a clouds.yaml, with what secure.yaml beside it adds.
func FromFile(file, cloud string) (Credentials, error) {
	s := settings{}
	names, err := s.read(file, cloud)
	if errors.Is(err, fs.ErrNotExist) {
		return Credentials{}, fmt.Errorf("clouds.yaml %s: there is no such file: %w", file, errdefs.ErrNotFound)
	}
	if err != nil {
		return Credentials{}, err
	}
	if len(s) == 0 {
		return Credentials{}, fmt.Errorf("cloud %q: %s has none of that name, but %s: %w", cloud, file, strings.Join(names, ", "), errdefs.ErrNotFound)
	}
	if _, err := s.read(filepath.Join(filepath.Dir(file), "secure.yaml"), cloud); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return Credentials{}, err
	}
	return s.credentials(fmt.Sprintf("cloud %q of %s", cloud, file), func(f string) string {
		if f == "auth_type" {
			return f
		}
		return "auth." + f
	})
}

// read adds a cloud of a file and returns the names of all clouds in it.
func (s settings) read(file, cloud string) ([]string, error) {
	f, err := os.Open(file)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	text, err := io.ReadAll(io.LimitReader(f, maxFile+1))
	if err != nil {
		return nil, err
	}
	if len(text) > maxFile {
		return nil, fmt.Errorf("%s: more than %d bytes: is it a clouds.yaml? %w", file, maxFile, errdefs.ErrInvalidArgument)
	}
	return s.parse(file, text, cloud)
}

func (s settings) parse(file string, text []byte, cloud string) ([]string, error) {
	var d cloudFile
	if err := yaml.Unmarshal(text, &d); err != nil {
		// The parser quotes what it stumbles over, which may be a password.
		return nil, fmt.Errorf("%s: not the YAML of a clouds.yaml (want clouds: {NAME: {auth: {auth_url: …}}}): %w", file, errdefs.ErrInvalidArgument)
	}
	names := slices.Sorted(maps.Keys(d.Clouds))
	c := d.Clouds[cloud]
	if c == nil {
		return names, nil
	}
	if _, named := c.Auth["auth_url"]; c.Profile+c.Cloud != "" && !named && s["auth_url"] == "" {
		return nil, fmt.Errorf("%s: cloud %q takes auth_url from profile %q: profiles are not read: write auth.auth_url: %w", file, cloud, c.Profile+c.Cloud, errdefs.ErrInvalidArgument)
	}
	put := func(key, value string) {
		if value != "" {
			s[key] = value
		}
	}
	for key, v := range c.Auth {
		if v.Kind == yaml.AliasNode && v.Alias != nil {
			v = *v.Alias
		}
		switch {
		case v.Kind == yaml.ScalarNode && v.Tag != "!!null":
			put(key, v.Value)
		case v.Kind != yaml.ScalarNode:
			return nil, fmt.Errorf("%s: cloud %q: auth.%s: want a text: %w", file, cloud, key, errdefs.ErrInvalidArgument)
		}
	}
	put("auth_type", c.AuthType)
	for key, name := range map[string]string{"cacert": c.CACert, "cert": c.Cert, "key": c.Key} {
		if name != "" && !filepath.IsAbs(name) {
			// Others take it relative to the current directory, which a program that kubectl or a
			// supervisor starts does not know.
			name = filepath.Join(filepath.Dir(file), name)
		}
		put(key, name)
	}
	if c.Verify != nil {
		s["insecure"] = fmt.Sprint(!*c.Verify)
	}
	if len(s) == 0 {
		s["auth_url"] = ""
	}
	return names, nil
}

// fromEnvironment reads the OS_* variables.
func (o Options) fromEnvironment() (Credentials, error) {
	s := settings{}
	for _, f := range append([]string{"auth_type", "cacert", "cert", "key"}, fields...) {
		if v := o.env(variable(f)); v != "" {
			s[f] = v
		}
	}
	if v := strings.ToLower(o.env("OS_INSECURE")); v != "" {
		s["insecure"] = fmt.Sprint(v == "1" || v == "true" || v == "yes")
	}
	return s.credentials("environment", variable)
}

func variable(field string) string { return "OS_" + strings.ToUpper(field) }
