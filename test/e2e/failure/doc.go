// Package failure kills every process a Pod depends on, with SIGKILL, and looks at
// what becomes of the Pod (docs/architecture.md, "What happens when something dies"):
// the death of a Pod's own processes restarts that Pod and nothing else; the death of
// anything else is not noticed by Pods at all. Each test ends with a leak check.
//
// The tests kill components of the node they share, so none of them is parallel.
package failure
