// Command hyperctl runs Pods in virtual machines without Kubernetes.
package main

import (
	"context"
	"os"

	"github.com/hypernetes/hypernetes/cli/hyperctl"
)

func main() {
	os.Exit(hyperctl.Main(context.Background(), os.Args[1:], os.Stderr))
}
