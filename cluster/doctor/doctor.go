// Package doctor owns the checks of a machine: each has a stable id and code, a
// verdict, the reason for it and a remedy. The same checks make up `h8s doctor` and
// the preflight of `h8s up`. Checks look only; they must not change the machine.
package doctor

import (
	"context"
	"sync"
	"time"
)

// Verdict of a check.
type Verdict string

// Verdicts. Only Fail keeps a node from starting.
const (
	Pass Verdict = "pass"
	Warn Verdict = "warning"
	Fail Verdict = "fail"
)

// Result of a check.
type Result struct {
	ID      string  `json:"id"`
	Code    string  `json:"code,omitempty"` // H8S_..., empty if passed
	Verdict Verdict `json:"verdict"`
	Reason  string  `json:"reason"`
	Remedy  string  `json:"remedy,omitempty"`
}

// Check is one need of a node.
type Check struct {
	ID    string
	Probe func(ctx context.Context) Result
}

// timeout bounds each check; one that hangs says something about the machine too.
const timeout = 10 * time.Second

// Run runs the checks at once and returns their results in order.
func Run(ctx context.Context, checks []Check) []Result {
	results := make([]Result, len(checks))
	var wg sync.WaitGroup
	for i, c := range checks {
		wg.Go(func() {
			ctx, cancel := context.WithTimeout(ctx, timeout)
			defer cancel()
			results[i] = c.Probe(ctx)
			results[i].ID = c.ID
		})
	}
	wg.Wait()
	return results
}

// Failed returns the results that keep a node from starting.
func Failed(results []Result) []Result {
	var bad []Result
	for _, r := range results {
		if r.Verdict == Fail {
			bad = append(bad, r)
		}
	}
	return bad
}

func pass(reason string) Result { return Result{Verdict: Pass, Reason: reason} }

func warn(code, reason, remedy string) Result {
	return Result{Code: code, Verdict: Warn, Reason: reason, Remedy: remedy}
}

func fail(code, reason, remedy string) Result {
	return Result{Code: code, Verdict: Fail, Reason: reason, Remedy: remedy}
}
