#!/usr/bin/env bash
# Writes the generated protobuf, ttrpc and gRPC code, deep copies and CRDs anew. The generators' versions are
# the tools of go.mod.
set -euo pipefail
cd "$(dirname "$0")/.."
command -v protoc >/dev/null || { echo "error: protoc is missing: apt-get install protobuf-compiler libprotobuf-dev" >&2; exit 1; }
bin=$(mktemp -d)
trap 'rm -rf "$bin"' EXIT
GOBIN=$bin go install google.golang.org/protobuf/cmd/protoc-gen-go github.com/containerd/ttrpc/cmd/protoc-gen-go-ttrpc google.golang.org/grpc/cmd/protoc-gen-go-grpc sigs.k8s.io/controller-tools/cmd/controller-gen
module=github.com/hypernetes/hypernetes
find api -name '*.proto' | while read -r f; do
	# The guest's protocol is ttrpc, the node daemon's gRPC.
	rpc=go-ttrpc
	case $f in api/kubestack/*) rpc=go-grpc ;; esac
	PATH="$bin:$PATH" protoc -I api --go_out=. --go_opt=module=$module --${rpc}_out=. --${rpc}_opt=module=$module "$f"
done
"$bin/controller-gen" object paths=./api/hypernetes/... crd:generateEmbeddedObjectMeta=false output:crd:dir=api/hypernetes/v1alpha1/crds
