// Package examples holds manifests that run, each with a README that says what
// to expect. The tests here check the manifests alone; test/e2e/examples runs them.
package examples
