// Package pki owns the node's certificate authorities, certificates and keys:
// ECDSA P-256, keys readable by root only. It knows names and uses of certificates
// and must not know which program is started with them.
package pki

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"fmt"
	"io/fs"
	"math/big"
	"net"
	"os"
	"path/filepath"
	"slices"
	"time"

	"github.com/hypernetes/hypernetes/atomicfile"
)

const (
	caLife   = 10 * 365 * 24 * time.Hour
	leafLife = 365 * 24 * time.Hour
	// renewBefore: a leaf with less left is replaced at the next start.
	renewBefore = 90 * 24 * time.Hour
	backdate    = 5 * time.Minute
)

// Use says what a leaf certificate is for.
type Use int

// Uses of a leaf certificate.
const (
	Client Use = 1 << iota
	Server
)

// Leaf describes one certificate to have.
type Leaf struct {
	File   string // base name; File.crt and File.key are written
	CA     string // base name of the issuing authority
	CN     string
	Groups []string
	Use    Use
	Hosts  []string // DNS names and IP addresses
}

// Authority is a certificate authority with its key.
type Authority struct {
	Cert *x509.Certificate
	Key  crypto.Signer
}

// Store keeps certificates in a directory of mode 0700. Its methods are not safe
// for concurrent use.
type Store struct {
	Dir string
	Now func() time.Time
}

// Path is the path of a file in the store.
func (s Store) Path(name string) string { return filepath.Join(s.Dir, name) }

func (s Store) now() time.Time {
	if s.Now != nil {
		return s.Now()
	}
	return time.Now()
}

// Ensure makes the authorities, leaves and signing keys that are missing, about to
// expire, or no longer as described, and returns the names of what it wrote.
func (s Store) Ensure(authorities []string, leaves []Leaf, signingKeys []string) ([]string, error) {
	if err := os.MkdirAll(s.Dir, 0o700); err != nil {
		return nil, err
	}
	var wrote []string
	cas := map[string]Authority{}
	for _, name := range authorities {
		ca, made, err := s.authority(name)
		if err != nil {
			return wrote, fmt.Errorf("certificate authority %s: %w", name, err)
		}
		if made {
			wrote = append(wrote, name)
		}
		cas[name] = ca
	}
	for _, leaf := range leaves {
		made, err := s.leaf(leaf, cas)
		if err != nil {
			return wrote, fmt.Errorf("certificate %s: %w", leaf.File, err)
		}
		if made {
			wrote = append(wrote, leaf.File)
		}
	}
	for _, name := range signingKeys {
		made, err := s.signingKey(name)
		if err != nil {
			return wrote, fmt.Errorf("signing key %s: %w", name, err)
		}
		if made {
			wrote = append(wrote, name)
		}
	}
	return wrote, nil
}

func (s Store) authority(name string) (Authority, bool, error) {
	cert, key, err := s.load(name)
	if err == nil {
		return Authority{cert, key}, false, nil
	}
	if !errors.Is(err, fs.ErrNotExist) {
		return Authority{}, false, fmt.Errorf("%w (remove %s to have a new cluster identity)", err, s.Path(name+".crt"))
	}
	priv, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return Authority{}, false, err
	}
	tmpl := &x509.Certificate{
		SerialNumber: serial(), Subject: pkix.Name{CommonName: "h8s " + name},
		NotBefore: s.now().Add(-backdate), NotAfter: s.now().Add(caLife),
		KeyUsage: x509.KeyUsageCertSign | x509.KeyUsageDigitalSignature | x509.KeyUsageCRLSign,
		IsCA:     true, BasicConstraintsValid: true,
	}
	der, err := x509.CreateCertificate(rand.Reader, tmpl, tmpl, priv.Public(), priv)
	if err != nil {
		return Authority{}, false, err
	}
	if err := s.write(name, der, priv); err != nil {
		return Authority{}, false, err
	}
	cert, err = x509.ParseCertificate(der)
	return Authority{cert, priv}, true, err
}

func (s Store) leaf(l Leaf, cas map[string]Authority) (bool, error) {
	ca, ok := cas[l.CA]
	if !ok {
		return false, fmt.Errorf("unknown authority %q", l.CA)
	}
	tmpl := s.template(l)
	if cert, _, err := s.load(l.File); err == nil && s.fits(cert, tmpl, ca.Cert) {
		return false, nil
	}
	priv, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return false, err
	}
	der, err := x509.CreateCertificate(rand.Reader, tmpl, ca.Cert, priv.Public(), ca.Key)
	if err != nil {
		return false, err
	}
	return true, s.write(l.File, der, priv)
}

func (s Store) template(l Leaf) *x509.Certificate {
	t := &x509.Certificate{
		SerialNumber: serial(), Subject: pkix.Name{CommonName: l.CN, Organization: l.Groups},
		NotBefore: s.now().Add(-backdate), NotAfter: s.now().Add(leafLife),
		KeyUsage: x509.KeyUsageDigitalSignature, BasicConstraintsValid: true,
	}
	if l.Use&Client != 0 {
		t.ExtKeyUsage = append(t.ExtKeyUsage, x509.ExtKeyUsageClientAuth)
	}
	if l.Use&Server != 0 {
		t.ExtKeyUsage = append(t.ExtKeyUsage, x509.ExtKeyUsageServerAuth)
	}
	for _, h := range l.Hosts {
		if ip := net.ParseIP(h); ip != nil {
			t.IPAddresses = append(t.IPAddresses, ip)
		} else {
			t.DNSNames = append(t.DNSNames, h)
		}
	}
	return t
}

func (s Store) fits(have, want, ca *x509.Certificate) bool {
	sameIPs := slices.EqualFunc(have.IPAddresses, want.IPAddresses, func(a, b net.IP) bool { return a.Equal(b) })
	return have.CheckSignatureFrom(ca) == nil && have.NotAfter.Sub(s.now()) > renewBefore &&
		have.Subject.CommonName == want.Subject.CommonName && slices.Equal(have.Subject.Organization, want.Subject.Organization) &&
		slices.Equal(have.ExtKeyUsage, want.ExtKeyUsage) && slices.Equal(have.DNSNames, want.DNSNames) && sameIPs
}

// signingKey makes NAME.key and its public half NAME.pub.
func (s Store) signingKey(name string) (bool, error) {
	if _, err := os.Stat(s.Path(name + ".pub")); err == nil {
		return false, nil
	}
	priv, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return false, err
	}
	if err := s.writeKey(name, priv); err != nil {
		return false, err
	}
	pub, err := x509.MarshalPKIXPublicKey(priv.Public())
	if err != nil {
		return false, err
	}
	return true, atomicfile.Write(s.Path(name+".pub"), pem.EncodeToMemory(&pem.Block{Type: "PUBLIC KEY", Bytes: pub}), 0o644)
}

func (s Store) load(name string) (*x509.Certificate, crypto.Signer, error) {
	cb, err := os.ReadFile(s.Path(name + ".crt"))
	if err != nil {
		return nil, nil, err
	}
	kb, err := os.ReadFile(s.Path(name + ".key"))
	if err != nil {
		return nil, nil, err
	}
	cp, _ := pem.Decode(cb)
	kp, _ := pem.Decode(kb)
	if cp == nil || kp == nil {
		return nil, nil, fmt.Errorf("%s: not PEM", s.Path(name))
	}
	cert, err := x509.ParseCertificate(cp.Bytes)
	if err != nil {
		return nil, nil, err
	}
	key, err := x509.ParseECPrivateKey(kp.Bytes)
	if err == nil && !key.PublicKey.Equal(cert.PublicKey) {
		err = fmt.Errorf("%s: the key is not the certificate's", s.Path(name))
	}
	return cert, key, err
}

// write puts the key down first: as long as the certificate is not there, or is not the
// key's, the pair is not finished and load says so.
func (s Store) write(name string, der []byte, key *ecdsa.PrivateKey) error {
	if err := s.writeKey(name, key); err != nil {
		return err
	}
	return atomicfile.Write(s.Path(name+".crt"), pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}), 0o644)
}

func (s Store) writeKey(name string, key *ecdsa.PrivateKey) error {
	b, err := x509.MarshalECPrivateKey(key)
	if err != nil {
		return err
	}
	return atomicfile.Write(s.Path(name+".key"), pem.EncodeToMemory(&pem.Block{Type: "EC PRIVATE KEY", Bytes: b}), 0o600)
}

func serial() *big.Int {
	n, err := rand.Int(rand.Reader, new(big.Int).Lsh(big.NewInt(1), 120))
	if err != nil {
		panic(err) // crypto/rand does not fail on Linux
	}
	return n.Add(n, big.NewInt(1))
}
