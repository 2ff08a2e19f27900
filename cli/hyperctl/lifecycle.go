package hyperctl

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"github.com/containerd/errdefs"
	"github.com/spf13/cobra"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"
)

func newStopCommand(o *options) *cobra.Command {
	var timeout int64
	cmd := &cobra.Command{
		Use:   "stop [flags] POD...",
		Short: "Stop Pods: SIGTERM, and after a time SIGKILL; their machines go away",
		Args:  cobra.MinimumNArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			return o.eachPod(cmd, args, func(ctx context.Context, h *hyper, pod *cri.PodSandbox) error {
				return h.stopPod(ctx, pod.Id, timeout)
			})
		},
	}
	cmd.Flags().Int64VarP(&timeout, "time", "t", stopTimeout, "`SECONDS` to wait before SIGKILL")
	return cmd
}

func newRemoveCommand(o *options) *cobra.Command {
	var force, all bool
	cmd := &cobra.Command{
		Use:   "rm [flags] POD...",
		Short: "Remove stopped Pods, with -f also running ones",
		RunE: func(cmd *cobra.Command, args []string) error {
			if all == (len(args) > 0) {
				return fmt.Errorf("rm: name Pods, or give --all: %w", errdefs.ErrInvalidArgument)
			}
			if all {
				var err error
				if args, err = o.ownPods(cmd.Context()); err != nil {
					return err
				}
			}
			return o.eachPod(cmd, args, func(ctx context.Context, h *hyper, pod *cri.PodSandbox) error {
				if !force {
					if err := h.mustBeStopped(ctx, pod); err != nil {
						return err
					}
				}
				return h.removePod(ctx, pod.Id)
			})
		},
	}
	cmd.Flags().BoolVarP(&force, "force", "f", false, "stop running Pods first")
	cmd.Flags().BoolVarP(&all, "all", "a", false, "all Pods that hyperctl made")
	return cmd
}

// eachPod does something to every Pod named and prints the names it was done
// to; one failure does not keep the others from it.
func (o *options) eachPod(cmd *cobra.Command, refs []string, do func(context.Context, *hyper, *cri.PodSandbox) error) error {
	h, err := o.connect(cmd.Context(), cmd.ErrOrStderr())
	if err != nil {
		return err
	}
	defer h.close()
	var failed []error
	for _, ref := range refs {
		pod, err := h.findPod(cmd.Context(), ref)
		if err == nil {
			err = do(cmd.Context(), h, pod)
		}
		if err != nil {
			failed = append(failed, err)
			continue
		}
		fmt.Fprintln(cmd.OutOrStdout(), ref)
	}
	return errors.Join(failed...)
}

func (o *options) ownPods(ctx context.Context) ([]string, error) {
	h, err := o.connect(ctx, os.Stderr)
	if err != nil {
		return nil, err
	}
	defer h.close()
	resp, err := h.pods.ListPodSandbox(ctx, &cri.ListPodSandboxRequest{
		Filter: &cri.PodSandboxFilter{LabelSelector: map[string]string{labelManaged: "true"}},
	})
	if err != nil {
		return nil, h.explain("list Pods", err)
	}
	var ids []string
	for _, p := range resp.Items {
		ids = append(ids, p.Id)
	}
	return ids, nil
}

// mustBeStopped refuses a Pod in which something runs.
func (h *hyper) mustBeStopped(ctx context.Context, pod *cri.PodSandbox) error {
	resp, err := h.pods.ListContainers(ctx, &cri.ListContainersRequest{
		Filter: &cri.ContainerFilter{PodSandboxId: pod.Id, State: &cri.ContainerStateValue{State: cri.ContainerState_CONTAINER_RUNNING}},
	})
	if err != nil {
		return h.explain("list containers", err)
	}
	if len(resp.Containers) > 0 {
		return fmt.Errorf("pod %s is running; stop it first, or use rm -f: %w", pod.Metadata.Name, errdefs.ErrFailedPrecondition)
	}
	return nil
}

// stopPod ends the containers, then the sandbox.
func (h *hyper) stopPod(ctx context.Context, id string, timeout int64) error {
	resp, err := h.pods.ListContainers(ctx, &cri.ListContainersRequest{Filter: &cri.ContainerFilter{PodSandboxId: id}})
	if err != nil {
		return h.explain("list containers", err)
	}
	var failed []error
	for _, c := range resp.Containers {
		_, err := h.pods.StopContainer(ctx, &cri.StopContainerRequest{ContainerId: c.Id, Timeout: timeout})
		failed = append(failed, h.explain("stop container", err))
	}
	_, err = h.pods.StopPodSandbox(ctx, &cri.StopPodSandboxRequest{PodSandboxId: id})
	return errors.Join(append(failed, h.explain("stop Pod", err))...)
}

// removePod stops and removes a Pod and its log directory, which is ours: no
// kubelet would do it.
func (h *hyper) removePod(ctx context.Context, id string) error {
	var logs string
	if resp, err := h.pods.ListContainers(ctx, &cri.ListContainersRequest{Filter: &cri.ContainerFilter{
		PodSandboxId: id, LabelSelector: map[string]string{labelManaged: "true"},
	}}); err == nil && len(resp.Containers) > 0 {
		if file, err := h.logFile(ctx, resp.Containers[0].Id); err == nil {
			logs = filepath.Dir(file)
		}
	}
	if err := h.stopPod(ctx, id, stopTimeout); err != nil {
		return err
	}
	if _, err := h.pods.RemovePodSandbox(ctx, &cri.RemovePodSandboxRequest{PodSandboxId: id}); err != nil {
		return h.explain("remove Pod", err)
	}
	if !strings.HasPrefix(logs, h.logs+string(filepath.Separator)) {
		return nil
	}
	return os.RemoveAll(logs)
}
