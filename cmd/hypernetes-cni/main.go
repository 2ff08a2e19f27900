// Command hypernetes is the CNI plugin of that name.
package main

import "github.com/hypernetes/hypernetes/network/cni"

// version is set by the build.
var version = "dev"

func main() { cni.Main(version) }
