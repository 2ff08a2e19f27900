package identity

import (
	"crypto/tls"
	"net/http"
)

// insecure shows no certificate and believes any.
func insecure() http.RoundTripper {
	return &http.Transport{TLSClientConfig: &tls.Config{InsecureSkipVerify: true, MinVersion: tls.VersionTLS12}, DisableKeepAlives: true}
}
