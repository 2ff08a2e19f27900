package sandbox

import (
	"context"
	"io"
	"net"
	"os"

	"google.golang.org/protobuf/proto"

	"github.com/hypernetes/hypernetes/runtime/config"
	"github.com/hypernetes/hypernetes/runtime/nic"
	"github.com/hypernetes/hypernetes/runtime/prober"
	"github.com/hypernetes/hypernetes/runtime/storage"
	"github.com/hypernetes/hypernetes/runtime/vmm"
)

// Host is what a sandbox takes of the machine; tests have one of their own.
type Host interface {
	// VMM returns what starts VMs and the accelerator it uses ("kvm", "tcg").
	VMM(ctx context.Context) (vmm.VMM, string, error)
	// Attach joins a network namespace, Detach undoes it, Forward carries connections
	// to the namespace's loopback to dial until closed.
	Attach(ctx context.Context, netns string) (*nic.Attachment, error)
	Detach(ctx context.Context, s nic.State) error
	Forward(ctx context.Context, netns string, dial nic.Dialer) (io.Closer, error)
	// Scratch makes a Pod's writable disk; nil if Pods have none.
	Scratch(ctx context.Context) (*os.File, error)
	// Turn waits until a VM may boot; accelerator is VMM's. release is called when it has.
	Turn(ctx context.Context, accelerator string) (release func(), err error)
	// Storage starts what serves volumes that are no files of the node.
	Storage(ctx context.Context, c storage.Config) (Storage, error)
	// User allocates the VMM's user until release is called.
	User(name string) (uid int, release func(), err error)
}

// Publisher takes containerd events.
type Publisher interface {
	Publish(topic string, event proto.Message)
}

// Prober reaches the node daemon.
type Prober interface {
	// Dial connects to it, for one question of package prober.
	Dial(ctx context.Context) (net.Conn, error)
}

var _ Prober = prober.Prober{}

// Options describe a sandbox before it is created.
type Options struct {
	ID, Namespace, Bundle, Socket string
	// Version is this shim's, for the guest's log.
	Version   string
	Config    config.Config
	Host      Host
	Publisher Publisher
	// Prober carries out what execs of the probe program stand for.
	Prober Prober
	// NoCgroups leaves VMM and shim where they are (tests).
	NoCgroups bool
}
