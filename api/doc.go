// Package api is the room of contracts: protobuf messages, custom resource types
// and extensions other programs rely on. It imports nothing else of the project.
package api
