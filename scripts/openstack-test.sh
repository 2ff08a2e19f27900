#!/usr/bin/env bash
# Tests on a real OpenStack: the one at $H8S_OPENSTACK, started if it is not up, and then
# purged again at the end.
#
#   openstack-test.sh             everything that needs one (about 40 minutes on two cores)
#   openstack-test.sh core        what CI runs: each kind of contact with the cloud once
#   openstack-test.sh ARGS...     end-to-end tests; ARGS go to go test
set -euo pipefail
cd "$(dirname "$0")/.."
export H8S_OPENSTACK=${H8S_OPENSTACK:-/var/tmp/h8s-openstack}
openstack=test/openstack/openstack.sh
if ! $openstack status >/dev/null 2>&1; then
	trap '$openstack purge >/dev/null || true' EXIT
	$openstack up
fi
case ${1:-} in
core)
	scripts/gotest.sh standard-quiet -count=1 -p 1 -timeout 15m ./test/openstack/openstacktest ./identity/keystone/... ./test/hostile/identity
	scripts/gotest.sh standard-quiet -count=1 -p 1 -timeout 15m -run '^Test(Suite|Tenants|Static|ExpandAttached|Least|ISCSI)$/^(real)?$' ./volume/backend/cinder ./runtime/storage # tgt is there with Cinder
	scripts/e2e.sh -run '^Test(Seeds|FloatingIP|Logins|Tutorial)$' ./test/e2e/openstack
	;;
"")
	# Every package whose tests import openstacktest, and which needs no cluster.
	# shellcheck disable=SC2046
	scripts/gotest.sh standard-quiet -count=1 -p 1 -timeout 30m $(
		go list -test -f '{{if .ForTest}}{{.ForTest}} {{join .Deps " "}}{{end}}' ./... |
			awk '/\/test\/openstack\/openstacktest/ && !/^[^ ]*\/test\/e2e\// {print $1}' | sort -u
	)
	scripts/e2e.sh ./test/e2e/openstack
	# The networking suite, as for the built-in provider. What kills nodes and components is
	# test/e2e/openstack's here, and sixty VMs are too many beside an OpenStack.
	H8S_E2E_PROVIDER=neutron scripts/e2e.sh -skip '^Test(Failures|Sixty)$' ./test/e2e/tenants
	;;
*) scripts/e2e.sh "$@" ;;
esac
