// Command kubestack is the node daemon of tenant networks.
package main

import (
	"context"
	"os"
	"os/signal"
	"syscall"

	"github.com/hypernetes/hypernetes/network/kubestack"
)

// version is set by the build.
var version = "dev"

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	code := kubestack.Main(ctx, os.Args[1:], version, os.Stdout, os.Stderr)
	stop()
	os.Exit(code)
}
