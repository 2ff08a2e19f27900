package probe

// Where the shim finds the node daemon, and what marks an exec as meant for it.
const (
	// Socket is the node daemon's.
	Socket = "/run/kubestack/probe.sock"
	// Program is argv[0] of an exec that never reaches the guest: what follows it is one
	// argument, ProbeRequest.probe.
	Program = "/.h8s/probe"
	// MaxArgument and MaxOutput bound a request's argument and an answer's output, in bytes.
	MaxArgument = 16 << 10
	MaxOutput   = 10 << 10
)
