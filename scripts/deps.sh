#!/usr/bin/env bash
# Installs the Debian packages named as arguments that are missing, and checks the
# prerequisites the README names. Says nothing when there is nothing to do.
set -euo pipefail

die() { echo "error: $*" >&2; exit 1; }

[ "$(uname -s)" = Linux ] || die "Hypernetes runs on Linux only"
[ "$(uname -m)" = x86_64 ] || die "this release supports x86_64 only, this machine is $(uname -m)"
[ "$(id -u)" = 0 ] || die "run this as root: virtual machines, namespaces and cgroups need it (try: sudo make up)"
command -v go >/dev/null || die "the Go toolchain is not on PATH: install Go from https://go.dev/dl"
cd "$(dirname "$0")/.."
need=$(sed -n 's/^go //p' go.mod dist/*/go.mod | sort -V | tail -n1)
have=$(go env GOVERSION | sed 's/^go//')
[ "$(printf '%s\n' "$need" "$have" | sort -V | head -n1)" = "$need" ] ||
	die "Go $have is too old: Hypernetes needs $need or later (https://go.dev/dl)"

missing=()
for p in "$@"; do
	dpkg-query -W -f '${db:Status-Status}' "$p" 2>/dev/null | grep -qx installed || missing+=("$p")
done
[ ${#missing[@]} -gt 0 ] || exit 0
command -v apt-get >/dev/null || die "missing: ${missing[*]}; install them with your distribution's package manager"
echo "installing Debian packages: ${missing[*]}"
log=$(mktemp)
trap 'rm -f "$log"' EXIT
export DEBIAN_FRONTEND=noninteractive
# A broken third-party source must not stop us: only the install itself counts.
apt-get update >"$log" 2>&1 || true
apt-get install -y --no-install-recommends "${missing[@]}" >>"$log" 2>&1 || {
	tail -n 20 "$log" >&2
	die "apt-get could not install: ${missing[*]} (see above; check /etc/apt/sources.list and the network)"
}
