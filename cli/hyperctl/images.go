package hyperctl

import (
	"fmt"
	"io"
	"strings"
	"text/tabwriter"

	"github.com/spf13/cobra"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/hypernetes/hypernetes/cli/usage"
	"github.com/hypernetes/hypernetes/cluster/image"
)

func newImagesCommand(o *options) *cobra.Command {
	var quiet bool
	var format string
	cmd := &cobra.Command{
		Use:     "images",
		Short:   "List the node's images",
		Args:    cobra.NoArgs,
		PreRunE: func(*cobra.Command, []string) error { return usage.OneOf("output", format, "table", "json") },
		RunE: func(cmd *cobra.Command, _ []string) error {
			return o.withStore(cmd, func(s image.Store) error {
				list, err := s.List(cmd.Context())
				if err != nil {
					return err
				}
				switch {
				case format == "json":
					return writeJSON(cmd.OutOrStdout(), list)
				case quiet:
					for _, i := range list {
						fmt.Fprintln(cmd.OutOrStdout(), i.ID)
					}
					return nil
				}
				return writeImages(cmd.OutOrStdout(), list)
			})
		},
	}
	cmd.Flags().BoolVarP(&quiet, "quiet", "q", false, "only ids")
	cmd.Flags().StringVarP(&format, "output", "o", "table", "table or json")
	return cmd
}

func writeImages(w io.Writer, list []image.Stored) error {
	tw := tabwriter.NewWriter(w, 0, 0, 3, ' ', 0)
	fmt.Fprintln(tw, "IMAGE\tID\tSIZE")
	for _, i := range list {
		for _, tag := range i.Tags {
			fmt.Fprintf(tw, "%s\t%s\t%.1f MB\n", shortRef(tag), shortID(strings.TrimPrefix(i.ID, "sha256:")), float64(i.Size)/1e6)
		}
	}
	return tw.Flush()
}

func newPullCommand(o *options) *cobra.Command {
	return &cobra.Command{
		Use:   "pull IMAGE",
		Short: "Fetch an image from its registry",
		Args:  cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			h, err := o.connect(cmd.Context(), cmd.ErrOrStderr())
			if err != nil {
				return err
			}
			defer h.close()
			resp, err := h.images.PullImage(cmd.Context(), &cri.PullImageRequest{Image: &cri.ImageSpec{Image: args[0]}})
			if err != nil {
				return fmt.Errorf("%w\n  without a registry: hyperctl load FILE.tar", h.explain("pull "+args[0], err))
			}
			_, err = fmt.Fprintln(cmd.OutOrStdout(), resp.ImageRef)
			return err
		},
	}
}

func newLoadCommand(o *options) *cobra.Command {
	return &cobra.Command{
		Use:   "load FILE...",
		Short: "Load image archives (OCI or docker save)",
		Args:  cobra.MinimumNArgs(1),
		PreRunE: func(_ *cobra.Command, args []string) error {
			for _, file := range args {
				if _, err := image.Inspect(file); err != nil {
					return err
				}
			}
			return nil
		},
		RunE: func(cmd *cobra.Command, args []string) error {
			return o.withStore(cmd, func(s image.Store) error {
				for _, file := range args {
					info, err := s.Load(cmd.Context(), file)
					if err != nil {
						return err
					}
					for _, tag := range info.Tags {
						fmt.Fprintln(cmd.OutOrStdout(), shortRef(tag))
					}
				}
				return nil
			})
		},
	}
}

func newRemoveImageCommand(o *options) *cobra.Command {
	return &cobra.Command{
		Use:   "rmi IMAGE...",
		Short: "Remove images, with all their tags",
		Args:  cobra.MinimumNArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			return o.withStore(cmd, func(s image.Store) error {
				for _, ref := range args {
					if err := s.Remove(cmd.Context(), ref); err != nil {
						return err
					}
					fmt.Fprintln(cmd.OutOrStdout(), ref)
				}
				return nil
			})
		},
	}
}

func (o *options) withStore(cmd *cobra.Command, do func(image.Store) error) error {
	h, err := o.connect(cmd.Context(), cmd.ErrOrStderr())
	if err != nil {
		return err
	}
	defer h.close()
	s, err := h.store()
	if err != nil {
		return err
	}
	return do(s)
}
