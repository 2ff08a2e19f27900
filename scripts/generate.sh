#!/usr/bin/env bash
# Writes the generated protobuf and ttrpc code anew. The generators' versions are
# the tools of go.mod.
set -euo pipefail
cd "$(dirname "$0")/.."
command -v protoc >/dev/null || { echo "error: protoc is missing: apt-get install protobuf-compiler libprotobuf-dev" >&2; exit 1; }
bin=$(mktemp -d)
trap 'rm -rf "$bin"' EXIT
GOBIN=$bin go install google.golang.org/protobuf/cmd/protoc-gen-go github.com/containerd/ttrpc/cmd/protoc-gen-go-ttrpc
module=github.com/hypernetes/hypernetes
find api -name '*.proto' | while read -r f; do
	PATH="$bin:$PATH" protoc -I api --go_out=. --go_opt=module=$module --go-ttrpc_out=. --go-ttrpc_opt=module=$module "$f"
done
