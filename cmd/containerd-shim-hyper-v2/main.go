// Command containerd-shim-hyper-v2 runs a Pod as a virtual machine for containerd
// (runtime io.containerd.hyper.v2, sandboxer "shim"). containerd starts it.
package main

import (
	"os"

	"github.com/hypernetes/hypernetes/runtime/bootstrap"
	"github.com/hypernetes/hypernetes/runtime/shim"
	"github.com/hypernetes/hypernetes/runtime/vmm/qemu"
)

// version is set by the linker.
var version = "development"

func main() {
	qemu.MaybeLaunch()
	os.Exit(bootstrap.Main(shim.Program(version)))
}
