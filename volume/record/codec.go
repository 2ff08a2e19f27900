package record

import (
	"bytes"
	"encoding/json"
	"fmt"
	"net"
	"path/filepath"
	"regexp"
	"strconv"
	"unicode"
	"unicode/utf8"

	"github.com/containerd/errdefs"
)

// maxRecord bounds a record, in bytes.
const maxRecord = 64 << 10

// Bounds of lists and texts in a record.
const (
	maxVolume   = 128
	maxPath     = 4095
	maxMonitors = 32
	maxOptions  = 32
	maxLUN      = 16383
)

var (
	keyPattern    = regexp.MustCompile(`^[0-9a-f]{32}$`)
	podPattern    = regexp.MustCompile(`^[a-z0-9][a-z0-9-]{0,62}$`)
	secretName    = regexp.MustCompile(`^[a-z][a-z0-9-]{0,31}$`)
	driverPattern = regexp.MustCompile(`^[a-zA-Z0-9]([a-zA-Z0-9.-]{0,61}[a-zA-Z0-9])?$`)
	serialPattern = regexp.MustCompile(`^[a-zA-Z0-9_-]{1,20}$`)
	// cephName are names of pools, images and users: what Cinder makes, and no more, as
	// some of Ceph's tools read @, / and : in them.
	cephName   = regexp.MustCompile(`^[a-zA-Z0-9_][a-zA-Z0-9_.-]{0,127}$`)
	iqnPattern = regexp.MustCompile(`^(iqn|eui|naa)\.[a-zA-Z0-9.:_-]{1,219}$`)
	userName   = regexp.MustCompile(`^[a-zA-Z0-9_.@:-]{1,128}$`)
	option     = regexp.MustCompile(`^[a-z0-9_]+(=[a-zA-Z0-9_.,:-]+)?$`)
)

// document is what is written to a file.
type document interface {
	Staged | Publication
}

// encode validates and encodes a record.
func encode[T document](v *T) ([]byte, error) {
	if err := validate(v); err != nil {
		return nil, fmt.Errorf("%w: %w", err, errdefs.ErrInvalidArgument)
	}
	b, err := marshal(v)
	if err == nil && len(b) > maxRecord {
		err = fmt.Errorf("record has %d bytes, over %d: %w", len(b), maxRecord, errdefs.ErrInvalidArgument)
	}
	return b, err
}

func marshal(v any) ([]byte, error) {
	b, err := json.MarshalIndent(v, "", "  ")
	return append(b, '\n'), err
}

// decode reads what encode wrote and nothing else: a field more, less, twice or in other
// letters, another version or a byte after the end is an error.
func decode[T document](b []byte) (T, error) {
	var v T
	d := json.NewDecoder(bytes.NewReader(b))
	d.DisallowUnknownFields()
	if err := d.Decode(&v); err != nil {
		return v, fmt.Errorf("%w: %w", err, errdefs.ErrDataLoss)
	}
	if err := validate(&v); err != nil {
		return v, fmt.Errorf("%w: %w", err, errdefs.ErrDataLoss)
	}
	if again, err := marshal(v); err != nil || !bytes.Equal(again, b) {
		return v, fmt.Errorf("is not as it was written: %w", errdefs.ErrDataLoss)
	}
	return v, nil
}

func validate[T document](v *T) error {
	switch v := any(v).(type) {
	case *Staged:
		return v.validate()
	case *Publication:
		return v.validate()
	}
	return nil
}

func wrong(field string, value any, remedy string) error {
	return fmt.Errorf("%s %.200q: %s", field, fmt.Sprint(value), remedy)
}

func invalid(what, field, value, remedy string) error {
	return fmt.Errorf("%s: %w: %w", what, wrong(field, value, remedy), errdefs.ErrInvalidArgument)
}

func checkKey(key string) error {
	if !keyPattern.MatchString(key) {
		return invalid("volume", "key", key, "32 of 0-9 and a-f")
	}
	return nil
}

func checkPod(uid string) error {
	if !podPattern.MatchString(uid) {
		return invalid("pod", "UID", uid, "1 to 63 of a-z, 0-9 and -")
	}
	return nil
}

func (s *Staged) validate() error {
	switch {
	case s.Version != Version:
		return wrong("version", s.Version, "must be "+strconv.Itoa(Version))
	case !driverPattern.MatchString(s.Driver):
		return wrong("driver", s.Driver, "must be a CSI driver's name")
	case !validText(s.Volume, 1, maxVolume):
		return wrong("volume", s.Volume, fmt.Sprintf("must be 1 to %d printable bytes", maxVolume))
	case !validText(s.Attachment, 0, maxVolume):
		return wrong("attachment", s.Attachment, fmt.Sprintf("must be at most %d printable bytes", maxVolume))
	case !serialPattern.MatchString(s.Serial):
		return wrong("serial", s.Serial, "must be 1 to 20 of a-z, A-Z, 0-9, _ and -")
	case s.SizeBytes < 0:
		return wrong("sizeBytes", s.SizeBytes, "must not be negative")
	case s.Format != FormatNever && s.Format != FormatBlank:
		return wrong("format", s.Format, `must be "" or "blank"`)
	}
	if err := s.Source.validate(); err != nil {
		return fmt.Errorf("source: %w", err)
	}
	if t := s.Throttle; t != nil {
		for _, v := range []int64{t.IOPS, t.ReadIOPS, t.WriteIOPS, t.BPS, t.ReadBPS, t.WriteBPS} {
			if v < 0 {
				return wrong("throttle", v, "must not be negative")
			}
		}
		if t.IOPS > 0 && t.ReadIOPS+t.WriteIOPS > 0 {
			return wrong("throttle iops", t.IOPS, "bounds all or reads and writes, not both")
		}
		if t.BPS > 0 && t.ReadBPS+t.WriteBPS > 0 {
			return wrong("throttle bps", t.BPS, "bounds all or reads and writes, not both")
		}
	}
	return nil
}

func (s Source) validate() error {
	n := 0
	var err error
	if s.File != nil {
		n++
		if !validPath(s.File.Path) {
			err = wrong("file path", s.File.Path, "must be absolute and clean")
		}
	}
	if s.RBD != nil {
		n++
		err = s.RBD.validate()
	}
	if s.ISCSI != nil {
		n++
		err = s.ISCSI.validate()
	}
	if n != 1 {
		return wrong("kinds", n, "exactly one of file, rbd and iscsi must be set")
	}
	return err
}

func (r *RBD) validate() error {
	switch {
	case !cephName.MatchString(r.Pool):
		return wrong("rbd pool", r.Pool, "must be 1 to 128 of a-z, A-Z, 0-9, _, . and -")
	case !cephName.MatchString(r.Image):
		return wrong("rbd image", r.Image, "must be 1 to 128 of a-z, A-Z, 0-9, _, . and -")
	case r.User != "" && !cephName.MatchString(r.User):
		return wrong("rbd user", r.User, "must be 1 to 128 of a-z, A-Z, 0-9, _, . and -")
	case len(r.Monitors) == 0 || len(r.Monitors) > maxMonitors:
		return wrong("rbd monitors", len(r.Monitors), fmt.Sprintf("must be 1 to %d", maxMonitors))
	}
	for _, m := range r.Monitors {
		if !validEndpoint(m) {
			return wrong("rbd monitor", m, "must be host:port")
		}
	}
	return nil
}

func (i *ISCSI) validate() error {
	switch {
	case !validEndpoint(i.Portal):
		return wrong("iscsi portal", i.Portal, "must be host:port")
	case !iqnPattern.MatchString(i.Target):
		return wrong("iscsi target", i.Target, "must be an IQN, EUI or NAA name")
	case i.Initiator != "" && !iqnPattern.MatchString(i.Initiator):
		return wrong("iscsi initiator", i.Initiator, "must be an IQN, EUI or NAA name")
	case i.User != "" && !userName.MatchString(i.User):
		return wrong("iscsi user", i.User, "must be 1 to 128 of a-z, A-Z, 0-9, _, ., @, : and -")
	case i.LUN < 0 || i.LUN > maxLUN:
		return wrong("iscsi lun", i.LUN, fmt.Sprintf("must be 0 to %d", maxLUN))
	}
	return nil
}

func (p *Publication) validate() error {
	switch {
	case p.Version != Version:
		return wrong("version", p.Version, "must be "+strconv.Itoa(Version))
	case !podPattern.MatchString(p.PodUID):
		return wrong("podUID", p.PodUID, "must be 1 to 63 of a-z, 0-9 and -")
	case !validPath(p.Target):
		return wrong("target", p.Target, "must be absolute and clean")
	case p.Device == 0:
		return wrong("device", p.Device, "must be the placeholder's")
	case p.Mode != Filesystem && p.Mode != Block:
		return wrong("mode", p.Mode, "must be filesystem or block")
	case p.Mode == Filesystem && p.FSType != "ext4" && p.FSType != "xfs":
		return wrong("fsType", p.FSType, "must be ext4 or xfs")
	case p.Mode == Block && (p.FSType != "" || len(p.Options) > 0 || p.FSGroup != nil || p.FSGroupAlways):
		return wrong("mode", p.Mode, "a raw device has no file system, options or group")
	case len(p.Options) > maxOptions:
		return wrong("options", len(p.Options), fmt.Sprintf("at most %d", maxOptions))
	}
	for _, o := range p.Options {
		if len(o) > 128 || !option.MatchString(o) {
			return wrong("option", o, "must be name or name=value, at most 128 bytes")
		}
	}
	return nil
}

func validText(s string, least, most int) bool {
	if len(s) < least || len(s) > most || !utf8.ValidString(s) {
		return false
	}
	for _, r := range s {
		if !unicode.IsPrint(r) {
			return false
		}
	}
	return true
}

func validPath(p string) bool {
	return len(p) > 1 && len(p) <= maxPath && filepath.IsAbs(p) && filepath.Clean(p) == p && utf8.ValidString(p) &&
		!bytes.ContainsAny([]byte(p), "\x00\n")
}

var hostPattern = regexp.MustCompile(`^[a-zA-Z0-9]([a-zA-Z0-9.-]{0,251}[a-zA-Z0-9])?$`)

func validEndpoint(s string) bool {
	host, port, err := net.SplitHostPort(s)
	if err != nil || net.ParseIP(host) == nil && !hostPattern.MatchString(host) {
		return false
	}
	n, err := strconv.ParseUint(port, 10, 16)
	return err == nil && n > 0 && strconv.FormatUint(n, 10) == port
}
