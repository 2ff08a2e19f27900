package image

import (
	"embed"
	"fmt"
	"sort"
	"strings"

	"github.com/containerd/errdefs"
)

//go:embed recipes/*.yaml
var builtin embed.FS

// Catalog is a set of recipes by name.
type Catalog map[string]*Recipe

// Builtin returns the recipes that come with h8s.
func Builtin() (Catalog, error) {
	files, err := builtin.ReadDir("recipes")
	if err != nil {
		return nil, fmt.Errorf("built-in recipes: %w", err)
	}
	c := Catalog{}
	for _, f := range files {
		data, err := builtin.ReadFile("recipes/" + f.Name())
		if err != nil {
			return nil, fmt.Errorf("built-in recipes: %w", err)
		}
		r, err := ParseRecipe(f.Name(), data)
		if err != nil {
			return nil, err
		}
		if _, dup := c[r.Name]; dup {
			return nil, fmt.Errorf("built-in recipes: %s: name %q is taken: %w", f.Name(), r.Name, errdefs.ErrAlreadyExists)
		}
		c[r.Name] = r
	}
	return c, nil
}

// Names lists the recipes, sorted.
func (c Catalog) Names() []string {
	out := make([]string, 0, len(c))
	for n := range c {
		out = append(out, n)
	}
	sort.Strings(out)
	return out
}

// order lists the named recipes and their bases, bases first.
func (c Catalog) order(names []string) ([]*Recipe, error) {
	const visiting, done = 1, 2
	state := map[string]int{}
	var out []*Recipe
	var visit func(string) error
	visit = func(n string) error {
		r, ok := c[n]
		switch {
		case !ok:
			return fmt.Errorf("recipe %q: not one of %s: %w", n, strings.Join(c.Names(), ", "), errdefs.ErrNotFound)
		case state[n] == done:
			return nil
		case state[n] == visiting:
			return fmt.Errorf("recipe %q: its bases form a circle: %w", n, errdefs.ErrInvalidArgument)
		}
		state[n] = visiting
		if r.Base != "" {
			if err := visit(r.Base); err != nil {
				return fmt.Errorf("base of %s: %w", n, err)
			}
		}
		state[n] = done
		out = append(out, r)
		return nil
	}
	for _, n := range names {
		if err := visit(n); err != nil {
			return nil, err
		}
	}
	return out, nil
}
