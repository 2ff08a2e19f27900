// Command h8s starts, stops and inspects Hypernetes nodes.
package main

import (
	"os"

	"github.com/hypernetes/hypernetes/cli"
)

func main() { os.Exit(cli.Main(os.Args[1:])) }
