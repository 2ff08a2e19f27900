package hyperctl

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"strings"
	"syscall"

	"github.com/containerd/errdefs"
	"github.com/spf13/cobra"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/hypernetes/hypernetes/cluster/image"
	"github.com/hypernetes/hypernetes/cluster/layout"
)

// stopTimeout is how long, in seconds, a process may take to end on SIGTERM.
const stopTimeout = 10

func newRunCommand(o *options) *cobra.Command {
	var r runOptions
	cmd := &cobra.Command{
		Use:     "run [flags] IMAGE [COMMAND [ARG...]]",
		Short:   "Run an image in a new Pod",
		Long:    "Runs an image in a Pod of its own, that is, in a new virtual machine. In the\nforeground the exit code is the process's; with -d the Pod's id is printed.",
		Example: "  hyperctl run -d --name web -p 8080:80 nginx\n  hyperctl run -it --rm -m 128M -c 1 busybox sh",
		Args:    cobra.MinimumNArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			r.image, r.command = args[0], args[1:]
			// Before a node is started for what cannot run on it.
			if _, err := newSpec(r, "", ""); err != nil {
				return err
			}
			h, err := o.connect(cmd.Context(), cmd.ErrOrStderr())
			if err != nil {
				return err
			}
			defer h.close()
			return h.run(cmd.Context(), r, o.handler, terminalOf(cmd))
		},
	}
	f := cmd.Flags()
	f.SetInterspersed(false) // flags after IMAGE are the command's
	f.BoolVarP(&r.detach, "detach", "d", false, "print the Pod's id and leave it running")
	f.BoolVarP(&r.stdin, "interactive", "i", false, "connect standard input")
	f.BoolVarP(&r.tty, "tty", "t", false, "give the process a terminal (implies -i if there is one here)")
	f.StringVar(&r.name, "name", "", "`NAME` of the Pod (default: image and ten digits)")
	f.StringVar(&r.hostname, "hostname", "", "host name inside the Pod (default: its name)")
	f.StringVarP(&r.memory, "memory", "m", "", "memory limit as `SIZE`, for instance 256M (default: the runtime's)")
	f.Float64VarP(&r.cpus, "cpus", "c", 0, "CPU limit, for instance 0.5 (default: the runtime's)")
	f.StringArrayVarP(&r.publish, "publish", "p", nil, "publish `HOSTPORT:PORT[/udp]` on the node; `h8s up --publish HOSTPORT` makes that reachable on this machine")
	f.StringArrayVarP(&r.env, "env", "e", nil, "set `NAME=VALUE` in the environment")
	f.StringVarP(&r.workdir, "workdir", "w", "", "working directory")
	f.StringVar(&r.entrypoint, "entrypoint", "", "replace the image's entry point")
	f.StringVarP(&r.user, "user", "u", "", "run as `USER`, UID or UID:GID")
	f.BoolVar(&r.remove, "rm", false, "remove the Pod when the process ends")
	f.BoolVar(&r.readOnly, "read-only", false, "make the root file system read-only")
	f.BoolVar(&r.privileged, "privileged", false, "all capabilities and devices of the Pod's own machine")
	f.StringVar(&r.pull, "pull", "missing", "pull the image: missing, always or never")
	f.StringVar(&o.handler, "runtime", envOr("HYPERCTL_RUNTIME", "hyper"), "runtime handler of the Pod ($HYPERCTL_RUNTIME)")
	return cmd
}

// run makes a Pod with one container and, unless detached, stays with it.
func (h *hyper) run(ctx context.Context, o runOptions, handler string, t *terminal) (err error) {
	s, err := newSpec(o, h.logs, h.cgroupParent)
	if err != nil {
		return err
	}
	if err := h.nameIsFree(ctx, s.pod.Metadata.Name); err != nil {
		return err
	}
	if err := h.haveImage(ctx, o.image, o.pull); err != nil {
		return err
	}
	podID, ctrID, err := h.create(ctx, s, handler)
	if err != nil {
		return err
	}
	left := false
	if o.remove {
		defer func() {
			if left {
				return // on purpose; so it is not removed either
			}
			if rmErr := h.removePod(context.WithoutCancel(ctx), podID); rmErr != nil {
				err = errors.Join(err, rmErr)
			}
		}()
	}
	w, err := h.watchExit(ctx, ctrID)
	if err != nil {
		return err
	}
	defer w.stop()
	if _, err := h.pods.StartContainer(ctx, &cri.StartContainerRequest{ContainerId: ctrID}); err != nil {
		return errors.Join(notStarted(h.explain("start", err)), h.removePod(context.WithoutCancel(ctx), podID))
	}
	if o.detach {
		_, err := fmt.Fprintln(t.out, podID)
		return err
	}
	err = h.foreground(ctx, o, ctrID, w, t)
	if errors.Is(err, errDetached) {
		left = true
		_, err = fmt.Fprintf(t.err, "left running; back by: hyperctl attach %s\n", s.pod.Metadata.Name)
	}
	return err
}

// nameIsFree refuses a second Pod of the same name: the runtime would take it,
// but the name would no longer say which one is meant.
func (h *hyper) nameIsFree(ctx context.Context, name string) error {
	resp, err := h.pods.ListPodSandbox(ctx, &cri.ListPodSandboxRequest{
		Filter: &cri.PodSandboxFilter{LabelSelector: map[string]string{labelManaged: "true", labelPodName: name}},
	})
	if err != nil {
		return h.explain("list Pods", err)
	}
	if len(resp.Items) > 0 {
		return fmt.Errorf("name %q is taken by Pod %s; choose another, or `hyperctl rm -f %s`: %w", name, shortID(resp.Items[0].Id), name, errdefs.ErrAlreadyExists)
	}
	return nil
}

// create makes the sandbox and the container; on failure nothing stays.
func (h *hyper) create(ctx context.Context, s *spec, handler string) (podID, ctrID string, err error) {
	pod, err := h.pods.RunPodSandbox(ctx, &cri.RunPodSandboxRequest{Config: s.pod, RuntimeHandler: handler})
	if err != nil {
		return "", "", h.explain("start the Pod", err)
	}
	podID = pod.PodSandboxId
	ctr, err := h.pods.CreateContainer(ctx, &cri.CreateContainerRequest{PodSandboxId: podID, Config: s.container, SandboxConfig: s.pod})
	if err != nil {
		return "", "", errors.Join(h.explain("create the container", err), h.removePod(context.WithoutCancel(ctx), podID))
	}
	return podID, ctr.ContainerId, nil
}

// haveImage makes sure the image is on the node, or says what can be done.
func (h *hyper) haveImage(ctx context.Context, ref, policy string) error {
	spec := &cri.ImageSpec{Image: ref}
	if policy != "always" {
		st, err := h.images.ImageStatus(ctx, &cri.ImageStatusRequest{Image: spec})
		if err != nil {
			return h.explain("look for image "+ref, err)
		}
		if st.Image != nil {
			return nil
		}
	}
	if policy == "missing" {
		if loaded, err := h.loadShipped(ctx, ref); loaded || err != nil {
			return err
		}
	}
	reason := "and --pull never forbids to fetch it"
	if policy != "never" {
		_, err := h.images.PullImage(ctx, &cri.PullImageRequest{Image: spec})
		if err == nil {
			return nil
		}
		// The runtime names h8s's own remedy; ours follows.
		cause, _, _ := strings.Cut(h.explain("pull", err).Error(), "; without a registry")
		reason = "and cannot be pulled: " + cause
	}
	return fmt.Errorf("image %q is not on the node, %s\n  load it:      hyperctl load FILE.tar   (from `docker save` or `h8s image build`)\n  or use one of: %s: %w",
		ref, reason, strings.Join(h.imageNames(ctx), ", "), errdefs.ErrNotFound)
}

// loadShipped loads the image if an archive that came along with h8s has it.
func (h *hyper) loadShipped(ctx context.Context, ref string) (bool, error) {
	artifacts, err := layout.FindArtifacts()
	if err != nil {
		return false, err
	}
	file, err := image.FindArchive(artifacts.ImagesDir(), ref)
	if errors.Is(err, errdefs.ErrNotFound) {
		return false, nil
	}
	if err != nil {
		return false, err
	}
	s, err := h.store()
	if err != nil {
		return false, err
	}
	_, err = s.Load(ctx, file)
	return err == nil, err
}

// imageNames are the images one could use instead, by their short names.
func (h *hyper) imageNames(ctx context.Context) []string {
	resp, err := h.images.ListImages(ctx, &cri.ListImagesRequest{})
	if err != nil || len(resp.Images) == 0 {
		return []string{"(none are loaded)"}
	}
	var out []string
	for _, i := range resp.Images {
		if len(i.RepoTags) > 0 {
			out = append(out, shortRef(i.RepoTags[0]))
		}
	}
	return out
}

// shortRef is a reference as one would type it.
func shortRef(ref string) string {
	ref = strings.TrimPrefix(ref, "docker.io/library/")
	ref = strings.TrimPrefix(ref, "docker.io/")
	return strings.TrimSuffix(ref, ":latest")
}

// foreground shows the process's output until it ends, passes on input and
// signals, and turns its exit code into ours.
func (h *hyper) foreground(ctx context.Context, o runOptions, ctrID string, w *exitWatch, t *terminal) error {
	signals := make(chan os.Signal, 2)
	signal.Notify(signals, syscall.SIGINT, syscall.SIGTERM)
	defer signal.Stop(signals)
	stopped := make(chan error, 1)
	ended := make(chan struct{})
	go func() {
		select {
		case <-signals:
			_, err := h.pods.StopContainer(context.WithoutCancel(ctx), &cri.StopContainerRequest{ContainerId: ctrID, Timeout: stopTimeout})
			stopped <- h.explain("stop", err)
		case <-ended:
			stopped <- nil
		}
	}()
	var err error
	if o.tty {
		err = h.runTerminal(ctx, o.stdin, ctrID, w, t)
	} else {
		err = h.runPlain(ctx, o.stdin, ctrID, w, t)
	}
	if errors.Is(err, errDetached) {
		close(ended)
		return errors.Join(<-stopped, err)
	}
	code, waitErr := w.wait(ctx)
	close(ended)
	if err = errors.Join(<-stopped, waitErr, err); err != nil {
		return err
	}
	if code != 0 {
		return &ExitError{Code: int(code)}
	}
	return nil
}

// runPlain follows the log, which has everything from the first byte on,
// where an attached stream would begin somewhere.
func (h *hyper) runPlain(ctx context.Context, stdin bool, ctrID string, w *exitWatch, t *terminal) error {
	if stdin {
		// Ends with the container; its error says only that it had ended first.
		go func() { _ = h.attach(ctx, ctrID, streamOptions{stdin: t.in}) }()
	}
	file, err := h.logFile(ctx, ctrID)
	if err != nil {
		return err
	}
	return followLog(ctx, file, logOptions{follow: true, done: w.done, stdout: t.out, stderr: t.err})
}

// runTerminal attaches; what the process said before that is in the log.
func (h *hyper) runTerminal(ctx context.Context, stdin bool, ctrID string, w *exitWatch, t *terminal) error {
	var seen countingWriter
	seen.w = t.out
	err := t.raw(func(resize <-chan windowSize) error {
		return h.attach(ctx, ctrID, streamOptions{stdin: detachable(t.input(stdin)), stdout: &seen, tty: true, resize: resize})
	})
	if errors.Is(err, errDetached) {
		return err
	}
	if _, waitErr := w.wait(ctx); waitErr != nil {
		return errors.Join(err, waitErr)
	}
	if seen.n > 0 {
		return err
	}
	file, logErr := h.logFile(ctx, ctrID)
	if logErr != nil {
		return errors.Join(err, logErr)
	}
	return followLog(ctx, file, logOptions{stdout: t.out, stderr: t.out})
}

type countingWriter struct {
	w io.Writer
	n int64
}

func (c *countingWriter) Write(p []byte) (int, error) {
	n, err := c.w.Write(p)
	c.n += int64(n)
	return n, err
}
