// Package tenants tells the stories of tenants that share nodes: equal addresses in
// different Networks, what each sees of its own and that nothing crosses.
package tenants
