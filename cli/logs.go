package cli

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/containerd/errdefs"
	"github.com/fsnotify/fsnotify"
	"github.com/spf13/cobra"

	"github.com/hypernetes/hypernetes/cluster"
	"github.com/hypernetes/hypernetes/cluster/layout"
)

func newLogsCommand() *cobra.Command {
	var follow bool
	var lines int
	var pod string
	cmd := &cobra.Command{
		Use:   "logs [COMPONENT]",
		Short: "Print the log of the daemon or of a component",
		Long:  "Prints the end of a component's log, or of h8s itself if none is named. What containers\nprint is read with h8s kubectl logs; --pod shows the console of a Pod's virtual machine,\nwhich is empty unless its kernel or agent has something to complain of.",
		Example: `  h8s logs kubelet -f
  h8s logs --pod kube-system/coredns-64d4fb4d5b-8q45w`,
		Args: cobra.MaximumNArgs(1),
	}
	name := nodeFlag(cmd)
	cmd.Flags().BoolVarP(&follow, "follow", "f", false, "go on printing what is appended")
	cmd.Flags().IntVar(&lines, "tail", 200, "number of lines from the end, -1 for all")
	cmd.Flags().StringVar(&pod, "pod", "", "console of the virtual machine of `[NAMESPACE/]POD` instead")
	cmd.MarkFlagsMutuallyExclusive("pod", "follow")
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		_, l, err := find(*name)
		if err != nil {
			return err
		}
		if pod != "" && len(args) > 0 {
			return becausef("H8S_USAGE", "logs: name a component or --pod, not both: %w", errdefs.ErrInvalidArgument)
		}
		if pod != "" {
			return printConsole(cmd, l, pod)
		}
		component := "h8s"
		if len(args) == 1 {
			component = args[0]
		}
		path, err := logPath(l, component)
		if err != nil {
			return err
		}
		return printLog(cmd.Context(), cmd.OutOrStdout(), path, lines, follow)
	}
	cmd.ValidArgsFunction = func(_ *cobra.Command, _ []string, _ string) ([]string, cobra.ShellCompDirective) {
		_, l, err := find(*name)
		if err != nil {
			return nil, cobra.ShellCompDirectiveError
		}
		return logNames(l), cobra.ShellCompDirectiveNoFileComp
	}
	return cmd
}

func printConsole(cmd *cobra.Command, l layout.Node, pod string) error {
	if err := needRoot(); err != nil {
		return err
	}
	if _, err := os.Stat(l.ContainerdSocket()); err != nil {
		return notRunning(l)
	}
	namespace, name, two := strings.Cut(pod, "/")
	if !two {
		namespace, name = "default", pod
	}
	text, err := cluster.Console(cmd.Context(), l, namespace, name)
	if err != nil {
		return err
	}
	_, err = io.WriteString(cmd.OutOrStdout(), text)
	return err
}

func logPath(l layout.Node, component string) (string, error) {
	names := logNames(l)
	if len(names) == 0 {
		return "", notRunning(l)
	}
	if !slices.Contains(names, component) {
		return "", becausef("H8S_NOT_FOUND", "no log of %q; there are: %s: %w", component, strings.Join(names, " "), errdefs.ErrNotFound)
	}
	return l.Log(component), nil
}

func logNames(l layout.Node) []string {
	files, _ := filepath.Glob(l.Log("*")) // the pattern is correct
	names := make([]string, 0, len(files))
	for _, f := range files {
		names = append(names, strings.TrimSuffix(filepath.Base(f), ".log"))
	}
	return names
}

func printLog(ctx context.Context, out io.Writer, path string, lines int, follow bool) error {
	f, err := os.Open(path)
	if errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("%s: %w", path, errdefs.ErrNotFound)
	}
	if err != nil {
		return err
	}
	defer f.Close()
	if err := seekLines(f, lines); err != nil {
		return err
	}
	if _, err := io.Copy(out, f); err != nil || !follow {
		return err
	}
	w, err := fsnotify.NewWatcher()
	if err != nil {
		return err
	}
	defer w.Close()
	if err := w.Add(path); err != nil {
		return err
	}
	for {
		if _, err := io.Copy(out, f); err != nil {
			return err
		}
		select {
		case <-ctx.Done():
			return nil
		case err := <-w.Errors:
			return err
		case e := <-w.Events:
			if e.Has(fsnotify.Remove) || e.Has(fsnotify.Rename) {
				return nil
			}
		}
	}
}

// seekLines moves f to the beginning of the n-th line from its end.
func seekLines(f io.ReadSeeker, n int) error {
	if n < 0 {
		return nil
	}
	end, err := f.Seek(0, io.SeekEnd)
	if err != nil {
		return err
	}
	const block = 64 << 10
	buf := make([]byte, block)
	newlines := 0
	for pos := end; pos > 0; {
		size := min(pos, block)
		pos -= size
		if _, err := f.Seek(pos, io.SeekStart); err != nil {
			return err
		}
		if _, err := io.ReadFull(f, buf[:size]); err != nil {
			return err
		}
		for i := size - 1; i >= 0; i-- {
			if buf[i] != '\n' || pos+i == end-1 {
				continue
			}
			if newlines++; newlines == n {
				_, err := f.Seek(pos+i+1, io.SeekStart)
				return err
			}
		}
	}
	if n == 0 {
		_, err = f.Seek(end, io.SeekStart)
	} else {
		_, err = f.Seek(0, io.SeekStart)
	}
	return err
}
