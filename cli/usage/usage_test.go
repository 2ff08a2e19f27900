package usage

import (
	"io"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/spf13/cobra"
)

func tree() *cobra.Command {
	root := &cobra.Command{Use: "tool", SilenceUsage: true, SilenceErrors: true}
	root.SetOut(io.Discard)
	image := &cobra.Command{Use: "image", Short: "images"}
	load := &cobra.Command{Use: "load FILE", Args: cobra.MinimumNArgs(1), RunE: func(*cobra.Command, []string) error { return nil }}
	load.Flags().Int("n", 0, "number")
	image.AddCommand(load)
	root.AddCommand(image)
	Strict(root)
	return root
}

func TestStrict(t *testing.T) {
	for _, c := range []struct{ args, want string }{
		{"", ""},
		{"image", ""},
		{"image load x", ""},
		{"imag", `unknown command "imag" for "tool"; did you mean image?`},
		{"image zap", `unknown command "zap" for "tool image"`},
		{"image load", `requires at least 1 arg(s), only received 0`},
		{"image load x --m", `unknown flag: --m`},
		{"image load x --n y", `invalid argument "y" for "--n" flag`},
		{"--x", `unknown flag: --x`},
	} {
		root := tree()
		root.SetArgs(strings.Fields(c.args))
		err := root.Execute()
		if c.want == "" {
			if err != nil {
				t.Errorf("%q: %v", c.args, err)
			}
			continue
		}
		if err == nil || !strings.Contains(err.Error(), c.want) || !errdefs.IsInvalidArgument(err) {
			t.Errorf("%q: %v, want an invalid argument with %q", c.args, err, c.want)
		}
	}
}

func TestOneOf(t *testing.T) {
	if err := OneOf("output", "json", "table", "json"); err != nil {
		t.Error(err)
	}
	err := OneOf("output", "xml", "table", "json")
	if err == nil || err.Error() != `output "xml": want table or json` || !errdefs.IsInvalidArgument(err) {
		t.Error(err)
	}
}
