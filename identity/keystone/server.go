package keystone

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"time"

	"github.com/containerd/errdefs"
	"github.com/containerd/log"
	"golang.org/x/time/rate"
	authenticationv1 "k8s.io/api/authentication/v1"
	"sigs.k8s.io/controller-runtime/pkg/certwatcher"
)

// Path is where TokenReviews are posted to.
const Path = "/authenticate"

// maxReview bounds a TokenReview; a token is refused from maxToken on.
const maxReview = 64 << 10

// reviewTimeout bounds the answer to the API server, which waits for 30 s.
const reviewTimeout = 8 * time.Second

// Handler answers TokenReviews of authentication.k8s.io/v1.
func (r *Reviewer) Handler() http.Handler {
	h := &handler{Reviewer: r, told: rate.NewLimiter(1, 10)}
	mux := http.NewServeMux()
	mux.HandleFunc("POST "+Path, h.review)
	return mux
}

type handler struct {
	*Reviewer
	// told keeps somebody with a bad token from filling the log.
	told *rate.Limiter
}

func (h *handler) review(w http.ResponseWriter, req *http.Request) {
	ctx, cancel := context.WithTimeout(req.Context(), reviewTimeout)
	defer cancel()
	body, err := io.ReadAll(http.MaxBytesReader(w, req.Body, maxReview))
	var in authenticationv1.TokenReview
	if err == nil {
		err = json.Unmarshal(body, &in)
	}
	if err != nil || in.Kind != "TokenReview" || in.APIVersion != authenticationv1.SchemeGroupVersion.String() {
		h.metrics.answers.WithLabelValues("malformed").Inc()
		// What was read is not repeated: it may hold a token.
		http.Error(w, "want a TokenReview of authentication.k8s.io/v1 (--authentication-token-webhook-version=v1)", http.StatusBadRequest)
		return
	}
	out := authenticationv1.TokenReview{}
	out.Kind, out.APIVersion = in.Kind, in.APIVersion
	user, err := h.Review(ctx, in.Spec.Token)
	var refused *Refusal
	switch {
	case err == nil:
		h.metrics.answers.WithLabelValues("authenticated").Inc()
		out.Status.Authenticated, out.Status.User = true, user
	case errors.Is(err, ErrUnknown):
		// Without an error: there may be other authenticators that know it.
		h.metrics.answers.WithLabelValues("unknown").Inc()
	case errors.As(err, &refused):
		h.metrics.answers.WithLabelValues("refused").Inc()
		out.Status.Error = "keystone: " + refused.Reason
		if h.told.Allow() {
			log.G(ctx).WithField("reason", refused.Reason).Info("a Keystone token was refused")
		}
	default:
		h.metrics.answers.WithLabelValues("unavailable").Inc()
		out.Status.Error = "keystone: " + err.Error()
		if h.told.Allow() {
			log.G(ctx).WithError(err).Warn("a Keystone token could not be checked")
		}
	}
	w.Header().Set("Content-Type", "application/json")
	_ = json.NewEncoder(w).Encode(out) // the API server went away
}

// Server serves a Reviewer on every replica.
type Server struct {
	listener net.Listener
	server   *http.Server
	watcher  *certwatcher.CertWatcher
}

// ServerOptions say where and as whom.
type ServerOptions struct {
	Address           string
	CertFile, KeyFile string
	// ClientCAFile, if set, admits only those with a certificate of this authority.
	ClientCAFile string
}

// NewServer listens; Start serves.
func NewServer(r *Reviewer, o ServerOptions) (*Server, error) {
	watcher, err := certwatcher.New(o.CertFile, o.KeyFile)
	if err != nil {
		return nil, fmt.Errorf("certificate: %w", err)
	}
	config := &tls.Config{MinVersion: tls.VersionTLS12, GetCertificate: watcher.GetCertificate, NextProtos: []string{"h2", "http/1.1"}}
	if o.ClientCAFile != "" {
		text, err := os.ReadFile(o.ClientCAFile)
		if err != nil {
			return nil, fmt.Errorf("client authority: %w", err)
		}
		config.ClientCAs, config.ClientAuth = x509.NewCertPool(), tls.RequireAndVerifyClientCert
		if !config.ClientCAs.AppendCertsFromPEM(text) {
			return nil, fmt.Errorf("client authority: %s holds no PEM certificate: %w", o.ClientCAFile, errdefs.ErrInvalidArgument)
		}
	}
	l, err := net.Listen("tcp", o.Address)
	if err != nil {
		return nil, err
	}
	return &Server{listener: tls.NewListener(l, config), watcher: watcher, server: &http.Server{
		Handler: r.Handler(), ReadHeaderTimeout: 5 * time.Second, ReadTimeout: 10 * time.Second,
		WriteTimeout: reviewTimeout + 5*time.Second, IdleTimeout: 2 * time.Minute, MaxHeaderBytes: 16 << 10, TLSConfig: config,
	}}, nil
}

// Address is where it listens.
func (s *Server) Address() string { return s.listener.Addr().String() }

// NeedLeaderElection implements manager.LeaderElectionRunnable: every replica answers.
func (s *Server) NeedLeaderElection() bool { return false }

// Start implements manager.Runnable.
func (s *Server) Start(ctx context.Context) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	watched := make(chan error, 1)
	go func() { watched <- s.watcher.Start(ctx) }()
	stopped := make(chan struct{})
	go func() {
		defer close(stopped)
		<-ctx.Done()
		end, cancel := context.WithTimeout(context.WithoutCancel(ctx), reviewTimeout)
		defer cancel()
		if s.server.Shutdown(end) != nil {
			_ = s.server.Close()
		}
	}()
	err := s.server.Serve(s.listener)
	cancel()
	<-stopped
	if werr := <-watched; errors.Is(err, http.ErrServerClosed) {
		return werr
	}
	return err
}
