// Package pods tells the stories of ordinary Pods in virtual machines through
// kubectl, one test per behaviour: what works with any Kubernetes works here.
package pods
