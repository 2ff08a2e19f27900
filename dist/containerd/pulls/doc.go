// Package pulls holds containerd to what a node's own image registry relies on: that what
// it does not have may be redirected to the registry an image names, as if that had been
// asked. There is nothing in it but tests.
package pulls
