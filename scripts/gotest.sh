#!/usr/bin/env bash
# go test, whose failed tests are run once more if they are few: of some two thousand tests
# that wait for real daemons, one may lose its patience on a busy machine. Both results are
# printed, and what failed once is named at the end, for whoever mends it.
#
#   gotest.sh FORMAT [FLAGS OF go test] ./PACKAGE...     FORMAT is one of gotestsum's
set -euo pipefail
cd "$(dirname "$0")/.."
format=$1 flags=() packages=()
shift
# gotestsum takes a benchmark that says something for a test without an end.
case " $* " in *" -bench "*) exec go test "$@" ;; esac
again=$(mktemp)
trap 'rm -f "$again"' EXIT
for a in "$@"; do
	case $a in
	./* | github.com/*) packages+=("$a") ;;
	*) flags+=("$a") ;;
	esac
done
status=0
go tool gotestsum --format "$format" --rerun-fails=1 --rerun-fails-max-failures=6 \
	--rerun-fails-report="$again" --packages="${packages[*]}" -- "${flags[@]}" || status=$?
if [ -s "$again" ]; then
	echo "run more than once:"
	sed 's/^/  /' "$again"
fi
exit $status
