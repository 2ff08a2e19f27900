#!/usr/bin/env bash
# End-to-end tests on a real cluster, package after package on one node, which is
# removed before and after; what is left of it then is a failure too.
# Arguments go to go test, for example: scripts/e2e.sh -run TestProbes ./test/e2e/pods
set -euo pipefail
cd "$(dirname "$0")/.."
export H8S_OUT=${H8S_OUT:-$PWD/out} H8S_E2E=required
node=${H8S_E2E_NODE:-e2e}
h8s=$H8S_OUT/bin/h8s

reset() { "$h8s" reset --name "$node" --yes >/dev/null; }
trap 'reset || true' EXIT
reset
[ $# -gt 0 ] || set -- ./test/e2e/...
scripts/gotest.sh standard-verbose -count=1 -timeout 40m -p 1 "$@"
reset
left=$(
	ls -d "/var/lib/h8s/$node" "/run/h8s/$node" 2>/dev/null || true
	find /sys/fs/cgroup -maxdepth 3 -type d -path "*/h8s/$node" 2>/dev/null || true
	pgrep -af "$H8S_OUT/bin/.*--name $node( |\$)" || true
)
[ -z "$left" ] || { echo "error: left behind by node $node:"; echo "$left"; exit 1; }
