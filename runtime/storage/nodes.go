package storage

import (
	"bytes"
	"context"
	"encoding/base64"
	"fmt"
	"net"

	"github.com/containerd/errdefs"

	"github.com/hypernetes/hypernetes/volume/record"
)

// confPath is librados' configuration in the daemon's root.
const confPath = "/ceph.conf"

// conf bounds how long monitors are waited for: the daemon answers nobody meanwhile.
// There is no such bound for writes on purpose: a slow cluster is no broken disk.
const conf = `[global]
client_mount_timeout = 5
rados_mon_op_timeout = 5
log_to_stderr = false
err_to_stderr = false
log_file =
admin_socket =
`

// resolver finds addresses: the daemon has no configuration of name servers.
type resolver interface {
	LookupHost(ctx context.Context, host string) ([]string, error)
}

// secretID names a volume's secret in the daemon, nodeID a block node; round counts how
// often the volume has been opened.
func secretID(serial string) string            { return "secret-" + serial }
func nodeID(serial string, round int) string   { return fmt.Sprintf("n%d-%s", round, serial) }
func exportID(serial string, round int) string { return fmt.Sprintf("e%d-%s", round, serial) }

// exportName is what the VMM asks for: at most 20 of a-z, A-Z, 0-9, _ and -.
func exportName(index, round int) string { return fmt.Sprintf("v%d-%d", index, round) }

// secret is an object-add of what the volume's keeper wants to see; nil for nothing.
func secret(v Volume) (map[string]any, error) {
	var encoded string
	switch {
	case v.Source.RBD != nil && v.Source.RBD.User != "":
		// librados wants base64 itself, and QEMU decodes and encodes it again.
		encoded = string(bytes.TrimSpace(v.Secrets[record.SecretKey]))
		if key, err := base64.StdEncoding.DecodeString(encoded); err != nil || len(key) == 0 {
			return nil, fmt.Errorf("volume %s: secret %q is not base64 as in a keyring: %w", v.Serial, record.SecretKey, errdefs.ErrInvalidArgument)
		}
	case v.Source.ISCSI != nil && v.Source.ISCSI.User != "":
		if len(v.Secrets[record.SecretPassword]) == 0 {
			return nil, fmt.Errorf("volume %s: secret %q is missing: %w", v.Serial, record.SecretPassword, errdefs.ErrInvalidArgument)
		}
		encoded = base64.StdEncoding.EncodeToString(v.Secrets[record.SecretPassword])
	default:
		return nil, nil
	}
	return map[string]any{"qom-type": "secret", "id": secretID(v.Serial), "data": encoded, "format": "base64"}, nil
}

// node is a blockdev-add of a raw image on what the volume is. Formats are never probed.
func node(ctx context.Context, r resolver, v Volume, round int) (map[string]any, error) {
	cache := map[string]any{"direct": true, "no-flush": false} // no cache: two opens see the same
	protocol := map[string]any{"read-only": v.ReadOnly, "discard": "unmap", "cache": cache}
	switch s := v.Source; {
	case s.RBD != nil:
		servers, err := endpoints(ctx, r, s.RBD.Monitors)
		if err != nil {
			return nil, err
		}
		protocol["driver"], protocol["pool"], protocol["image"], protocol["server"], protocol["conf"] = "rbd", s.RBD.Pool, s.RBD.Image, servers, confPath
		if s.RBD.User == "" {
			protocol["auth-client-required"] = []string{"none"}
		} else {
			protocol["user"], protocol["key-secret"], protocol["auth-client-required"] = s.RBD.User, secretID(v.Serial), []string{"cephx"}
		}
	case s.ISCSI != nil:
		at, err := endpoints(ctx, r, []string{s.ISCSI.Portal})
		if err != nil {
			return nil, err
		}
		protocol["driver"], protocol["transport"], protocol["target"], protocol["lun"] = "iscsi", "tcp", s.ISCSI.Target, s.ISCSI.LUN
		protocol["portal"] = net.JoinHostPort(at[0]["host"], at[0]["port"])
		protocol["timeout"] = iscsiTimeout
		if s.ISCSI.Initiator != "" {
			protocol["initiator-name"] = s.ISCSI.Initiator
		}
		if s.ISCSI.User != "" {
			protocol["user"], protocol["password-secret"] = s.ISCSI.User, secretID(v.Serial)
		}
	case s.File != nil:
		// Of tests: a file needs no daemon. Growing opens it a second time.
		protocol["driver"], protocol["filename"], protocol["locking"] = "file", s.File.Path, "off"
		delete(protocol, "cache")
		cache = nil
	default:
		return nil, fmt.Errorf("volume %s has no source: %w", v.Serial, errdefs.ErrInvalidArgument)
	}
	n := map[string]any{"driver": "raw", "node-name": nodeID(v.Serial, round), "read-only": v.ReadOnly, "discard": "unmap", "file": protocol}
	if cache != nil {
		n["cache"] = cache
	}
	return n, nil
}

// iscsiTimeout is when libiscsi gives a command up and connects anew, in seconds; without
// it commands wait for ever.
const iscsiTimeout = 30

// endpoints resolves host:port.
func endpoints(ctx context.Context, r resolver, all []string) ([]map[string]string, error) {
	var out []map[string]string
	var last error
	for _, s := range all {
		host, port, err := net.SplitHostPort(s)
		if err != nil {
			return nil, fmt.Errorf("%w: %w", err, errdefs.ErrInvalidArgument)
		}
		if net.ParseIP(host) == nil {
			found, err := r.LookupHost(ctx, host)
			if err != nil || len(found) == 0 {
				last = fmt.Errorf("find host %s: %w: %w", host, err, errdefs.ErrUnavailable)
				continue
			}
			host = found[0]
		}
		out = append(out, map[string]string{"host": host, "port": port})
	}
	if len(out) == 0 {
		return nil, last
	}
	return out, nil
}
