package storage

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"github.com/containerd/errdefs"

	"github.com/hypernetes/hypernetes/volume/record"
)

var update = flag.Bool("update", false, "rewrite testdata/*.golden")

type names map[string]string

func (n names) LookupHost(_ context.Context, host string) ([]string, error) {
	if a, ok := n[host]; ok {
		return []string{a}, nil
	}
	return nil, errors.New("no such host")
}

const keyringKey = "AQAA8VNlAAAAABAAc2l4dGVlbi1ieXRlLWtleQ=="

func rbd() Volume {
	return Volume{
		Serial: "vrbd", Source: record.Source{RBD: &record.RBD{Pool: "volumes", Image: "volume-1", Monitors: []string{"mon.example:6789", "[fd00::1]:3300", "gone.example:6789"}, User: "cinder"}},
		Secrets: map[string][]byte{record.SecretKey: []byte(keyringKey + "\n")},
	}
}

func iscsi() Volume {
	return Volume{
		Serial: "viscsi", ReadOnly: true, Source: record.Source{ISCSI: &record.ISCSI{
			Portal: "10.0.0.1:3260", Target: "iqn.2010-10.org.openstack:volume-1", LUN: 1, Initiator: "iqn.2026-11.io.hypernetes:n1", User: "chap",
		}},
		Secrets: map[string][]byte{record.SecretPassword: []byte(`pass,word"`)},
	}
}

// TestNodesGolden: what the daemon is told, secrets apart from the rest.
func TestNodesGolden(t *testing.T) {
	plain := rbd()
	plain.Source = record.Source{RBD: &record.RBD{Pool: "p", Image: "i", Monitors: []string{"10.0.0.1:6789"}}}
	noCHAP := iscsi()
	noCHAP.Source = record.Source{ISCSI: &record.ISCSI{Portal: "[fd00::1]:3260", Target: "iqn.x:y"}}
	for name, v := range map[string]Volume{"rbd": rbd(), "rbd-none": plain, "iscsi": iscsi(), "iscsi-none": noCHAP} {
		n, err := node(t.Context(), names{"mon.example": "10.0.0.9"}, v, 2)
		if err != nil {
			t.Fatal(err)
		}
		s, err := secret(v)
		if err != nil {
			t.Fatal(err)
		}
		got, err := json.MarshalIndent([]any{s, n}, "", "  ")
		if err != nil {
			t.Fatal(err)
		}
		got = append(got, '\n')
		path := filepath.Join("testdata", name+".golden")
		if *update {
			if err := errors.Join(os.MkdirAll("testdata", 0o755), os.WriteFile(path, got, 0o644)); err != nil {
				t.Fatal(err)
			}
		}
		if want, err := os.ReadFile(path); err != nil || !bytes.Equal(got, want) {
			t.Errorf("%s: %v\n%s", name, err, got)
		}
	}
}

func TestRefused(t *testing.T) {
	noKey, noPassword, badKey := rbd(), iscsi(), rbd()
	noKey.Secrets, noPassword.Secrets = nil, nil
	badKey.Secrets = map[string][]byte{record.SecretKey: []byte("s3cret!")}
	for name, v := range map[string]Volume{"no key": noKey, "no password": noPassword, "bad key": badKey} {
		if _, err := secret(v); !errdefs.IsInvalidArgument(err) || strings.Contains(err.Error(), "s3cret") {
			t.Errorf("%s: %v", name, err)
		}
	}
	lost := rbd()
	lost.Source.RBD.Monitors = []string{"gone.example:6789"}
	if _, err := node(t.Context(), names{}, lost, 1); !errdefs.IsUnavailable(err) {
		t.Errorf("unknown host: %v", err)
	}
	if _, err := node(t.Context(), names{}, Volume{Serial: "v"}, 1); !errdefs.IsInvalidArgument(err) {
		t.Errorf("no source: %v", err)
	}
	// What the VMM takes for an export.
	if name := exportName(1023, 99999); !regexp.MustCompile(`^[a-zA-Z0-9_-]{1,20}$`).MatchString(name) {
		t.Errorf("export %s", name)
	}
}

// TestNoSecretInArguments: arguments can be read by everybody.
func TestNoSecretInArguments(t *testing.T) {
	o, err := order(Config{ID: "x", Volumes: []Volume{rbd(), iscsi()}})
	if errdefs.IsNotFound(err) {
		t.Skipf("skipped: %v", err)
	}
	if err != nil {
		t.Fatal(err)
	}
	if all := fmt.Sprint(o.Args, o.Files); strings.Contains(all, keyringKey[:10]) || strings.Contains(all, "pass,word") {
		t.Error(all)
	}
}
