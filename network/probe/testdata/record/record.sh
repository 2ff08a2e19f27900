#!/bin/sh
# Records what upstream's prober packages say: sh testdata/record/record.sh > testdata/upstream.json
# (in network/probe). Needs the module proxy; builds in a throw-away directory.
set -eu
version=1.36.3
here=$(cd "$(dirname "$0")" && pwd)
tmp=$(mktemp -d /var/tmp/h8s-probe-record.XXXXXX)
trap 'rm -rf "$tmp"' EXIT
go mod download "k8s.io/kubernetes@v$version" >&2
cp -r "$(go env GOMODCACHE)/k8s.io/kubernetes@v$version/pkg/probe" "$tmp/probe"
chmod -R u+w "$tmp"
find "$tmp" -name '*_test.go' -delete
rm -rf "$tmp/probe/exec"
mkdir -p "$tmp/pkg" "$tmp/record"
mv "$tmp/probe" "$tmp/pkg/probe"
cp "$here/main.go.txt" "$tmp/record/main.go"
sed 's/^package probe/package main/' "$here/../../scenario_test.go" > "$tmp/record/scenario.go"
cd "$tmp"
cat > go.mod <<MOD
module k8s.io/kubernetes
go 1.26.0
require (
	k8s.io/api v0.${version#1.}
	k8s.io/apimachinery v0.${version#1.}
	k8s.io/component-base v0.${version#1.}
	google.golang.org/grpc v1.79.3
)
MOD
export GOFLAGS="-mod=mod -buildvcs=false -trimpath" CGO_ENABLED=0
go mod tidy >&2
v=k8s.io/component-base/version
go run -ldflags "-X $v.gitMajor=1 -X $v.gitMinor=36" ./record
