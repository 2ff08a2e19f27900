package cinder

import (
	"bytes"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"net"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"unicode"

	"github.com/containerd/errdefs"

	"github.com/hypernetes/hypernetes/volume/record"
)

// Bounds of what Cinder's drivers say of a connection.
const (
	maxInfo     = 64 << 10
	maxMonitors = 32
	maxLUN      = 16383
	maxSecret   = 256
)

var (
	cephPattern   = regexp.MustCompile(`^[a-zA-Z0-9_][a-zA-Z0-9_.-]{0,127}$`)
	hostPattern   = regexp.MustCompile(`^[a-zA-Z0-9]([a-zA-Z0-9.-]{0,251}[a-zA-Z0-9])?$`)
	iqnPattern    = regexp.MustCompile(`^(iqn|eui|naa)\.[a-zA-Z0-9.:_-]{1,219}$`)
	userPattern   = regexp.MustCompile(`^[a-zA-Z0-9_.@:-]{1,128}$`)
	exportPattern = regexp.MustCompile(`^(\[[0-9a-fA-F:]+\]|[a-zA-Z0-9.:-]{1,255}):(/[a-zA-Z0-9_./-]{0,999})$`)
	// filePattern is what Cinder calls a volume's file: volume_name_template's default, and
	// no snapshot's, whose name has a suffix.
	filePattern = regexp.MustCompile(`^volume-[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}$`)
)

// number is one that drivers write as a number or as a text.
type number int64

// UnmarshalJSON implements json.Unmarshaler.
func (n *number) UnmarshalJSON(b []byte) error {
	s := string(bytes.Trim(b, `"`))
	if s == "null" {
		return nil
	}
	v, err := strconv.ParseInt(s, 10, 64)
	if err != nil {
		return fmt.Errorf("%.32q is no whole number", s)
	}
	*n = number(v)
	return nil
}

// info is a connection_info. Drivers add what they like; what is used is here, and checked.
type info struct {
	Type string `json:"driver_volume_type"`

	Name string `json:"name"`
	// rbd
	Hosts    []string `json:"hosts"`
	Ports    []number `json:"ports"`
	Auth     bool     `json:"auth_enabled"`
	AuthUser string   `json:"auth_username"`
	Keyring  string   `json:"keyring"`
	// iscsi
	Portal       string `json:"target_portal"`
	Target       string `json:"target_iqn"`
	LUN          number `json:"target_lun"`
	AuthMethod   string `json:"auth_method"`
	AuthPassword string `json:"auth_password"`
	// nfs
	Export string `json:"export"`
	Format string `json:"format"`

	Access    string                     `json:"access_mode"`
	Encrypted bool                       `json:"encrypted"`
	QoS       map[string]json.RawMessage `json:"qos_specs"`
}

// translator knows what of a connection is not Cinder's to say.
type translator struct {
	exports   map[string]string
	keys      map[string]string
	initiator string
}

// connection is what a connection_info says.
type connection struct {
	source   record.Source
	secrets  map[string][]byte
	throttle *record.Throttle
	readOnly bool
}

// parse reads a connection_info. What is not understood to the last is refused: a volume
// that is used otherwise than its driver means is lost.
func parse(raw []byte) (*info, error) {
	if len(raw) > maxInfo {
		return nil, fmt.Errorf("connection_info has %d bytes, over %d: %w", len(raw), maxInfo, errdefs.ErrInvalidArgument)
	}
	in := &info{}
	if err := json.Unmarshal(raw, in); err != nil {
		return nil, fmt.Errorf("connection_info: %w: %w", err, errdefs.ErrInvalidArgument)
	}
	return in, nil
}

func odd(field string, value any, want string) error {
	return fmt.Errorf("connection_info: %s %.128q: want %s: %w", field, fmt.Sprint(value), want, errdefs.ErrInvalidArgument)
}

// translate makes a connection of a connection_info.
func (t translator) translate(raw []byte) (connection, error) {
	in, err := parse(raw)
	if err != nil {
		return connection{}, err
	}
	out := connection{secrets: map[string][]byte{}}
	switch in.Access {
	case "", "rw":
	case "ro":
		out.readOnly = true
	default:
		return out, odd("access_mode", in.Access, "rw or ro")
	}
	if in.Encrypted {
		return out, fmt.Errorf("encrypted volumes (LUKS) are not supported: use a volume type without encryption: %w", errdefs.ErrNotImplemented)
	}
	if out.throttle, err = throttle(in.QoS); err != nil {
		return out, err
	}
	switch in.Type {
	case "rbd":
		err = t.rbd(in, &out)
	case "iscsi":
		err = t.iscsi(in, &out)
	case "nfs":
		err = t.nfs(in, &out)
	default:
		err = fmt.Errorf("the volume's driver connects by %.64q, which a Pod's VM cannot: want a volume type whose back end connects by rbd, iscsi or nfs: %w", in.Type, errdefs.ErrNotImplemented)
	}
	return out, err
}

func (t translator) rbd(in *info, out *connection) error {
	pool, image, ok := strings.Cut(in.Name, "/")
	if !ok || !cephPattern.MatchString(pool) || !cephPattern.MatchString(image) {
		return odd("name", in.Name, "pool/image, of letters, digits, _, . and -, without a namespace")
	}
	if len(in.Hosts) == 0 || len(in.Hosts) > maxMonitors || len(in.Hosts) != len(in.Ports) {
		return odd("hosts", len(in.Hosts), fmt.Sprintf("1 to %d with a port each, have %d ports", maxMonitors, len(in.Ports)))
	}
	r := &record.RBD{Pool: pool, Image: image}
	for i, host := range in.Hosts {
		host = strings.TrimSuffix(strings.TrimPrefix(host, "["), "]")
		if net.ParseIP(host) == nil && !hostPattern.MatchString(host) {
			return odd("hosts", in.Hosts[i], "a host name or an address")
		}
		if in.Ports[i] < 1 || in.Ports[i] > 65535 {
			return odd("ports", int64(in.Ports[i]), "1 to 65535")
		}
		r.Monitors = append(r.Monitors, net.JoinHostPort(host, strconv.FormatInt(int64(in.Ports[i]), 10)))
	}
	if in.Auth {
		if !cephPattern.MatchString(in.AuthUser) {
			return odd("auth_username", in.AuthUser, "a user of Ceph's without client.")
		}
		key := t.keys[in.AuthUser]
		if in.Keyring != "" {
			keys, err := ParseKeyring([]byte(in.Keyring))
			if err != nil {
				return fmt.Errorf("connection_info: %w", err)
			}
			key = keys[in.AuthUser]
		}
		if key == "" {
			return fmt.Errorf("user %s of Ceph's has no key here, and Cinder gives none: the operator names a keyring that has it, ceph.keyrings of --cinder-config: %w", in.AuthUser, errdefs.ErrFailedPrecondition)
		}
		r.User = in.AuthUser
		out.secrets[record.SecretKey] = []byte(key)
	}
	out.source = record.Source{RBD: r}
	return nil
}

func (t translator) iscsi(in *info, out *connection) error {
	host, port, err := net.SplitHostPort(in.Portal)
	n, perr := strconv.ParseUint(port, 10, 16)
	if err != nil || perr != nil || n == 0 || net.ParseIP(host) == nil && !hostPattern.MatchString(host) {
		return odd("target_portal", in.Portal, "host:port")
	}
	if !iqnPattern.MatchString(in.Target) {
		return odd("target_iqn", in.Target, "iqn., eui. or naa. and a name")
	}
	if in.LUN < 0 || in.LUN > maxLUN {
		return odd("target_lun", int64(in.LUN), fmt.Sprintf("0 to %d", maxLUN))
	}
	i := &record.ISCSI{Portal: net.JoinHostPort(host, strconv.FormatUint(n, 10)), Target: in.Target, LUN: int(in.LUN), Initiator: t.initiator}
	switch in.AuthMethod {
	case "", "None":
	case "CHAP":
		if !userPattern.MatchString(in.AuthUser) {
			return odd("auth_username", in.AuthUser, "1 to 128 of letters, digits, _, ., @, : and -")
		}
		if !secretText(in.AuthPassword) {
			return odd("auth_password", "(not shown)", fmt.Sprintf("1 to %d printable characters", maxSecret))
		}
		i.User = in.AuthUser
		out.secrets[record.SecretPassword] = []byte(in.AuthPassword)
	default:
		return odd("auth_method", in.AuthMethod, "CHAP or none")
	}
	out.source = record.Source{ISCSI: i}
	return nil
}

func (t translator) nfs(in *info, out *connection) error {
	if !exportPattern.MatchString(in.Export) {
		return odd("export", in.Export, "host:/path")
	}
	dir, ok := t.exports[in.Export]
	if !ok {
		return fmt.Errorf("export %s of Cinder's is not known here: the operator mounts it on the nodes, by a client of NFS that locks, and says where, in exports of --cinder-config: %w",
			in.Export, errdefs.ErrFailedPrecondition)
	}
	if !filePattern.MatchString(in.Name) {
		return odd("name", in.Name, "volume-<UUID>: a volume with snapshots is a chain of files and cannot be attached while it has any")
	}
	if in.Format != "raw" {
		return odd("format", in.Format, "raw: a volume with snapshots is a chain of qcow2 files and cannot be attached while it has any")
	}
	out.source = record.Source{File: &record.File{Path: filepath.Join(dir, in.Name)}}
	return nil
}

// throttle makes limits of qos_specs that the hypervisor is to keep.
func throttle(qos map[string]json.RawMessage) (*record.Throttle, error) {
	t := record.Throttle{}
	for key, where := range map[string]*int64{
		"total_iops_sec": &t.IOPS, "read_iops_sec": &t.ReadIOPS, "write_iops_sec": &t.WriteIOPS,
		"total_bytes_sec": &t.BPS, "read_bytes_sec": &t.ReadBPS, "write_bytes_sec": &t.WriteBPS,
	} {
		raw, ok := qos[key]
		if !ok {
			continue
		}
		var n number
		if err := json.Unmarshal(raw, &n); err != nil || n < 0 {
			return nil, odd("qos_specs "+key, string(raw[:min(len(raw), 64)]), "a whole number, not negative")
		}
		*where = int64(n)
	}
	for _, x := range []struct {
		what               string
		total, read, write int64
	}{{"iops", t.IOPS, t.ReadIOPS, t.WriteIOPS}, {"bytes", t.BPS, t.ReadBPS, t.WriteBPS}} {
		if x.total > 0 && (x.read > 0 || x.write > 0) {
			return nil, odd("qos_specs total_"+x.what+"_sec", x.total, "a limit of all or of reads and writes, not both")
		}
	}
	if t == (record.Throttle{}) {
		return nil, nil
	}
	return &t, nil
}

func secretText(s string) bool {
	return s != "" && len(s) <= maxSecret && !strings.ContainsFunc(s, func(r rune) bool { return !unicode.IsPrint(r) })
}

// ParseKeyring reads the keys of Ceph's users in a keyring, by name without "client.".
func ParseKeyring(b []byte) (map[string]string, error) {
	if len(b) > maxInfo {
		return nil, fmt.Errorf("keyring has %d bytes, over %d: %w", len(b), maxInfo, errdefs.ErrInvalidArgument)
	}
	keys := map[string]string{}
	user := ""
	for i, line := range strings.Split(string(b), "\n") {
		line = strings.TrimSpace(line)
		if line == "" || line[0] == '#' || line[0] == ';' {
			continue
		}
		if line[0] == '[' {
			name := strings.TrimSuffix(line[1:], "]")
			// Others', of monitors for one, are not clients' keys.
			user, _ = strings.CutPrefix(name, "client.")
			if user == name {
				user = ""
			} else if !cephPattern.MatchString(user) {
				return nil, fmt.Errorf("keyring: line %d: want [client.NAME]: %w", i+1, errdefs.ErrInvalidArgument)
			}
			continue
		}
		name, value, ok := strings.Cut(line, "=")
		if !ok {
			return nil, fmt.Errorf("keyring: line %d: want key = …: %w", i+1, errdefs.ErrInvalidArgument)
		}
		if strings.TrimSpace(name) != "key" || user == "" {
			continue
		}
		key := strings.TrimSpace(value)
		// A type, a time, a length and 16 bytes at least.
		if raw, err := base64.StdEncoding.DecodeString(key); err != nil || len(raw) < 12 || len(key) > maxSecret {
			return nil, fmt.Errorf("keyring: line %d: the key of client.%s is none: %w", i+1, user, errdefs.ErrInvalidArgument)
		}
		keys[user] = key
	}
	return keys, nil
}
