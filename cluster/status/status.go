// Package status owns what a node's daemon tells others about itself, as JSON over
// HTTP on a unix socket: its status, the progress of starting and stopping, and the
// request to stop. It must not know how any of it comes about.
package status

import (
	"time"

	"github.com/hypernetes/hypernetes/cluster/settings"
	"github.com/hypernetes/hypernetes/cluster/supervisor"
)

// Phase of the node.
type Phase string

// Phases of a node.
const (
	// Absent: nothing of the node runs.
	Absent Phase = "absent"
	// Headless: the node runs but its daemon does not.
	Headless Phase = "headless"
	Starting Phase = "starting"
	Running  Phase = "running"
	// Degraded: started, but a component is not ready now.
	Degraded Phase = "degraded"
	Stopping Phase = "stopping"
	Failed   Phase = "failed"
)

// Node is the answer to GET /v1/status.
type Node struct {
	Name       string              `json:"name"`
	Phase      Phase               `json:"phase"`
	PID        int                 `json:"pid,omitempty"`
	AnchorPID  int                 `json:"anchorPid,omitempty"`
	Started    time.Time           `json:"started,omitzero"`
	ReadyAfter float64             `json:"readySeconds,omitempty"`
	Server     string              `json:"server,omitempty"`
	Kubeconfig string              `json:"kubeconfig,omitempty"`
	Settings   settings.Node       `json:"settings"`
	Components []supervisor.Status `json:"components"`
	Steps      []Event             `json:"steps,omitempty"`
	Error      string              `json:"error,omitempty"`
	// Nodes are the further nodes of this machine (h8s dev nodes).
	Nodes []Further `json:"nodes,omitempty"`
	// OpenStack is how the cluster's cloud is, if it has one.
	OpenStack *OpenStack `json:"openStack,omitempty"`
}

// OpenStack says whether the cluster's cloud answers, as seen from the node.
type OpenStack struct {
	Answers bool   `json:"answers"`
	Message string `json:"message"`
}

// Further is another node of the machine in the same cluster.
type Further struct {
	Name  string `json:"name"`
	Phase Phase  `json:"phase"`
	IP    string `json:"ip"`
}

// Kind of an event.
type Kind string

// Kinds of events.
const (
	// Step: something is finished and took Seconds.
	Step Kind = "step"
	// Begin: something has begun; a terminal shows it until its step.
	Begin Kind = "begin"
	Warn  Kind = "warning"
	// Done ends a stream of events successfully, Fail unsuccessfully.
	Done Kind = "done"
	Fail Kind = "fail"
)

// Event is one piece of progress.
type Event struct {
	Kind    Kind    `json:"kind"`
	Name    string  `json:"name,omitempty"`
	Seconds float64 `json:"seconds,omitempty"`
	Message string  `json:"message,omitempty"`
	// Reason is a stable identifier with advice in package cli.
	Reason string `json:"reason,omitempty"`
}
