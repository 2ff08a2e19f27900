package boot

import (
	"os"
	"os/signal"

	"golang.org/x/sys/unix"
)

// PauseName is argv[0] under which hyperstart is PID 1 of the shared PID namespace.
const PauseName = "h8s-pause"

// Pause reaps the orphans of a PID namespace until the process is killed.
func Pause() {
	sigs := make(chan os.Signal, 1)
	signal.Notify(sigs, unix.SIGCHLD)
	// A Pod's process may signal its PID 1; only the agent ends it, by SIGKILL.
	signal.Ignore(unix.SIGTERM, unix.SIGINT, unix.SIGHUP)
	for range sigs {
		for {
			pid, err := unix.Wait4(-1, nil, unix.WNOHANG, nil)
			if err == unix.EINTR {
				continue
			}
			if err != nil || pid <= 0 {
				break
			}
		}
	}
}
