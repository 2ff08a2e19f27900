package testcluster

import (
	"encoding/json"
	"fmt"
	"slices"
	"strings"
)

// Pod is the part of a Pod tests look at. Kubernetes' own types would triple the
// time it takes to build the tests.
type Pod struct {
	Metadata struct {
		Name, UID string
	}
	Status PodStatus
}

// PodStatus is a Pod's status.
type PodStatus struct {
	Phase, Reason, Message, PodIP, HostIP, QOSClass string
	ContainerStatuses, InitContainerStatuses        []ContainerStatus
	EphemeralContainerStatuses                      []ContainerStatus
}

// ContainerStatus is a container's status.
type ContainerStatus struct {
	Name, ContainerID string
	Ready             bool
	Started           bool
	RestartCount      int
	State, LastState  ContainerState
}

// ContainerState holds one of three.
type ContainerState struct {
	Waiting    *struct{ Reason, Message string }
	Running    *struct{ StartedAt string }
	Terminated *Terminated
}

// Terminated is how a container ended.
type Terminated struct {
	ExitCode, Signal                       int
	Reason, Message, StartedAt, FinishedAt string
}

// Pod reads a Pod.
func (n *Namespace) Pod(name string) Pod {
	n.t.Helper()
	var p Pod
	if err := json.Unmarshal([]byte(n.Kubectl("get", "pod", name, "-o", "json")), &p); err != nil {
		n.t.Fatalf("pod %s: %v", name, err)
	}
	return p
}

// Container finds a container's status, init and ephemeral containers included.
func (p Pod) Container(name string) ContainerStatus {
	for _, list := range [][]ContainerStatus{p.Status.ContainerStatuses, p.Status.InitContainerStatuses, p.Status.EphemeralContainerStatuses} {
		for _, c := range list {
			if c.Name == name {
				return c
			}
		}
	}
	return ContainerStatus{Name: name}
}

// Ended waits until a container of a Pod has terminated and will not be restarted,
// and returns how.
func (n *Namespace) Ended(pod, container string) Terminated {
	n.t.Helper()
	list := "containerStatuses"
	// The status lists them only from the Pod's first sync on.
	if slices.Contains(strings.Fields(n.Get("pod/"+pod, ".spec.initContainers[*].name")), container) {
		list = "initContainerStatuses"
	}
	n.Wait("pod/"+pod, fmt.Sprintf(`jsonpath={.status.%s[?(@.name=="%s")].state.terminated.finishedAt}`, list, container))
	return *n.Pod(pod).Container(container).State.Terminated
}

// Restarts waits until a container has been restarted at least count times and runs.
func (n *Namespace) Restarts(pod, container string, count int) ContainerStatus {
	n.t.Helper()
	var status ContainerStatus
	n.Until(fmt.Sprintf("container %s/%s runs again after %d restarts", pod, container, count), Patience, func() bool {
		status = n.Pod(pod).Container(container)
		return status.RestartCount >= count && status.State.Running != nil
	})
	return status
}
