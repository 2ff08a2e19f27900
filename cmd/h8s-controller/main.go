// Command h8s-controller runs the cluster's controllers of tenants and their Networks, and
// the admission webhook.
package main

import (
	"fmt"
	"os"

	"github.com/hypernetes/hypernetes/controller"
)

// version is set by the linker.
var version = "dev"

func main() {
	if len(os.Args) == 2 && os.Args[1] == "--version" {
		fmt.Println("h8s-controller", version)
		return
	}
	os.Exit(controller.Main(os.Args[1:], os.Stderr))
}
