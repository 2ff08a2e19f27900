// Package kernel holds the configuration of the guest's kernels: HyperKernel's Kconfig
// fragment and the module list for Debian's stock kernel. It is data only; guest/image
// builds with it.
package kernel

import _ "embed"

// Config is HyperKernel's Kconfig fragment, for `make KCONFIG_ALLCONFIG=... allnoconfig`.
//
//go:embed hyperkernel.config
var Config []byte

// StockModules lists the modules a VM with Debian's stock kernel loads, one a line.
//
//go:embed stock.modules
var StockModules string
