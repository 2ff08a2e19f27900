#!/usr/bin/env bash
# gofmt, go vet and staticcheck over every module.
set -euo pipefail
cd "$(dirname "$0")/.."
unformatted=$(git ls-files -co --exclude-standard '*.go' | grep -v '\.pb\.go$' | xargs -r gofmt -l)
[ -z "$unformatted" ] || { echo "not formatted (run gofmt -w):"; echo "$unformatted"; exit 1; }
go vet ./...
go tool staticcheck ./...
(cd dist/containerd && go vet ./mkfs.erofs ./pulls)
echo "lint: clean"
