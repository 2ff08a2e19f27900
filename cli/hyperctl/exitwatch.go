package hyperctl

import (
	"context"
	"fmt"
	"time"

	cri "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// exitWatch waits for one container to end.
type exitWatch struct {
	h      *hyper
	id     string
	done   chan struct{} // closed when the container has ended or err is set
	err    error
	cancel context.CancelFunc
}

// watchExit begins to watch; call it before the container starts.
func (h *hyper) watchExit(ctx context.Context, id string) (*exitWatch, error) {
	ctx, cancel := context.WithCancel(ctx)
	events, err := h.pods.GetContainerEvents(ctx, &cri.GetEventsRequest{})
	if err != nil {
		cancel()
		return nil, h.explain("watch the container", err)
	}
	w := &exitWatch{h: h, id: id, done: make(chan struct{}), cancel: cancel}
	ended := make(chan error, 1)
	go func() { ended <- receiveExit(events, id) }()
	go w.watch(ctx, ended)
	return w, nil
}

func receiveExit(events cri.RuntimeService_GetContainerEventsClient, id string) error {
	for {
		e, err := events.Recv()
		if err != nil {
			return err
		}
		switch e.ContainerEventType {
		case cri.ContainerEventType_CONTAINER_STOPPED_EVENT, cri.ContainerEventType_CONTAINER_DELETED_EVENT:
			if e.ContainerId == id {
				return nil
			}
		}
	}
}

// watch believes events, and looks for itself now and then: the call that
// opens the stream returns before the runtime has registered it, so the exit
// of a very short process can slip through.
func (w *exitWatch) watch(ctx context.Context, ended <-chan error) {
	defer close(w.done)
	tick := time.NewTicker(time.Second)
	defer tick.Stop()
	for {
		select {
		case err := <-ended:
			w.err = w.h.explain("watch the container", err)
			return
		case <-tick.C:
			st, err := w.h.pods.ContainerStatus(ctx, &cri.ContainerStatusRequest{ContainerId: w.id})
			if err == nil && st.Status.State == cri.ContainerState_CONTAINER_EXITED {
				w.cancel()
				<-ended
				return
			}
		}
	}
}

func (w *exitWatch) stop() {
	w.cancel()
	<-w.done
}

// wait returns the exit code once the container has ended. An event can come
// a moment before the status says so.
func (w *exitWatch) wait(ctx context.Context) (int32, error) {
	<-w.done
	if w.err != nil {
		return 0, w.err
	}
	ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	for {
		st, err := w.h.pods.ContainerStatus(ctx, &cri.ContainerStatusRequest{ContainerId: w.id})
		if err != nil {
			return 0, w.h.explain("container status", err)
		}
		if st.Status.State == cri.ContainerState_CONTAINER_EXITED {
			return st.Status.ExitCode, nil
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			return 0, fmt.Errorf("container %s: %s after its exit was announced: %w", w.id, st.Status.State, ctx.Err())
		}
	}
}
