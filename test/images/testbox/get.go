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

// get is what busybox's wget cannot do: verified TLS, a bearer token, and many URLs at once.
func get(args []string) int {
	fs := flag.NewFlagSet("get", flag.ExitOnError)
	ca := fs.String("ca", "", "file of the certificate authority to trust")
	token := fs.String("token", "", "file of a bearer token")
	timeout := fs.Duration("timeout", time.Minute, "how long to wait")
	_ = fs.Parse(args)
	bearer := ""
	if *token != "" {
		text, err := os.ReadFile(*token)
		if err != nil {
			return fail(err)
		}
		bearer = "Bearer " + strings.TrimSpace(string(text))
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
	code := 0
	for _, url := range fs.Args() {
		if err := fetch(client, url, bearer); err != nil {
			code = fail(err)
		}
	}
	return code
}

func fetch(client *http.Client, url, bearer string) error {
	request, err := http.NewRequest(http.MethodGet, url, nil)
	if err != nil {
		return err
	}
	if bearer != "" {
		request.Header.Set("Authorization", bearer)
	}
	answer, err := client.Do(request)
	if err != nil {
		return err
	}
	defer answer.Body.Close()
	fmt.Println(answer.Status)
	_, err = io.Copy(os.Stdout, answer.Body)
	return err
}
