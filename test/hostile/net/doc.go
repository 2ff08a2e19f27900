// Package net holds the attacks on Networks that go through packets, sockets and objects
// somebody edited behind our back (reference/tenancy-network.md §4, numbers 1–5, 8–11, 13,
// 15 and 16; those that go through the API server are in package api). Every one is tried
// on a world as it is made, where it must fail, and on another one of which exactly the
// defence has been taken out, where it must succeed: otherwise it would prove nothing.
package net
