package hyperctl

import (
	"encoding/json"
	"fmt"
	"io"
	"text/tabwriter"

	"github.com/spf13/cobra"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/hypernetes/hypernetes/cli/usage"
)

// nodeInfo is what `info` tells.
type nodeInfo struct {
	Node       string            `json:"node"`
	Socket     string            `json:"socket"`
	Runtime    string            `json:"runtime"`
	Version    string            `json:"version"`
	Handlers   []string          `json:"handlers"`
	Conditions map[string]string `json:"conditions"`
	Pods       int               `json:"pods"`
	Running    int               `json:"running"`
	Images     int               `json:"images"`
}

func newInfoCommand(o *options) *cobra.Command {
	var format string
	cmd := &cobra.Command{
		Use:     "info",
		Short:   "Describe the node and its runtime",
		Args:    cobra.NoArgs,
		PreRunE: func(*cobra.Command, []string) error { return usage.OneOf("output", format, "text", "json") },
		RunE: func(cmd *cobra.Command, _ []string) error {
			h, err := o.connect(cmd.Context(), cmd.ErrOrStderr())
			if err != nil {
				return err
			}
			defer h.close()
			info, err := h.info(cmd)
			if err != nil {
				return err
			}
			if o.endpoint == "" {
				info.Node = o.node
			}
			if format == "json" {
				return writeJSON(cmd.OutOrStdout(), info)
			}
			return writeInfo(cmd.OutOrStdout(), info)
		},
	}
	cmd.Flags().StringVarP(&format, "output", "o", "text", "text or json")
	return cmd
}

func (h *hyper) info(cmd *cobra.Command) (*nodeInfo, error) {
	ctx := cmd.Context()
	v, err := h.pods.Version(ctx, &cri.VersionRequest{})
	if err != nil {
		return nil, h.explain("runtime version", err)
	}
	st, err := h.pods.Status(ctx, &cri.StatusRequest{Verbose: true})
	if err != nil {
		return nil, h.explain("runtime status", err)
	}
	rows, err := h.list(ctx)
	if err != nil {
		return nil, err
	}
	images, err := h.images.ListImages(ctx, &cri.ListImagesRequest{})
	if err != nil {
		return nil, h.explain("list images", err)
	}
	running, _ := filterRows(rows, false)
	info := &nodeInfo{
		Socket: h.socket, Runtime: v.RuntimeName, Version: v.RuntimeVersion,
		Pods: len(rows), Running: len(running), Images: len(images.Images), Conditions: map[string]string{},
	}
	for _, c := range st.Status.Conditions {
		info.Conditions[c.Type] = "ok"
		if !c.Status {
			info.Conditions[c.Type] = c.Reason + ": " + c.Message
		}
	}
	for _, r := range st.RuntimeHandlers {
		if r.Name != "" {
			info.Handlers = append(info.Handlers, r.Name)
		}
	}
	return info, nil
}

func writeInfo(w io.Writer, i *nodeInfo) error {
	tw := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	if i.Node != "" {
		fmt.Fprintf(tw, "Node:\t%s\n", i.Node)
	}
	fmt.Fprintf(tw, "Runtime:\t%s %s\n", i.Runtime, i.Version)
	fmt.Fprintf(tw, "Socket:\t%s\n", i.Socket)
	handlers, err := json.Marshal(i.Handlers)
	if err != nil {
		return err
	}
	fmt.Fprintf(tw, "Handlers:\t%s\n", handlers)
	for _, c := range []string{"RuntimeReady", "NetworkReady"} {
		if s, ok := i.Conditions[c]; ok {
			fmt.Fprintf(tw, "%s:\t%s\n", c, s)
		}
	}
	fmt.Fprintf(tw, "Pods:\t%d (%d running)\n", i.Pods, i.Running)
	fmt.Fprintf(tw, "Images:\t%d\n", i.Images)
	return tw.Flush()
}

func newVersionCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "version",
		Short: "Print versions",
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			_, err := fmt.Fprintln(cmd.OutOrStdout(), "hyperctl", version())
			return err
		},
	}
}
