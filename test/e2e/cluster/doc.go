// Package cluster tests the life of a node as its operator sees it: h8s up, status,
// down and reset, killed components and a killed daemon, and that the machine is
// afterwards as it was before. Pods here are of RuntimeClass runc, so that these
// tests tell about the distribution and not about the virtual machines.
package cluster
