// Package sealed is what only one node can read: how to reach a volume, keys included, on
// its way from the controller through the API server to the node's plugin.
//
// A node's plugin makes a key pair once and announces the public half in its CSI node ID.
// The controller seals to it (an anonymous NaCl box: X25519, XSalsa20-Poly1305) and writes
// into the box for which driver, volume and node it is; a box that is moved elsewhere does
// not open. A box says nothing of who sealed it: who may write a VolumeAttachment's status
// is the API server's matter.
//
// It owns the format of keys and boxes. It must not know what is in them.
package sealed

import (
	"bytes"
	"crypto/rand"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"io"

	"github.com/containerd/errdefs"
	"golang.org/x/crypto/nacl/box"
)

const (
	version = 1
	keySize = 32
	// A publish context is bounded by the CSI specification to 4 KiB, and a box is text there.
	maxText = 3800
)

// For is whom a box is for.
type For struct {
	Driver, Volume, Node string
}

// envelope is the plain text.
type envelope struct {
	Version int             `json:"v"`
	Driver  string          `json:"driver"`
	Volume  string          `json:"volume"`
	Node    string          `json:"node"`
	Content json.RawMessage `json:"content"`
}

var encoding = base64.RawURLEncoding.Strict()

// Public is the public half of a node's key.
type Public [keySize]byte

// ParsePublic reads what Key.Public returned.
func ParsePublic(s string) (Public, error) {
	var p Public
	if len(s) != encoding.EncodedLen(keySize) {
		return p, fmt.Errorf("public key %.64q is not %d bytes in base64url: %w", s, keySize, errdefs.ErrInvalidArgument)
	}
	if _, err := encoding.Decode(p[:], []byte(s)); err != nil {
		return p, fmt.Errorf("public key %.64q: %w: %w", s, err, errdefs.ErrInvalidArgument)
	}
	if p == (Public{}) {
		return p, fmt.Errorf("public key is zero: %w", errdefs.ErrInvalidArgument)
	}
	return p, nil
}

// String is its text: base64url without padding.
func (p Public) String() string { return encoding.EncodeToString(p[:]) }

// Seal puts v, as JSON, into a box that only the owner of the key can open.
func Seal(to Public, f For, v any) (string, error) {
	content, err := json.Marshal(v)
	if err != nil {
		return "", fmt.Errorf("seal: %w", err)
	}
	plain, err := json.Marshal(envelope{version, f.Driver, f.Volume, f.Node, content})
	if err != nil {
		return "", fmt.Errorf("seal: %w", err)
	}
	key := [keySize]byte(to)
	sealed, err := box.SealAnonymous(nil, plain, &key, rand.Reader)
	if err != nil {
		return "", fmt.Errorf("seal: %w", err)
	}
	text := encoding.EncodeToString(sealed)
	if len(text) > maxText {
		return "", fmt.Errorf("seal: how to reach volume %s takes %d bytes, %d are allowed: %w", f.Volume, len(text), maxText, errdefs.ErrOutOfRange)
	}
	return text, nil
}

// Open reads a box into v. The error is errdefs.ErrInvalidArgument for text that is no
// box of this key, errdefs.ErrPermissionDenied for one that is for something else. It
// never holds what is in the box.
func (k *Key) Open(text string, f For, v any) error {
	if len(text) > maxText {
		return fmt.Errorf("sealed text of %d bytes, %d are allowed: %w", len(text), maxText, errdefs.ErrInvalidArgument)
	}
	sealed, err := encoding.DecodeString(text)
	if err != nil {
		return fmt.Errorf("sealed text is not base64url: %w", errdefs.ErrInvalidArgument)
	}
	plain, ok := box.OpenAnonymous(nil, sealed, &k.public, &k.private)
	if !ok {
		return fmt.Errorf("sealed text was not sealed to this node's key %s: detach the volume and attach it again, so that it is sealed to the key the node has now: %w", k.Public(), errdefs.ErrInvalidArgument)
	}
	var e envelope
	if err := strict(plain, &e); err != nil {
		return fmt.Errorf("sealed text: %w: %w", err, errdefs.ErrInvalidArgument)
	}
	if e.Version != version {
		return fmt.Errorf("sealed text has version %d, this plugin reads %d: run controller and node plugins of one release: %w", e.Version, version, errdefs.ErrInvalidArgument)
	}
	if got := (For{e.Driver, e.Volume, e.Node}); got != f {
		return fmt.Errorf("sealed text is for %.128q, not for %.128q: %w", got, f, errdefs.ErrPermissionDenied)
	}
	if err := strict(e.Content, v); err != nil {
		return fmt.Errorf("sealed content: %w: %w", err, errdefs.ErrInvalidArgument)
	}
	return nil
}

// strict decodes exactly one value without unknown fields. Its errors hold no content.
func strict(data []byte, v any) error {
	d := json.NewDecoder(bytes.NewReader(data))
	d.DisallowUnknownFields()
	if err := d.Decode(v); err != nil {
		var syntax *json.SyntaxError
		var kind *json.UnmarshalTypeError
		switch {
		case errors.As(err, &syntax):
			return fmt.Errorf("no JSON at byte %d", syntax.Offset)
		case errors.As(err, &kind):
			return fmt.Errorf("field %s is no %s", kind.Field, kind.Type)
		case errors.Is(err, io.EOF), errors.Is(err, io.ErrUnexpectedEOF):
			return errors.New("JSON ends early")
		}
		return errors.New("not the JSON of this release")
	}
	if _, err := d.Token(); !errors.Is(err, io.EOF) {
		return errors.New("more than one JSON value")
	}
	return nil
}
