package cli

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"

	"github.com/containerd/errdefs"
)

// Reason explains a failure: a stable identifier, the exit code of the command that
// hits it, and what to do. Identifiers and codes never change their meaning.
type Reason struct {
	ID     string
	Exit   int
	Advice string
}

// Exit codes below 10 are general; each reason has its own from 10.
const (
	exitFailure = 1
	exitUsage   = 2
)

var reasons = []Reason{
	{"H8S_USAGE", exitUsage, "See the command's --help."},
	{"H8S_NOT_ROOT", 10, "Run the command as root, for example with sudo."},
	{"H8S_PREFLIGHT", 11, "Run h8s doctor: it names each missing piece and its remedy. --ignore-preflight starts anyway."},
	{"H8S_PORT_IN_USE", 12, "Choose another port: --api-port for the API server, --publish HOSTPORT:NODEPORT for published ports."},
	{"H8S_NOT_RUNNING", 13, "Start the node with h8s up."},
	{"H8S_START_TIMEOUT", 14, "See h8s status for the component that is not ready and h8s logs for its words; h8s down stops the rest."},
	{"H8S_START_FAILED", 15, "See h8s logs h8s; h8s down, then h8s up, tries again from a clean start."},
	{"H8S_STOP_FAILED", 16, "Run h8s reset: it removes whatever of the node is left."},
	{"H8S_DISK_FULL", 17, "Free space below /var/lib/h8s; h8s image rm removes images that are not used."},
	{"H8S_PERMISSION", 18, "Root is needed with the capabilities of a real root: SYS_ADMIN and NET_ADMIN at least."},
	{"H8S_NOT_FOUND", 19, "Check the spelling; h8s status shows the node, h8s image list its images."},
	{"H8S_BUSY", 20, "Another h8s command is at work on this node; wait for it or see h8s status."},
	{"H8S_JOIN", 21, "On the server, h8s token create prints a token with the command line to join with; h8s node list shows the nodes there are."},
	{"H8S_BLOCKED", 22, "Mend what the Pods named need (a replica more, a looser budget) and repeat it, or use --force or a longer --timeout."},
	{"H8S_NOT_READY", 23, "The controllers go on by themselves: h8s tenant describe and h8s network describe show how far they are."},
	{"H8S_NO_TALK", 24, "The lines above say which side forbids it; h8s kubectl get networkpolicies -A lists the policies."},
	{"H8S_NOT_SIGNED", 25, "The message says what is refused; h8s tenant kubeconfig --help says what may be asked for."},
	{"H8S_LOGIN", 26, "openstack token issue with the same cloud shows whether OpenStack takes the credentials; h8s tenant list shows whose projects are known here."},
	{"H8S_VOLUMES", 27, "A local volume's data is on its node only: copy what is needed, delete the claims, and repeat it, or give --force."},
	{"H8S_INTERRUPTED", 130, "The node goes on in the background: h8s status shows it, h8s down stops it."},
}

// Error is a failure with its reason.
type Error struct {
	ID  string
	Err error
}

func (e *Error) Error() string { return e.Err.Error() }
func (e *Error) Unwrap() error { return e.Err }

func because(id string, err error) error { return &Error{ID: id, Err: err} }

func becausef(id, format string, args ...any) error {
	return &Error{ID: id, Err: fmt.Errorf(format, args...)}
}

// reasonOf finds the reason of an error; nil if there is none better than "failed".
func reasonOf(err error) *Reason {
	id := ""
	var e *Error
	switch {
	case errors.As(err, &e):
		id = e.ID
	case errors.Is(err, context.Canceled):
		id = "H8S_INTERRUPTED"
	case errdefs.IsInvalidArgument(err):
		id = "H8S_USAGE"
	case errdefs.IsAlreadyExists(err):
		id = "H8S_BUSY"
	case errdefs.IsUnavailable(err):
		id = "H8S_NOT_RUNNING"
	case errdefs.IsNotFound(err):
		id = "H8S_NOT_FOUND"
	case errors.Is(err, fs.ErrPermission) && os.Geteuid() != 0:
		id = "H8S_NOT_ROOT"
	}
	for i := range reasons {
		if reasons[i].ID == id {
			return &reasons[i]
		}
	}
	return nil
}

// explain prints a failure and its advice and returns the exit code.
func explain(w io.Writer, err error) int {
	r := reasonOf(err)
	if r == nil {
		fmt.Fprintf(w, "h8s: %v\n", err)
		return exitFailure
	}
	fmt.Fprintf(w, "h8s: %v\n     %s: %s\n", err, r.ID, r.Advice)
	return r.Exit
}
