package hyperctl

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"sort"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/hypernetes/hypernetes/cli/usage"
)

// podRow is one Pod as `ps` shows it.
type podRow struct {
	ID         string         `json:"id"`
	Name       string         `json:"name"`
	Namespace  string         `json:"namespace"`
	Runtime    string         `json:"runtime"`
	Status     string         `json:"status"`
	IP         string         `json:"ip,omitempty"`
	Created    time.Time      `json:"created"`
	Containers []containerRow `json:"containers"`
}

type containerRow struct {
	ID       string `json:"id"`
	Name     string `json:"name"`
	Image    string `json:"image"`
	Status   string `json:"status"`
	ExitCode int32  `json:"exitCode"`
	Reason   string `json:"reason,omitempty"`
}

func newListCommand(o *options) *cobra.Command {
	var all, quiet bool
	var format string
	cmd := &cobra.Command{
		Use:     "ps",
		Aliases: []string{"list", "ls"},
		Short:   "List Pods",
		Args:    cobra.NoArgs,
		PreRunE: func(*cobra.Command, []string) error { return usage.OneOf("output", format, "table", "json") },
		RunE: func(cmd *cobra.Command, _ []string) error {
			h, err := o.connect(cmd.Context(), cmd.ErrOrStderr())
			if err != nil {
				return err
			}
			defer h.close()
			rows, err := h.list(cmd.Context())
			if err != nil {
				return err
			}
			shown, hidden := filterRows(rows, all)
			switch {
			case format == "json":
				return writeJSON(cmd.OutOrStdout(), shown)
			case quiet:
				for _, r := range shown {
					fmt.Fprintln(cmd.OutOrStdout(), r.ID)
				}
				return nil
			}
			return writePods(cmd.OutOrStdout(), shown, hidden, time.Now())
		},
	}
	cmd.Flags().BoolVarP(&all, "all", "a", false, "also Pods that have ended")
	cmd.Flags().BoolVarP(&quiet, "quiet", "q", false, "only ids")
	cmd.Flags().StringVarP(&format, "output", "o", "table", "table or json")
	return cmd
}

// list asks for all Pods, newest first.
func (h *hyper) list(ctx context.Context) ([]podRow, error) {
	pods, err := h.pods.ListPodSandbox(ctx, &cri.ListPodSandboxRequest{})
	if err != nil {
		return nil, h.explain("list Pods", err)
	}
	containers, err := h.pods.ListContainers(ctx, &cri.ListContainersRequest{})
	if err != nil {
		return nil, h.explain("list containers", err)
	}
	rows := make([]podRow, 0, len(pods.Items))
	for _, p := range pods.Items {
		r := podRow{ID: p.Id, Name: p.Metadata.Name, Namespace: p.Metadata.Namespace, Runtime: p.RuntimeHandler, Created: time.Unix(0, p.CreatedAt)}
		if st, err := h.pods.PodSandboxStatus(ctx, &cri.PodSandboxStatusRequest{PodSandboxId: p.Id}); err == nil && st.Status.Network != nil {
			r.IP = st.Status.Network.Ip
		}
		for _, c := range containers.Containers {
			if c.PodSandboxId == p.Id {
				r.Containers = append(r.Containers, h.containerRow(ctx, c))
			}
		}
		r.Status = podStatus(p.State, r.Containers)
		rows = append(rows, r)
	}
	sort.Slice(rows, func(i, j int) bool { return rows[i].Created.After(rows[j].Created) })
	return rows, nil
}

func (h *hyper) containerRow(ctx context.Context, c *cri.Container) containerRow {
	row := containerRow{ID: c.Id, Name: c.Metadata.Name, Image: c.Image.GetUserSpecifiedImage(), Status: "created"}
	if row.Image == "" {
		row.Image = c.Image.GetImage()
	}
	st, err := h.pods.ContainerStatus(ctx, &cri.ContainerStatusRequest{ContainerId: c.Id})
	if err != nil {
		row.Status = "unknown"
		return row
	}
	if named := st.Status.Image.GetUserSpecifiedImage(); named != "" {
		row.Image = named
	}
	switch st.Status.State {
	case cri.ContainerState_CONTAINER_RUNNING:
		row.Status = "running"
	case cri.ContainerState_CONTAINER_EXITED:
		row.Status, row.ExitCode = "exited", st.Status.ExitCode
		if st.Status.Reason != "Completed" && st.Status.Reason != "Error" {
			row.Reason = st.Status.Reason
		}
	}
	return row
}

// podStatus is one word, or two, for a Pod and its containers.
func podStatus(state cri.PodSandboxState, containers []containerRow) string {
	for _, c := range containers {
		if c.Status == "running" {
			return "running"
		}
	}
	for _, c := range containers {
		if c.Status == "exited" && c.Reason != "" {
			return fmt.Sprintf("exited (%d, %s)", c.ExitCode, c.Reason)
		}
		if c.Status == "exited" {
			return fmt.Sprintf("exited (%d)", c.ExitCode)
		}
	}
	if state == cri.PodSandboxState_SANDBOX_READY {
		return "created"
	}
	return "stopped"
}

// filterRows leaves out what does not run, unless all are wanted.
func filterRows(rows []podRow, all bool) (shown []podRow, hidden int) {
	shown = []podRow{}
	for _, r := range rows {
		if all || r.Status == "running" || r.Status == "created" {
			shown = append(shown, r)
		} else {
			hidden++
		}
	}
	return shown, hidden
}

func writePods(w io.Writer, rows []podRow, hidden int, now time.Time) error {
	tw := tabwriter.NewWriter(w, 0, 0, 3, ' ', 0)
	fmt.Fprintln(tw, "POD ID\tNAME\tIMAGE\tSTATUS\tAGE\tIP")
	for _, r := range rows {
		image := "-"
		if len(r.Containers) > 0 {
			image = shortRef(r.Containers[0].Image)
		}
		if n := len(r.Containers); n > 1 {
			image = fmt.Sprintf("%s +%d", image, n-1)
		}
		ip := r.IP
		if ip == "" {
			ip = "-"
		}
		fmt.Fprintf(tw, "%s\t%s\t%s\t%s\t%s\t%s\n", shortID(r.ID), r.Name, image, r.Status, age(now.Sub(r.Created)), ip)
	}
	if err := tw.Flush(); err != nil {
		return err
	}
	if hidden > 0 {
		_, err := fmt.Fprintf(w, "(%d ended; -a shows them)\n", hidden)
		return err
	}
	return nil
}

// age is a duration in its largest unit.
func age(d time.Duration) string {
	switch {
	case d < time.Minute:
		return fmt.Sprintf("%ds", int(max(0, d).Seconds()))
	case d < time.Hour:
		return fmt.Sprintf("%dm", int(d.Minutes()))
	case d < 48*time.Hour:
		return fmt.Sprintf("%dh", int(d.Hours()))
	}
	return fmt.Sprintf("%dd", int(d.Hours()/24))
}

func writeJSON(w io.Writer, v any) error {
	enc := json.NewEncoder(w)
	enc.SetIndent("", "  ")
	return enc.Encode(v)
}
