package cli

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/hypernetes/hypernetes/cluster"
	"github.com/hypernetes/hypernetes/cluster/doctor"
	"github.com/hypernetes/hypernetes/cluster/layout"
	"github.com/hypernetes/hypernetes/cluster/settings"
	"github.com/hypernetes/hypernetes/cluster/status"
	"github.com/hypernetes/hypernetes/network/netns"
)

func newDoctorCommand() *cobra.Command {
	o := &nodeOptions{}
	cmd := &cobra.Command{
		Use:   "doctor",
		Short: "Check what this machine needs to run a node",
		Long:  "Checks each need and prints its result, the reason and the remedy. The exit code is 0\nif nothing needed is missing; warnings do not count.",
		Args:  noArgs,
	}
	o.add(cmd.Flags())
	_ = cmd.Flags().MarkHidden("ignore-preflight") // the flag is there, for up
	output := outputFlag(cmd)
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		if err := checkOutput(*output); err != nil {
			return err
		}
		a, l, err := find(o.name)
		if err != nil {
			return err
		}
		s, err := o.settings(l, cmd.Flags())
		if err != nil {
			return err
		}
		st, err := status.NewClient(l.StatusSocket()).Status(cmd.Context())
		running := err == nil && st.PID > 0 || holdsPorts(l, s)
		results := doctor.Run(cmd.Context(), doctor.Machine(doctor.Input{Artifacts: a, Settings: s, Running: running, Dial: dialNode(st)}))
		if *output == "json" {
			err = printJSON(cmd.OutOrStdout(), results)
		} else {
			err = printResults(cmd.OutOrStdout(), results)
		}
		if err != nil {
			return err
		}
		if bad := doctor.Failed(results); len(bad) > 0 {
			return becausef("H8S_PREFLIGHT", "%d needs of a node are not met", len(bad))
		}
		return nil
	}
	return cmd
}

// dialNode reaches the network of a node that runs.
func dialNode(st status.Node) doctor.Dial {
	if st.Settings.HostNetwork {
		return (&net.Dialer{}).DialContext
	}
	if st.AnchorPID <= 0 {
		return nil
	}
	return func(ctx context.Context, network, address string) (net.Conn, error) {
		ns, err := netns.Open(fmt.Sprintf("/proc/%d/ns/net", st.AnchorPID))
		if err != nil {
			return nil, err
		}
		defer ns.Close()
		return ns.DialContext(ctx, network, address)
	}
}

// holdsPorts reports whether components that outlived their daemon have the ports of a
// node on the machine's own network; those of any other node end with the daemon.
func holdsPorts(l layout.Node, s settings.Node) bool {
	return s.HostNetwork && cluster.Absent(l).Phase == status.Headless
}

var marks = map[doctor.Verdict]string{doctor.Pass: "✓", doctor.Warn: "!", doctor.Fail: "✗"}

func printResults(w io.Writer, results []doctor.Result) error {
	for _, r := range results {
		if _, err := fmt.Fprintf(w, "%s %-22s %s\n", marks[r.Verdict], r.ID, r.Reason); err != nil {
			return err
		}
		if r.Remedy != "" {
			fmt.Fprintf(w, "  %-22s → %s\n", "", r.Remedy)
		}
	}
	return nil
}

// unmet is the error that names needs which are not met; a need with a reason of its
// own decides the advice, else it is that of all of them.
func unmet(bad []doctor.Result) error {
	id := "H8S_PREFLIGHT"
	texts := make([]string, 0, len(bad))
	for _, r := range bad {
		texts = append(texts, fmt.Sprintf("%s: %s (%s)", r.ID, r.Reason, r.Remedy))
		if slices.ContainsFunc(reasons, func(known Reason) bool { return known.ID == r.Code }) {
			id = r.Code
		}
	}
	return because(id, errors.New(strings.Join(texts, "; ")))
}

// preflight runs the doctor before a start: failures end it unless they are ignored,
// warnings are only counted.
func preflight(ctx context.Context, a layout.Artifacts, l layout.Node, s settings.Node, ignore bool, p *progress) error {
	began := time.Now()
	p.event(status.Event{Kind: status.Begin, Name: "preflight"})
	results := doctor.Run(ctx, doctor.Machine(doctor.Input{Artifacts: a, Settings: s, Quick: true, Running: holdsPorts(l, s)}))
	message := ""
	for _, r := range results {
		if r.Verdict == doctor.Warn {
			if message != "" {
				message += ", "
			}
			message += r.Code
		}
	}
	if message != "" {
		message = "warnings: " + message + " (h8s doctor explains)"
	}
	bad := doctor.Failed(results)
	if len(bad) > 0 && !ignore {
		p.end()
		return unmet(bad)
	}
	p.event(status.Event{Kind: status.Step, Name: "preflight", Seconds: time.Since(began).Seconds(), Message: message})
	return nil
}
