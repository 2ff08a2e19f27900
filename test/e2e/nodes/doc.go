// Package nodes tests clusters of several nodes: made on one machine by h8s dev nodes,
// joined as agents with tokens, drained, lost and found again, removed.
//
// Its cluster is one of its own, $H8S_E2E_NODE with "-n", whose API server is published on
// $H8S_E2E_NODES_PORT (16447).
package nodes
