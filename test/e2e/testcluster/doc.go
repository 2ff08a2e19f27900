// Package testcluster owns the running cluster that end-to-end tests share: bringing
// it up, kubectl against it, a Namespace per test, terminals and streams, what a
// failed test prints, and the inventory of the machine that finds leaks. It must not
// know any story that is tested with it.
//
// The node is named by $H8S_E2E_NODE ("e2e"), its API server is published on
// $H8S_E2E_PORT (16443), one more port of the node on $H8S_E2E_PUBLISH (18001). It is
// left running after the tests, so that packages can use it one after another
// (`go test -p 1`); `h8s reset --name e2e --yes` removes it.
// Without the built programs in $H8S_OUT tests are skipped with the reason, unless
// $CI is set or $H8S_E2E is "required": then they fail.
package testcluster
