package hyperctl

import (
	"errors"

	"github.com/spf13/cobra"
)

func newExecCommand(o *options) *cobra.Command {
	var stdin, tty bool
	var container string
	cmd := &cobra.Command{
		Use:     "exec [flags] POD|CONTAINER COMMAND [ARG...]",
		Short:   "Run a command in a running Pod",
		Example: "  hyperctl exec -t $POD /bin/bash\n  tar c . | hyperctl exec -i $POD tar x -C /srv",
		Args:    cobra.MinimumNArgs(2),
		RunE: func(cmd *cobra.Command, args []string) error {
			h, err := o.connect(cmd.Context(), cmd.ErrOrStderr())
			if err != nil {
				return err
			}
			defer h.close()
			c, err := h.findContainer(cmd.Context(), args[0], container)
			if err != nil {
				return err
			}
			t := terminalOf(cmd)
			if !tty {
				s := streamOptions{stdout: t.out, stderr: t.err}
				if stdin {
					s.stdin = t.in
				}
				return h.exec(cmd.Context(), c.Id, args[1:], s)
			}
			return t.raw(func(resize <-chan windowSize) error {
				return h.exec(cmd.Context(), c.Id, args[1:], streamOptions{stdin: t.input(stdin), stdout: t.out, tty: true, resize: resize})
			})
		},
	}
	cmd.Flags().SetInterspersed(false) // flags after POD are the command's
	cmd.Flags().BoolVarP(&stdin, "interactive", "i", false, "connect standard input")
	cmd.Flags().BoolVarP(&tty, "tty", "t", false, "give the command a terminal (implies -i if there is one here)")
	cmd.Flags().StringVar(&container, "container", "", "`NAME` of the container, if the Pod has several")
	return cmd
}

func newAttachCommand(o *options) *cobra.Command {
	var container string
	var noStdin bool
	cmd := &cobra.Command{
		Use:   "attach POD|CONTAINER",
		Short: "Connect to the process of a Pod; leave with ^P^Q",
		Args:  cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			h, err := o.connect(cmd.Context(), cmd.ErrOrStderr())
			if err != nil {
				return err
			}
			defer h.close()
			c, err := h.findContainer(cmd.Context(), args[0], container)
			if err != nil {
				return err
			}
			is, err := h.ioOf(cmd.Context(), c.Id)
			if err != nil {
				return err
			}
			t := terminalOf(cmd)
			s := streamOptions{stdout: t.out, stderr: t.err, tty: is.TTY, holdInput: !is.StdinOnce}
			if is.Stdin && !noStdin {
				s.stdin = detachable(t.in)
			}
			if is.TTY {
				err = t.raw(func(resize <-chan windowSize) error {
					s.resize = resize
					return h.attach(cmd.Context(), c.Id, s)
				})
			} else {
				err = h.attach(cmd.Context(), c.Id, s)
			}
			if errors.Is(err, errDetached) {
				return nil
			}
			return err
		},
	}
	cmd.Flags().StringVar(&container, "container", "", "`NAME` of the container, if the Pod has several")
	cmd.Flags().BoolVar(&noStdin, "no-stdin", false, "only watch")
	return cmd
}
