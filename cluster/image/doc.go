// Package image owns the images a cluster brings along: declarative recipes
// (Debian packages, files, Go programs), the builder that turns one into a
// byte-for-byte reproducible OCI archive, and loading, listing and removing
// images in a node's containerd.
//
// It must not know how a node is started, what a Pod is, or who asks: callers
// give it directories and the path of a containerd socket.
package image
