// Package admission owns what is refused and what is changed when objects of tenants are
// written: policies in CEL, which the API server evaluates itself and which therefore hold
// while no controller runs, and a webhook for what needs to look at other objects. It
// applies both and repairs them. It must not know who carries the decisions out on nodes.
package admission
