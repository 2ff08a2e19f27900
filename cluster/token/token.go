// Package token owns join tokens: their printed form, and the bootstrap-token Secrets of
// Kubernetes that they stand for. It must not know how a node joins with one.
//
// A token is printed as h8s1.<ca-hash>.<id>.<secret>. The hash pins the cluster's
// certificate authority, so that whoever joins trusts nobody else, on a network that is
// not to be trusted; id and secret are the bootstrap token.
package token

import (
	"cmp"
	"context"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"encoding/hex"
	"encoding/pem"
	"fmt"
	"maps"
	"regexp"
	"slices"
	"strings"
	"time"

	"github.com/containerd/errdefs"
)

const version = "h8s1"

// Group of those who present a token.
const Group = "system:bootstrappers:h8s:nodes"

// Token is what a node joins with. Its secret must not be logged.
type Token struct {
	// CAHash is the SHA-256 of the authority's public key in hexadecimal.
	CAHash string
	ID     string
	Secret string
}

var (
	hashForm   = regexp.MustCompile(`^[0-9a-f]{64}$`)
	idForm     = regexp.MustCompile(`^[a-z0-9]{6}$`)
	secretForm = regexp.MustCompile(`^[a-z0-9]{16}$`)
)

// New makes a token for the cluster of the authority in the PEM bundle ca.
func New(ca []byte) (Token, error) {
	hash, err := Hash(ca)
	return Token{CAHash: hash, ID: random(6), Secret: random(16)}, err
}

// Parse reads a token. Its errors say which part is wrong and never hold the secret.
func Parse(text string) (Token, error) {
	bad := func(format string, args ...any) (Token, error) {
		return Token{}, fmt.Errorf("token: %s; want %s.<ca-hash>.<id>.<secret> as h8s token create prints it: %w",
			fmt.Sprintf(format, args...), version, errdefs.ErrInvalidArgument)
	}
	text = strings.TrimSpace(text)
	if text == "" {
		return bad("is empty")
	}
	parts := strings.Split(text, ".")
	switch {
	case parts[0] != version && len(parts) == 4:
		return bad("is of version %.10q, which this h8s does not know", parts[0])
	case len(parts) != 4:
		return bad("has %d parts instead of 4", len(parts))
	case !hashForm.MatchString(parts[1]):
		return bad("the hash has %d characters and must have 64 hexadecimal ones", len(parts[1]))
	case !idForm.MatchString(parts[2]):
		return bad("the id is not 6 of a-z and 0-9")
	case !secretForm.MatchString(parts[3]):
		return bad("the secret is not 16 of a-z and 0-9; it may be cut off")
	}
	return Token{parts[1], parts[2], parts[3]}, nil
}

// Printed is the token with its secret, for the operator's eyes and hands.
func (t Token) Printed() string {
	return strings.Join([]string{version, t.CAHash, t.ID, t.Secret}, ".")
}

// String leaves the secret out.
func (t Token) String() string { return t.ID + ".…" }

// Bearer is what the API server takes.
func (t Token) Bearer() string { return t.ID + "." + t.Secret }

// Hash returns the hash of the first certificate's public key in a PEM bundle.
func Hash(bundle []byte) (string, error) {
	block, _ := pem.Decode(bundle)
	if block == nil {
		return "", fmt.Errorf("certificate authority: no PEM block: %w", errdefs.ErrInvalidArgument)
	}
	cert, err := x509.ParseCertificate(block.Bytes)
	if err != nil {
		return "", fmt.Errorf("certificate authority: %w: %w", err, errdefs.ErrInvalidArgument)
	}
	sum := sha256.Sum256(cert.RawSubjectPublicKeyInfo)
	return hex.EncodeToString(sum[:]), nil
}

func random(n int) string {
	const letters = "abcdefghijklmnopqrstuvwxyz0123456789"
	out := make([]byte, 0, n)
	var b [1]byte
	for len(out) < n {
		_, _ = rand.Read(b[:])                         // never fails
		if int(b[0]) < 256/len(letters)*len(letters) { // every letter as likely as any other
			out = append(out, letters[int(b[0])%len(letters)])
		}
	}
	return string(out)
}

// API is the little of the API server that is needed.
type API interface {
	Get(ctx context.Context, path string, out any) error
	Create(ctx context.Context, path string, object, out any) error
	Delete(ctx context.Context, path string) error
}

const (
	secrets    = "/api/v1/namespaces/kube-system/secrets"
	secretType = "bootstrap.kubernetes.io/token"
	prefix     = "bootstrap-token-"
)

type secret struct {
	APIVersion string            `json:"apiVersion"`
	Kind       string            `json:"kind"`
	Metadata   metadata          `json:"metadata"`
	Type       string            `json:"type"`
	Data       map[string][]byte `json:"data"`
}

type metadata struct {
	Name      string `json:"name"`
	Namespace string `json:"namespace,omitempty"`
}

// Info describes a token of the cluster.
type Info struct {
	ID          string    `json:"id"`
	Description string    `json:"description,omitempty"`
	Expires     time.Time `json:"expires,omitzero"`
	Groups      []string  `json:"groups,omitempty"`
}

// Expired reports whether the token is not taken any more.
func (i Info) Expired(now time.Time) bool { return !i.Expires.IsZero() && now.After(i.Expires) }

// Create stores the token; a lifetime of 0 has no end.
func Create(ctx context.Context, api API, t Token, ttl time.Duration, description string, now time.Time) error {
	data := map[string]string{
		"token-id": t.ID, "token-secret": t.Secret, "usage-bootstrap-authentication": "true",
		"usage-bootstrap-signing": "true", "auth-extra-groups": Group, "description": description,
	}
	if ttl > 0 {
		data["expiration"] = now.Add(ttl).UTC().Format(time.RFC3339)
	}
	s := secret{APIVersion: "v1", Kind: "Secret", Metadata: metadata{prefix + t.ID, "kube-system"}, Type: secretType, Data: map[string][]byte{}}
	for _, k := range slices.Sorted(maps.Keys(data)) {
		s.Data[k] = []byte(data[k])
	}
	return api.Create(ctx, secrets, s, nil)
}

// List lists the cluster's tokens, those that expire first at the beginning.
func List(ctx context.Context, api API) ([]Info, error) {
	var list struct{ Items []secret }
	if err := api.Get(ctx, secrets+"?fieldSelector=type%3D"+strings.ReplaceAll(secretType, "/", "%2F"), &list); err != nil {
		return nil, err
	}
	out := make([]Info, 0, len(list.Items))
	for _, s := range list.Items {
		i := Info{ID: string(s.Data["token-id"]), Description: string(s.Data["description"])}
		if g := string(s.Data["auth-extra-groups"]); g != "" {
			i.Groups = strings.Split(g, ",")
		}
		if at, err := time.Parse(time.RFC3339, string(s.Data["expiration"])); err == nil {
			i.Expires = at
		}
		out = append(out, i)
	}
	slices.SortFunc(out, func(a, b Info) int { return cmp.Or(a.Expires.Compare(b.Expires), cmp.Compare(a.ID, b.ID)) })
	return out, nil
}

// Revoke removes the token whose id, or whose printed form, is given.
func Revoke(ctx context.Context, api API, text string) (string, error) {
	id := text
	if !idForm.MatchString(id) {
		t, err := Parse(text)
		if err != nil {
			return "", fmt.Errorf("%w (or give its id)", err)
		}
		id = t.ID
	}
	if err := api.Get(ctx, secrets+"/"+prefix+id, nil); err != nil {
		if errdefs.IsNotFound(err) {
			return id, fmt.Errorf("token %s: there is none; h8s token list shows those there are: %w", id, errdefs.ErrNotFound)
		}
		return id, err
	}
	return id, api.Delete(ctx, secrets+"/"+prefix+id)
}
