// Command hyperstart is PID 1 of a Pod's virtual machine.
package main

import (
	"fmt"
	"os"
	"path/filepath"

	"github.com/hypernetes/hypernetes/guest/hyperstart"
	"github.com/hypernetes/hypernetes/guest/hyperstart/boot"
)

// version is set by the linker.
var version = "unknown"

func main() {
	if filepath.Base(os.Args[0]) == boot.PauseName {
		boot.Pause()
		return
	}
	if len(os.Args) > 1 && os.Args[1] == "--version" {
		fmt.Println("hyperstart", version)
		return
	}
	if os.Getpid() != 1 {
		fmt.Fprintln(os.Stderr, "hyperstart: is PID 1 of a Pod's virtual machine and does nothing elsewhere")
		os.Exit(2)
	}
	err := hyperstart.Main(version)
	fmt.Fprintln(os.Stderr, "hyperstart: cannot go on:", err)
	os.Exit(1) // PID 1's end panics the kernel, which ends the VM
}
