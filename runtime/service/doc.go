// Package service is what containerd calls: its Sandbox API and its Task API, version 3,
// over ttrpc.
//
// It owns the translation between containerd's messages and package sandbox, including
// the classes of errors. It must not keep state but whether the shim is to end.
package service
