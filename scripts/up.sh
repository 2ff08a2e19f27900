#!/usr/bin/env bash
# Starts the node and the demo Pod and says what to try next. Repeating it changes
# nothing that is already so.
set -euo pipefail
cd "$(dirname "$0")/.."
h8s=out/bin/h8s

"$h8s" up
since=$SECONDS
"$h8s" kubectl apply -f examples/demo >/dev/null
if ! "$h8s" kubectl wait --for=condition=Ready pod/demo --timeout=300s >/dev/null; then
	"$h8s" kubectl describe pod demo | sed -n '/^Events:/,$p' >&2
	echo "error: the demo Pod did not become ready; see the events above and: $h8s logs" >&2
	exit 1
fi
printf '✓ demo Pod %6ds   a virtual machine with kernel %s (this machine: %s)\n\n' \
	$((SECONDS - since)) "$("$h8s" kubectl exec demo -- uname -r)" "$(uname -r)"
cat <<TEXT
Try next:
  $h8s kubectl get pods -A -o wide
  $h8s kubectl exec -it demo -- sh
  $h8s kubectl port-forward pod/demo 8080:80     then: curl 127.0.0.1:8080
  $h8s kubectl apply -f examples/javaweb-2       more in examples/README.md
  $h8s status                                    what runs, and how it is
  make reset                                     remove everything again
TEXT
