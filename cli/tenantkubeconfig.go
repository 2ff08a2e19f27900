package cli

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/hex"
	"encoding/pem"
	"errors"
	"fmt"
	"regexp"
	"time"

	"github.com/containerd/errdefs"
	"github.com/spf13/cobra"

	"github.com/hypernetes/hypernetes/atomicfile"
	"github.com/hypernetes/hypernetes/cli/usage"
	"github.com/hypernetes/hypernetes/cluster/kubeconfig"
)

const (
	csrPath   = "/apis/certificates.k8s.io/v1/certificatesigningrequests"
	csrSigner = "kubernetes.io/kube-apiserver-client"
)

// userName of a tenant's user: it becomes the part of a common name behind "<tenant>:".
var userName = regexp.MustCompile(`^[A-Za-z0-9]([A-Za-z0-9._@-]{0,61}[A-Za-z0-9])?$`)

func newTenantKubeconfigCommand() *cobra.Command {
	var t target
	var user, role, namespace, file string
	var ttl, timeout time.Duration
	cmd := &cobra.Command{
		Use: "kubeconfig NAME --user USER --role ROLE", Short: "Make a kubeconfig for a user of a tenant", Args: cobra.ExactArgs(1),
		Long: `Makes a key on this machine, has the cluster sign USER's membership of the tenant, and
prints a kubeconfig. The key is nowhere else. A certificate cannot be revoked: choose
--ttl accordingly.

  reader    sees what is in the tenant's namespaces, Secrets not
  member    works there
  manager   also makes Networks and namespaces and gives roles to others

A manager may make kubeconfigs for the own tenant, with --kubeconfig.`,
		Example:           "  h8s tenant kubeconfig blue --user ann --role member --namespace web -o ann.kubeconfig",
		ValidArgsFunction: completeFirst(completeTenants(&t)),
	}
	t.add(cmd)
	roles := []string{"reader", "member", "manager"}
	f := cmd.Flags()
	f.StringVar(&user, "user", "", "name of the user")
	f.StringVar(&role, "role", "", "reader, member or manager")
	f.StringVar(&namespace, "namespace", "", "namespace that commands mean when they name none")
	f.DurationVar(&ttl, "ttl", 0, "how long it is valid, at least 10m; as long as the cluster signs for if 0")
	f.StringVarP(&file, "output", "o", "", "file to write, readable by you only; standard output if empty")
	f.DurationVar(&timeout, "timeout", 30*time.Second, "how long to wait for the signature")
	_ = cmd.RegisterFlagCompletionFunc("role", cobra.FixedCompletions(roles, cobra.ShellCompDirectiveNoFileComp)) // the flag is there
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		name := args[0]
		if err := checkTenantName(name); err != nil {
			return err
		}
		if !userName.MatchString(user) {
			return usagef("--user %q: want 1 to 63 letters, digits and . _ @ -, with a letter or digit at both ends", user)
		}
		if err := usage.OneOf("--role", role, roles...); err != nil {
			return err
		}
		if ttl != 0 && ttl < 10*time.Minute {
			return usagef("--ttl %s: want at least 10m, which is the least Kubernetes signs for", ttl)
		}
		s, err := t.open()
		if err != nil {
			return err
		}
		defer s.Close()
		if _, err := s.tenant(cmd.Context(), name); err != nil && !errdefs.IsPermissionDenied(err) {
			return err // a manager cannot read the Tenant, and need not
		}
		cert, key, err := s.sign(cmd.Context(), timeout, pkix.Name{
			CommonName: name + ":" + user, Organization: []string{"h8s:tenant:" + name + ":" + role},
		}, "h8s-"+name, ttl)
		if err != nil {
			return err
		}
		b, err := kubeconfig.Render(kubeconfig.Entry{Name: name + "-" + user, Server: s.entry.Server, CA: s.entry.CA, Cert: cert, Key: key, Namespace: namespace})
		if err != nil {
			return err
		}
		if file == "" || file == "-" {
			_, err = cmd.OutOrStdout().Write(b)
			return err
		}
		if err := atomicfile.Write(file, b, 0o600); err != nil {
			return err
		}
		fmt.Fprintf(cmd.ErrOrStderr(), "%s lets %s act as %s of tenant %s%s\n", file, user, role, name, validUntil(cert))
		return nil
	}
	return cmd
}

func validUntil(cert []byte) string {
	block, _ := pem.Decode(cert)
	if block == nil {
		return ""
	}
	c, err := x509.ParseCertificate(block.Bytes)
	if err != nil {
		return ""
	}
	return " until " + c.NotAfter.UTC().Format(time.RFC3339)
}

// sign has the cluster sign a new key; it returns certificate and key as PEM.
func (s *session) sign(ctx context.Context, timeout time.Duration, subject pkix.Name, prefix string, ttl time.Duration) (cert, key []byte, err error) {
	private, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, nil, err
	}
	der, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{Subject: subject}, private)
	if err != nil {
		return nil, nil, err
	}
	keyDER, err := x509.MarshalECPrivateKey(private)
	if err != nil {
		return nil, nil, err
	}
	var suffix [8]byte
	if _, err := rand.Read(suffix[:]); err != nil {
		return nil, nil, err
	}
	name := prefix + "-" + hex.EncodeToString(suffix[:])
	spec := map[string]any{
		"request":    pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE REQUEST", Bytes: der}),
		"signerName": csrSigner,
		"usages":     []string{"client auth", "digital signature"},
	}
	if ttl != 0 {
		spec["expirationSeconds"] = int64(ttl.Seconds())
	}
	object := map[string]any{"apiVersion": "certificates.k8s.io/v1", "kind": "CertificateSigningRequest", "metadata": map[string]any{"name": name}, "spec": spec}
	if err := s.Create(ctx, csrPath, object, nil); err != nil {
		return nil, nil, s.told(err)
	}
	cert, err = s.waitSigned(ctx, timeout, name)
	if err != nil {
		return nil, nil, err
	}
	return cert, pem.EncodeToMemory(&pem.Block{Type: "EC PRIVATE KEY", Bytes: keyDER}), nil
}

func (s *session) waitSigned(ctx context.Context, timeout time.Duration, name string) ([]byte, error) {
	ctx, cancel := context.WithTimeout(ctx, timeout)
	defer cancel()
	tick := time.NewTicker(pollEvery)
	defer tick.Stop()
	approved := false
	for {
		var o struct {
			Status struct {
				Certificate []byte
				Conditions  []condition
			}
		}
		if err := s.Get(ctx, csrPath+"/"+name, &o); err != nil && ctx.Err() == nil {
			return nil, s.told(err)
		}
		for _, c := range o.Status.Conditions {
			switch c.Type {
			case "Denied", "Failed":
				return nil, becausef("H8S_NOT_SIGNED", "the cluster does not sign it: %s (%s)", c.Message, c.Reason)
			case "Approved":
				approved = true
			}
		}
		if len(o.Status.Certificate) > 0 {
			return o.Status.Certificate, nil
		}
		select {
		case <-ctx.Done():
			if !errors.Is(ctx.Err(), context.DeadlineExceeded) {
				return nil, ctx.Err()
			}
			if approved {
				return nil, becausef("H8S_NOT_READY", "certificate request %s is approved but not signed after %s: h8s status shows whether the controller manager runs", name, timeout)
			}
			return nil, becausef("H8S_NOT_READY", "nobody approved certificate request %s in %s: h8s status shows whether h8s-controller runs", name, timeout)
		case <-tick.C:
		}
	}
}
