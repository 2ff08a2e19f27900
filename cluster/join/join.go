// Package join owns how an agent comes to trust a cluster and to be trusted by it:
// fetching the authority its token pins, and asking for certificates. It must not know
// what is started with them.
package join

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/base64"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"time"

	"github.com/containerd/errdefs"
	"sigs.k8s.io/yaml"

	"github.com/hypernetes/hypernetes/cluster/apiclient"
	"github.com/hypernetes/hypernetes/cluster/token"
)

// ErrName says that the cluster has a living node of that name.
var ErrName = errors.New("the cluster has a node of that name")

// ErrServer says that no API server answers where the agent was sent.
var ErrServer = errors.New("no API server answers there")

// Dial reaches the API server.
type Dial func(ctx context.Context, network, address string) (net.Conn, error)

const (
	// patience with a server that does not answer.
	patience  = 15 * time.Second
	maxAnswer = 1 << 20
	pause     = 500 * time.Millisecond
)

// tokenPatience is for a token the server does not know: it learns of new ones with a
// delay.
var tokenPatience = 5 * time.Second

// ErrPin says that the server's authority is not the token's.
var ErrPin = errors.New("the server's certificate authority is not the one the token names")

// ErrToken says that the server does not take the token.
var ErrToken = errors.New("the server does not accept the token")

// Authority fetches the cluster's certificate authority from the API server at server,
// trusting nothing but the hash in the token, and checks that the token is taken and that
// no node of the name is there. Only what the hash vouches for is returned.
//
// Errors: ErrServer, ErrPin, ErrToken, ErrName.
func Authority(ctx context.Context, server string, t token.Token, node string, dial Dial) ([]byte, error) {
	info, err := clusterInfo(ctx, server, dial)
	if err != nil {
		return nil, err
	}
	ca, err := pinned(info, t.CAHash)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", server, err)
	}
	api, err := apiclient.New(apiclient.Config{Server: server, CA: ca, Token: t.Bearer(), Dial: dial})
	if err != nil {
		return nil, err
	}
	defer api.Close()
	if err := accepted(ctx, api, server, t); err != nil {
		return nil, err
	}
	return ca, free(ctx, api, node)
}

// free fails if a node of the name is alive: with its certificate, this one would be it.
func free(ctx context.Context, api API, node string) error {
	var n struct {
		Status struct {
			Conditions []struct{ Type, Status string }
		}
	}
	if err := api.Get(ctx, "/api/v1/nodes/"+node, &n); err != nil {
		if errdefs.IsNotFound(err) {
			return nil
		}
		return fmt.Errorf("node %s: %w", node, err)
	}
	for _, c := range n.Status.Conditions {
		if c.Type == "Ready" && c.Status == "True" {
			return fmt.Errorf("%w: node %s; give this one another --name, or remove that one with h8s node remove", ErrName, node)
		}
	}
	return nil
}

// clusterInfo reads what the cluster says about itself to anybody.
func clusterInfo(ctx context.Context, server string, dial Dial) ([]byte, error) {
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	client := &http.Client{Transport: &http.Transport{
		DialContext: dial, DisableKeepAlives: true, TLSHandshakeTimeout: 5 * time.Second,
		// What comes is not believed before its hash was compared.
		TLSClientConfig: &tls.Config{MinVersion: tls.VersionTLS12, InsecureSkipVerify: true},
	}}
	tick := time.NewTicker(pause)
	defer tick.Stop()
	var last error
	for {
		b, err := get(ctx, client, server+"/api/v1/namespaces/kube-public/configmaps/cluster-info")
		if err == nil {
			return b, nil
		}
		if last == nil || ctx.Err() == nil {
			last = err
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			return nil, fmt.Errorf("%s: %w: %w", server, ErrServer, last)
		}
	}
}

func get(ctx context.Context, client *http.Client, url string) ([]byte, error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
	if err != nil {
		return nil, err
	}
	resp, err := client.Do(req)
	if err != nil {
		return nil, err
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(io.LimitReader(resp.Body, maxAnswer))
	if err == nil && resp.StatusCode != http.StatusOK {
		err = fmt.Errorf("HTTP %d", resp.StatusCode)
	}
	return b, err
}

// pinned returns, of the authorities in a cluster-info ConfigMap, the one with the hash.
func pinned(info []byte, hash string) ([]byte, error) {
	var object struct{ Data map[string]string }
	if err := json.Unmarshal(info, &object); err != nil {
		return nil, fmt.Errorf("cluster-info: %w", err)
	}
	var config struct {
		Clusters []struct {
			Cluster struct {
				CA string `json:"certificate-authority-data"`
			} `json:"cluster"`
		} `json:"clusters"`
	}
	if err := yaml.Unmarshal([]byte(object.Data["kubeconfig"]), &config); err != nil {
		return nil, fmt.Errorf("cluster-info: kubeconfig: %w", err)
	}
	for _, c := range config.Clusters {
		bundle, err := base64.StdEncoding.DecodeString(c.Cluster.CA)
		if err != nil {
			continue
		}
		for block, rest := pem.Decode(bundle); block != nil; block, rest = pem.Decode(rest) {
			one := pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: block.Bytes})
			if h, err := token.Hash(one); err == nil && h == hash {
				return one, nil
			}
		}
	}
	return nil, fmt.Errorf("%w: it is another cluster, or somebody is between", ErrPin)
}

// accepted asks for what a bootstrap token may not see: to be forbidden is to be known.
func accepted(ctx context.Context, api *apiclient.Client, server string, t token.Token) error {
	ctx, cancel := context.WithTimeout(ctx, tokenPatience)
	defer cancel()
	tick := time.NewTicker(pause)
	defer tick.Stop()
	var last error
	for {
		err := api.Get(ctx, "/api/v1/nodes?limit=1", nil)
		var status *apiclient.StatusError
		switch {
		case err == nil:
			return nil
		case errors.As(err, &status) && status.Code == http.StatusForbidden:
			return nil
		case errors.As(err, &status) && status.Code == http.StatusUnauthorized:
			err = fmt.Errorf("%s: %w %s: it has expired, was revoked, or its secret is wrong; make another with h8s token create", server, ErrToken, t.ID)
		}
		if last == nil || ctx.Err() == nil {
			last = err // not that time was up while it was asked
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			return last
		}
	}
}

// ClientSigner signs the client certificates that are asked for here.
const ClientSigner = "kubernetes.io/kube-apiserver-client"

// Request describes a client certificate to ask for.
type Request struct {
	Name   string // of the request object, as a prefix
	CN     string
	Groups []string
}

// API is the little of the API server that is needed.
type API interface {
	Get(ctx context.Context, path string, out any) error
	Create(ctx context.Context, path string, object, out any) error
}

const requests = "/apis/certificates.k8s.io/v1/certificatesigningrequests"

type csr struct {
	APIVersion string      `json:"apiVersion"`
	Kind       string      `json:"kind"`
	Metadata   csrMetadata `json:"metadata"`
	Spec       csrSpec     `json:"spec"`
	Status     *csrStatus  `json:"status,omitempty"`
}

type csrMetadata struct {
	Name         string `json:"name,omitempty"`
	GenerateName string `json:"generateName,omitempty"`
}

type csrSpec struct {
	Request    []byte   `json:"request"`
	SignerName string   `json:"signerName"`
	Usages     []string `json:"usages"`
}

type csrStatus struct {
	Certificate []byte `json:"certificate"`
	Conditions  []struct{ Type, Reason, Message string }
}

// Certificate asks for a client certificate with a new key and waits until it is issued
// or refused. Both are returned as PEM.
func Certificate(ctx context.Context, api API, r Request) (cert, key []byte, err error) {
	priv, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, nil, err
	}
	der, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{
		Subject: pkix.Name{CommonName: r.CN, Organization: r.Groups},
	}, priv)
	if err != nil {
		return nil, nil, err
	}
	keyDER, err := x509.MarshalECPrivateKey(priv)
	if err != nil {
		return nil, nil, err
	}
	var made csr
	err = api.Create(ctx, requests, csr{
		APIVersion: "certificates.k8s.io/v1", Kind: "CertificateSigningRequest",
		Metadata: csrMetadata{GenerateName: r.Name + "-"},
		Spec: csrSpec{
			Request:    pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE REQUEST", Bytes: der}),
			SignerName: ClientSigner, Usages: []string{"digital signature", "client auth"},
		},
	}, &made)
	if err != nil {
		return nil, nil, fmt.Errorf("certificate of %s: %w", r.CN, err)
	}
	if cert, err = issued(ctx, api, made.Metadata.Name); err != nil {
		return nil, nil, fmt.Errorf("certificate of %s: %w", r.CN, err)
	}
	return cert, pem.EncodeToMemory(&pem.Block{Type: "EC PRIVATE KEY", Bytes: keyDER}), nil
}

func issued(ctx context.Context, api API, name string) ([]byte, error) {
	tick := time.NewTicker(pause)
	defer tick.Stop()
	for {
		var c csr
		err := api.Get(ctx, requests+"/"+name, &c)
		if err == nil && c.Status != nil {
			for _, cond := range c.Status.Conditions {
				if cond.Type == "Denied" || cond.Type == "Failed" {
					return nil, fmt.Errorf("request %s was %s: %s: %w", name, cond.Type, cond.Message, errdefs.ErrPermissionDenied)
				}
			}
			if len(bytes.TrimSpace(c.Status.Certificate)) > 0 {
				return c.Status.Certificate, nil
			}
			err = errors.New("nobody has approved it yet; is h8s-controller running on the server?")
		}
		if err == nil {
			err = errors.New("not answered yet")
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			return nil, fmt.Errorf("request %s: %w: %w", name, err, ctx.Err())
		}
	}
}

// Fresh reports whether the first certificate in a PEM bundle is the authority's, has the
// name wanted, and more than a third of its life left.
func Fresh(bundle, ca []byte, r Request, now time.Time) bool {
	cert, err := first(bundle)
	return err == nil && Issued(bundle, ca, r) && cert.NotAfter.Sub(now) > cert.NotAfter.Sub(cert.NotBefore)/3
}

// Issued reports whether the first certificate in a PEM bundle is the authority's and has
// the name wanted, whatever its age.
func Issued(bundle, ca []byte, r Request) bool {
	cert, err1 := first(bundle)
	issuer, err2 := first(ca)
	return err1 == nil && err2 == nil && cert.CheckSignatureFrom(issuer) == nil && cert.Subject.CommonName == r.CN
}

// Left is the time before the first certificate in a PEM bundle expires.
func Left(bundle []byte, now time.Time) (time.Duration, error) {
	cert, err := first(bundle)
	if err != nil {
		return 0, err
	}
	return cert.NotAfter.Sub(now), nil
}

// first reads the first certificate of a PEM bundle, which may hold a key before it.
func first(bundle []byte) (*x509.Certificate, error) {
	for block, rest := pem.Decode(bundle); block != nil; block, rest = pem.Decode(rest) {
		if block.Type == "CERTIFICATE" {
			return x509.ParseCertificate(block.Bytes)
		}
	}
	return nil, fmt.Errorf("no certificate: %w", errdefs.ErrNotFound)
}
