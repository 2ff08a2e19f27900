package cli

import (
	"context"
	"fmt"
	"os"
	"text/tabwriter"
	"time"

	"github.com/containerd/errdefs"
	"github.com/spf13/cobra"

	"github.com/hypernetes/hypernetes/cluster"
	"github.com/hypernetes/hypernetes/cluster/apiclient"
	"github.com/hypernetes/hypernetes/cluster/layout"
	"github.com/hypernetes/hypernetes/cluster/settings"
	"github.com/hypernetes/hypernetes/cluster/token"
)

func newTokenCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use: "token", Short: "Make, list and revoke the tokens by which agents join",
		Long: "A token lets agents join the cluster until it expires or is revoked; nodes that have\njoined do not need it any more. To rotate it, make another and revoke the old one.",
	}
	cmd.AddCommand(newTokenCreateCommand(), newTokenListCommand(), newTokenRevokeCommand())
	return cmd
}

// admin returns a client of the node's cluster for its administrator.
func admin(l layout.Node) (*apiclient.Client, settings.Node, error) {
	if err := needRoot(); err != nil {
		return nil, settings.Node{}, err
	}
	api, s, err := cluster.AdminClient(l)
	if errdefs.IsNotFound(err) || os.IsNotExist(err) {
		err = notRunning(l)
	}
	return api, s, err
}

func newTokenCreateCommand() *cobra.Command {
	var ttl time.Duration
	var description string
	cmd := &cobra.Command{
		Use: "create", Short: "Make a join token and print it", Args: noArgs,
		Long: "Makes a join token and prints it alone on standard output, and how to use it on\nstandard error.",
	}
	name := nodeFlag(cmd)
	cmd.Flags().DurationVar(&ttl, "ttl", 24*time.Hour, "how long it can be used; 0 for ever")
	cmd.Flags().StringVar(&description, "description", "", "what it is for, shown by h8s token list")
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		if ttl != 0 && ttl < time.Minute {
			return fmt.Errorf("ttl %s: want at least 1m, or 0 for no end: %w", ttl, errdefs.ErrInvalidArgument)
		}
		_, l, err := find(*name)
		if err != nil {
			return err
		}
		api, s, err := admin(l)
		if err != nil {
			return err
		}
		defer api.Close()
		t, err := makeToken(cmd.Context(), api, s, ttl, description)
		if err != nil {
			return err
		}
		fmt.Fprintln(cmd.OutOrStdout(), t.Printed())
		if s.HostNetwork {
			fmt.Fprintf(cmd.ErrOrStderr(), "On the machine that is to join: h8s agent --server %s --token-file FILE\n", s.APIServer())
		} else {
			fmt.Fprintf(cmd.ErrOrStderr(), "Other machines do not reach this node, only one of h8s server; h8s dev nodes N makes more here.\n")
		}
		return nil
	}
	return cmd
}

// makeToken makes and stores a token of the cluster whose first node has the settings.
func makeToken(ctx context.Context, api *apiclient.Client, s settings.Node, ttl time.Duration, description string) (token.Token, error) {
	l, err := layout.NewNode(s.Name)
	if err != nil {
		return token.Token{}, err
	}
	ca, err := os.ReadFile(l.PKI("ca.crt"))
	if err != nil {
		return token.Token{}, err
	}
	t, err := token.New(ca)
	if err != nil {
		return t, err
	}
	return t, token.Create(ctx, api, t, ttl, description, time.Now())
}

func newTokenListCommand() *cobra.Command {
	cmd := &cobra.Command{Use: "list", Short: "List join tokens, without their secrets", Args: noArgs}
	name, output := nodeFlag(cmd), outputFlag(cmd)
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		if err := checkOutput(*output); err != nil {
			return err
		}
		_, l, err := find(*name)
		if err != nil {
			return err
		}
		api, _, err := admin(l)
		if err != nil {
			return err
		}
		defer api.Close()
		list, err := token.List(cmd.Context(), api)
		if err != nil {
			return err
		}
		if *output == "json" {
			return printJSON(cmd.OutOrStdout(), list)
		}
		tw := tabwriter.NewWriter(cmd.OutOrStdout(), 2, 8, 2, ' ', 0)
		fmt.Fprintln(tw, "ID\tEXPIRES\tDESCRIPTION")
		now := time.Now()
		for _, i := range list {
			expires := "never"
			switch {
			case i.Expired(now):
				expires = "expired"
			case !i.Expires.IsZero():
				expires = "in " + i.Expires.Sub(now).Round(time.Minute).String()
			}
			fmt.Fprintf(tw, "%s\t%s\t%s\n", i.ID, expires, i.Description)
		}
		return tw.Flush()
	}
	return cmd
}

func newTokenRevokeCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use: "revoke ID...", Short: "Revoke join tokens; nodes that have joined stay", Args: cobra.MinimumNArgs(1),
	}
	name := nodeFlag(cmd)
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		_, l, err := find(*name)
		if err != nil {
			return err
		}
		api, _, err := admin(l)
		if err != nil {
			return err
		}
		defer api.Close()
		for _, text := range args {
			id, err := token.Revoke(cmd.Context(), api, text)
			if err != nil {
				return err
			}
			fmt.Fprintf(cmd.OutOrStdout(), "Token %s is revoked.\n", id)
		}
		return nil
	}
	return cmd
}
