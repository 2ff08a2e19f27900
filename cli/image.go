package cli

import (
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/signal"
	"path/filepath"
	"strings"
	"syscall"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"

	"github.com/hypernetes/hypernetes/cluster/image"
	"github.com/hypernetes/hypernetes/cluster/layout"
)

// newImageCommand is `h8s image`: images without a registry.
func newImageCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "image",
		Short: "Build images from Debian packages, and load, list and remove images of a node",
		Long: "Images may come from any registry as usual. These commands are for machines without\n" +
			"one: build makes the images of the demos and tests, load takes any image archive.",
	}
	cmd.AddCommand(newImageBuildCommand(), newImageLoadCommand(), newImageListCommand(), newImageRemoveCommand(), newImageServeCommand())
	return cmd
}

func newImageBuildCommand() *cobra.Command {
	var files []string
	var source, output string
	var force, list bool
	cmd := &cobra.Command{
		Use:   "build [RECIPE...|all]",
		Short: "Build image archives from recipes",
		Long: "Builds the named recipes, or all, into the images directory; what is up to date is\n" +
			"left alone. `h8s image build --list` shows the recipes; --file adds recipes of your own.",
		Example: "  h8s image build busybox nginx\n  h8s image build --file shop.yaml shop",
		RunE: func(cmd *cobra.Command, args []string) error {
			catalog, err := recipes(files)
			if err != nil {
				return err
			}
			if list {
				return listRecipes(cmd.OutOrStdout(), catalog)
			}
			b, err := newBuilder(catalog, source, output)
			if err != nil {
				return err
			}
			b.Force = force
			b.Progress = func(r image.Result) { reportBuilt(cmd.OutOrStdout(), r) }
			if len(args) == 0 || (len(args) == 1 && args[0] == "all") {
				args = catalog.Names()
			}
			_, err = b.Build(cmd.Context(), args...)
			return err
		},
	}
	cmd.Flags().StringArrayVarP(&files, "file", "f", nil, "recipe `FILE` to add to the built-in ones")
	cmd.Flags().StringVar(&source, "source", "", "source tree for recipes with Go programs (default: found from here)")
	cmd.Flags().StringVarP(&output, "output", "o", "", "`DIR` for the archives (default: the images directory of this h8s)")
	cmd.Flags().BoolVar(&force, "force", false, "build even what is up to date, with today's packages")
	cmd.Flags().BoolVar(&list, "list", false, "list the recipes")
	return cmd
}

func recipes(files []string) (image.Catalog, error) {
	catalog, err := image.Builtin()
	if err != nil {
		return nil, err
	}
	for _, f := range files {
		data, err := os.ReadFile(f)
		if err != nil {
			return nil, fmt.Errorf("recipe: %w", err)
		}
		r, err := image.ParseRecipe(f, data)
		if err != nil {
			return nil, err
		}
		catalog[r.Name] = r
	}
	return catalog, nil
}

func listRecipes(w io.Writer, catalog image.Catalog) error {
	tw := tabwriter.NewWriter(w, 0, 0, 3, ' ', 0)
	fmt.Fprintln(tw, "RECIPE\tIMAGE\tWHAT")
	for _, n := range catalog.Names() {
		fmt.Fprintf(tw, "%s\t%s\t%s\n", n, catalog[n].Tags[0], catalog[n].Summary)
	}
	return tw.Flush()
}

func newBuilder(catalog image.Catalog, source, output string) (*image.Builder, error) {
	artifacts, err := layout.FindArtifacts()
	if err != nil {
		return nil, err
	}
	if output == "" {
		output = artifacts.ImagesDir()
	}
	if source == "" {
		source = findSource(filepath.Dir(artifacts.Root))
	}
	cache := os.Getenv("H8S_CACHE")
	if cache == "" {
		base, err := os.UserCacheDir()
		if err != nil {
			return nil, fmt.Errorf("cache directory: %w; set H8S_CACHE", err)
		}
		cache = filepath.Join(base, "h8s")
	}
	return &image.Builder{Catalog: catalog, Images: output, Cache: filepath.Join(cache, "images"), Source: source, Files: artifacts.Root}, nil
}

// findSource returns the first directory with our recipes' Go programs: where
// the artefacts were built, or where we are called.
func findSource(candidates ...string) string {
	if wd, err := os.Getwd(); err == nil {
		candidates = append(candidates, wd)
	}
	for _, c := range candidates {
		if _, err := os.Stat(filepath.Join(c, "test", "images", "testbox")); err == nil {
			return c
		}
	}
	return ""
}

func reportBuilt(w io.Writer, r image.Result) {
	what := fmt.Sprintf("%.1fs", r.Took.Seconds())
	if r.Reused {
		what = "up to date"
	}
	fmt.Fprintf(w, "✓ %-15s %-11s %8s  %s\n", r.Name, what, bytesText(uint64(r.Size)), r.Tags[0])
}

// bytesText is a size for people: three digits and a unit of 1000.
func bytesText(n uint64) string {
	units := []string{"B", "kB", "MB", "GB", "TB"}
	v, i := float64(n), 0
	for v >= 1000 && i < len(units)-1 {
		v, i = v/1000, i+1
	}
	if i == 0 || v >= 100 {
		return fmt.Sprintf("%.0f %s", v, units[i])
	}
	return fmt.Sprintf("%.1f %s", v, units[i])
}

func openStore(name string) (image.Store, error) {
	artifacts, node, err := find(name)
	if err != nil {
		return image.Store{}, err
	}
	if err := needRoot(); err != nil {
		return image.Store{}, err
	}
	conn, err := net.Dial("unix", node.ContainerdSocket())
	if err != nil {
		return image.Store{}, notRunning(node)
	}
	_ = conn.Close() // it answers
	return image.Store{Socket: node.ContainerdSocket(), Containerd: artifacts.Bin("containerd"), Snapshotter: "erofs"}, nil
}

func newImageLoadCommand() *cobra.Command {
	var name string
	cmd := &cobra.Command{
		Use:     "load FILE...",
		Short:   "Load image archives (OCI or docker save) into a node",
		Example: "  docker save shop:1 | gzip > shop.tgz && h8s image load shop.tgz",
		Args:    cobra.MinimumNArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			for _, file := range args {
				if _, err := image.Inspect(file); err != nil {
					return err
				}
			}
			store, err := openStore(name)
			if err != nil {
				return err
			}
			for _, file := range args {
				info, err := store.Load(cmd.Context(), file)
				if err != nil {
					return err
				}
				fmt.Fprintf(cmd.OutOrStdout(), "✓ %s\n", strings.Join(info.Tags, " "))
			}
			return nil
		},
	}
	addNodeFlag(cmd, &name)
	return cmd
}

func newImageListCommand() *cobra.Command {
	var name string
	var format *string
	cmd := &cobra.Command{
		Use:     "list",
		Aliases: []string{"ls"},
		Short:   "List the images of a node",
		Args:    cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if err := checkOutput(*format); err != nil {
				return err
			}
			store, err := openStore(name)
			if err != nil {
				return err
			}
			return printStored(cmd.Context(), cmd.OutOrStdout(), store, *format)
		},
	}
	addNodeFlag(cmd, &name)
	format = outputFlag(cmd)
	return cmd
}

func printStored(ctx context.Context, w io.Writer, store image.Store, format string) error {
	images, err := store.List(ctx)
	if err != nil {
		return err
	}
	if format == "json" {
		return printJSON(w, images)
	}
	tw := tabwriter.NewWriter(w, 0, 0, 3, ' ', 0)
	fmt.Fprintln(tw, "IMAGE\tID\tSIZE")
	for _, i := range images {
		id := strings.TrimPrefix(i.ID, "sha256:")
		for _, tag := range i.Tags {
			fmt.Fprintf(tw, "%s\t%.12s\t%s\n", tag, id, bytesText(i.Size))
		}
	}
	return tw.Flush()
}

func newImageRemoveCommand() *cobra.Command {
	var name string
	cmd := &cobra.Command{
		Use:     "rm IMAGE...",
		Aliases: []string{"remove"},
		Short:   "Remove images, with all their tags, from a node",
		Args:    cobra.MinimumNArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			store, err := openStore(name)
			if err != nil {
				return err
			}
			for _, ref := range args {
				if err := store.Remove(cmd.Context(), ref); err != nil {
					return err
				}
				fmt.Fprintf(cmd.OutOrStdout(), "removed %s\n", ref)
			}
			return nil
		},
	}
	addNodeFlag(cmd, &name)
	return cmd
}

// newImageServeCommand is for the node itself: its containerd asks here first.
func newImageServeCommand() *cobra.Command {
	var listen, dir string
	cmd := &cobra.Command{
		Use:   "serve",
		Short: "Serve a directory of image archives as a read-only registry",
		Long: "Lets images that came as archives be pulled, which imagePullPolicy Always insists on.\n" +
			"Ends on SIGTERM or SIGINT.",
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if dir == "" {
				artifacts, err := layout.FindArtifacts()
				if err != nil {
					return err
				}
				dir = artifacts.ImagesDir()
			}
			return serveImages(cmd.Context(), listen, dir)
		},
	}
	cmd.Flags().StringVar(&listen, "listen", "127.0.0.1:5000", "`ADDRESS` to listen on")
	cmd.Flags().StringVar(&dir, "dir", "", "directory of archives (default: the images directory of this h8s)")
	return cmd
}

func serveImages(ctx context.Context, listen, dir string) error {
	registry := image.NewRegistry(ctx, dir)
	defer registry.Close()
	ctx, stop := signal.NotifyContext(ctx, syscall.SIGTERM, syscall.SIGINT)
	defer stop()
	server := &http.Server{Addr: listen, Handler: registry, ReadHeaderTimeout: 10 * time.Second}
	failed := make(chan error, 1)
	go func() { failed <- server.ListenAndServe() }()
	select {
	case err := <-failed:
		return fmt.Errorf("image registry on %s: %w", listen, err)
	case <-ctx.Done():
		err := server.Close()
		<-failed
		return err
	}
}
