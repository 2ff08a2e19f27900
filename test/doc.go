// Package test is the parent of what is tested across packages: test/e2e has a folder per
// user story, run against a real cluster (test/e2e/testcluster), test/shim drives the
// real shim and real virtual machines without containerd, test/bench measures, and
// test/images has the programs of the test images.
//
// It holds no code. Nothing but tests imports what is below.
package test
