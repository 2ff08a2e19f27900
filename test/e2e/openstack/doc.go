// Package openstack tests what only a cluster that belongs to an OpenStack has: Networks,
// ports and floating addresses as Neutron's users see them, logins with Keystone's
// credentials, and parts of OpenStack that die. It needs $H8S_OPENSTACK (make
// openstack-test); package tenants, with H8S_E2E_PROVIDER=neutron, tests there what holds
// for Networks of any provider. Tests here take turns: Neutron serves a request at a time,
// and the machine is small.
package openstack
