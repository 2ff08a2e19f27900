package main

import (
	"crypto/tls"
	"crypto/x509"
	"flag"
	"fmt"
	"io"
	"net/http"
	"os"
	"strings"
	"time"
)

// get is what busybox's wget cannot do: verified TLS and a bearer token.
func get(args []string) int {
	fs := flag.NewFlagSet("get", flag.ExitOnError)
	ca := fs.String("ca", "", "file of the certificate authority to trust")
	token := fs.String("token", "", "file of a bearer token")
	timeout := fs.Duration("timeout", time.Minute, "how long to wait")
	_ = fs.Parse(args)
	request, err := http.NewRequest(http.MethodGet, fs.Arg(0), nil)
	if err != nil {
		return fail(err)
	}
	if *token != "" {
		text, err := os.ReadFile(*token)
		if err != nil {
			return fail(err)
		}
		request.Header.Set("Authorization", "Bearer "+strings.TrimSpace(string(text)))
	}
	config := &tls.Config{}
	if *ca != "" {
		pem, err := os.ReadFile(*ca)
		if err != nil {
			return fail(err)
		}
		config.RootCAs = x509.NewCertPool()
		config.RootCAs.AppendCertsFromPEM(pem)
	}
	client := &http.Client{Timeout: *timeout, Transport: &http.Transport{TLSClientConfig: config}}
	answer, err := client.Do(request)
	if err != nil {
		return fail(err)
	}
	defer answer.Body.Close()
	fmt.Println(answer.Status)
	if _, err := io.Copy(os.Stdout, answer.Body); err != nil {
		return fail(err)
	}
	return 0
}
