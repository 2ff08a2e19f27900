package badinput

import (
	"strings"
	"testing"
)

// TestCommandLines: a malformed command line ends with exit code 2 and says what was
// wanted, before anything is started.
func TestCommandLines(t *testing.T) {
	for _, c := range []struct {
		program, args string
		code          int
		want          string
	}{
		{"h8s", "frobnicate", 2, `unknown command "frobnicate"(.|\n)*--help`},
		{"h8s", "up extra", 2, `unexpected argument "extra"`},
		{"h8s", "up --nonsense", 2, `unknown flag: --nonsense`},
		{"h8s", "up --api-port 0", 2, `api port 0: want 1 to 65535`},
		{"h8s", "up --api-port 65536", 2, `api port 65536: want 1 to 65535`},
		{"h8s", "up --api-port banana", 2, `"banana".*--api-port`},
		{"h8s", "up --publish x:y", 2, `publish "x:y": want PORT or HOSTPORT:NODEPORT`},
		{"h8s", "up --publish 80 --publish 80:81", 2, `host port 80 is used twice`},
		{"h8s", "up --name Bad_Name", 2, `node name "Bad_Name": use 1 to 32 of a-z, 0-9 and -`},
		{"h8s", "up --name ../../etc", 2, `node name "../../etc"`},
		{"h8s", "down extra", 2, `unexpected argument "extra"`},
		{"h8s", "status -o xml", 2, `output "xml": want table or json`},
		{"h8s", "status --name badinput", 13, `node badinput is absent(.|\n)*h8s up`},
		{"h8s", "logs a b", 2, `at most 1`},
		{"h8s", "logs --name badinput kubelet", 13, `there is no node badinput.*h8s up`},
		{"h8s", "kubectl --name", 2, `--name needs a node's name`},
		{"h8s", "kubectl --name badinput get pods", 13, `there is no node badinput.*h8s up`},
		{"h8s", "image frobnicate", 2, `unknown command "frobnicate"(.|\n)*--help`},
		{"h8s", "image load", 2, `at least 1`},
		{"h8s", "image load --name badinput /nonexistent.tar", 1, `/nonexistent.tar: no such file`},
		{"h8s", "image load --name badinput /etc/hostname", 2, `/etc/hostname: not a complete tar`},
		{"h8s", "image list --name badinput", 13, `there is no node badinput.*h8s up`},
		{"h8s", "image build nonesuch", 19, `recipe "nonesuch": not one of busybox`},
		{"h8s", "image build --file /nonexistent.yaml nonesuch", 1, `/nonexistent.yaml: no such file`},
		{"h8s", "reset --name badinput --yes extra", 2, `unexpected argument "extra"`},
		{"hyperctl", "frobnicate", 2, `unknown command "frobnicate"(.|\n)*--help`},
		{"hyperctl", "run", 2, `at least 1(.|\n)*--help`},
		{"hyperctl", "run --nonsense busybox", 2, `unknown flag: --nonsense`},
		{"hyperctl", "--node badinput run --memory banana busybox", 2, `memory "banana"`},
		{"hyperctl", "--node badinput run --cpus=-1 busybox", 2, `cpus -1`},
		{"hyperctl", "--node badinput run -p nowhere busybox", 2, `publish "nowhere"`},
		{"hyperctl", "--node badinput run --env NOVALUE busybox", 2, `env "NOVALUE"`},
		{"hyperctl", "--node badinput run --pull sometimes busybox", 2, `pull "sometimes": want missing, always or never`},
		{"hyperctl", "exec only-a-pod", 2, `at least 2`},
		{"hyperctl", "attach", 2, `1 arg`},
		{"hyperctl", "--node badinput ps -o xml", 2, `output "xml"`},
		{"hyperctl", "--node badinput images -o xml", 2, `output "xml"`},
		{"hyperctl", "--node badinput info -o xml", 2, `output "xml"`},
		{"hyperctl", "ps extra", 2, `extra`},
		{"hyperctl", "logs --tail banana web", 2, `"banana".*--tail`},
		{"hyperctl", "stop -t soon web", 2, `"soon".*--time`},
		{"hyperctl", "--node badinput rm", 2, `name Pods, or give --all`},
		{"hyperctl", "--node badinput load /nonexistent.tar", 1, `/nonexistent.tar: no such file`},
		{"hyperctl", "--node Bad_Name ps", 2, `node name "Bad_Name"`},
		{"hyperctl", "--runtime-endpoint relative.sock ps", 2, `want an absolute path`},
		{"hyperctl", "--runtime-endpoint /nonexistent.sock ps", 1, `no container runtime answers at /nonexistent.sock`},
	} {
		t.Run(c.program+" "+c.args, func(t *testing.T) {
			refused(t, run(t, nil, c.program, strings.Fields(c.args)...), c.code, c.want)
		})
	}
	untouched(t, nobody)
}
