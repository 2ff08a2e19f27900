// Package api holds the attacks on tenancy that go through the API server
// (reference/tenancy-network.md §4, numbers 3, 4, 6, 7, 12 and 14). Every one is tried with
// its defence, where it must be refused for the reason given, and without, where it must go
// through: otherwise it would prove nothing. The attackers have far more RBAC rights than
// any tenant, so that what is tested is admission and not RBAC.
package api
