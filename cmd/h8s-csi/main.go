// Command h8s-csi is the volume plugin: CSI controllers and the node's services.
package main

import (
	"context"
	"os"
	"os/signal"
	"syscall"

	"github.com/hypernetes/hypernetes/volume/command"
)

// version is set by the build.
var version = "dev"

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	code := command.Main(ctx, os.Args[1:], version, os.Stdout, os.Stderr)
	stop()
	os.Exit(code)
}
