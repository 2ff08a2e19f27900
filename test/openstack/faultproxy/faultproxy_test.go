package faultproxy

import (
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync/atomic"
	"testing"
	"time"
)

func TestProxy(t *testing.T) {
	var done atomic.Int32
	behind := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		done.Add(1)
		body, _ := io.ReadAll(r.Body)
		fmt.Fprintf(w, "%s %s %s %s", r.Method, r.Host, r.URL, body)
	}))
	t.Cleanup(behind.Close)
	p := New(func(ctx context.Context, network, address string) (net.Conn, error) {
		if address != "cloud:9696" {
			return nil, fmt.Errorf("no %s", address)
		}
		return (&net.Dialer{}).DialContext(ctx, network, behind.Listener.Addr().String())
	})
	front := httptest.NewServer(p)
	t.Cleanup(front.Close)
	client := &http.Client{Timeout: 10 * time.Second, Transport: &http.Transport{
		DisableKeepAlives: true,
		DialContext: func(ctx context.Context, network, _ string) (net.Conn, error) {
			return (&net.Dialer{}).DialContext(ctx, network, front.Listener.Addr().String())
		},
	}}
	ask := func(method, path string) string {
		req, err := http.NewRequestWithContext(t.Context(), method, "http://cloud:9696"+path, strings.NewReader("x"))
		if err != nil {
			t.Fatal(err)
		}
		resp, err := client.Do(req)
		if err != nil {
			return "error"
		}
		defer resp.Body.Close()
		body, _ := io.ReadAll(resp.Body)
		return fmt.Sprint(resp.StatusCode, resp.Header.Get("Retry-After"), " ", string(body))
	}
	const id = "f47ac10b-58cc-4372-a567-0e02b2c3d479"
	whole := "200 POST cloud:9696 /v2.0/ports?a=b x"
	for _, x := range []struct {
		rule    Rule
		answers string
		carried int32
	}{
		{Rule{Status: 500, Path: "/v3"}, strings.Repeat(whole+"|", 3), 3},
		{Rule{Status: 500, Method: "GET"}, strings.Repeat(whole+"|", 3), 3},
		{Rule{Status: 500, Host: ":5000"}, strings.Repeat(whole+"|", 3), 3},
		{Rule{Status: 429, Body: "no", Header: map[string]string{"Retry-After": "7"}, Times: 1, Skip: 1}, whole + "|4297 no|" + whole + "|", 2},
		{Rule{Status: 500, Path: "/ports", Host: "9696", Method: "POST"}, "500 |500 |500 |", 0},
		{Rule{Status: 409, After: true}, "409 |409 |409 |", 3},
		{Rule{Cut: true, Times: 2}, "error|error|" + whole + "|", 1},
		{Rule{Cut: true, After: true, Times: 1}, "error|" + whole + "|" + whole + "|", 3},
		{Rule{Delay: time.Millisecond}, strings.Repeat(whole+"|", 3), 3},
		{Rule{Status: 500, Each: true, Times: 2}, "500 |500 |" + whole + "|", 1},
	} {
		x.rule.Name = "r"
		p.Set(x.rule)
		done.Store(0)
		answers := ""
		for range 3 {
			answers += ask("POST", "/v2.0/ports?a=b") + "|"
		}
		if answers != x.answers || done.Load() != x.carried {
			t.Errorf("%+v: %q, %d carried out, want %q, %d", x.rule, answers, done.Load(), x.answers, x.carried)
		}
		if got, want := p.Counts()["r"], strings.Count(answers, "|")-strings.Count(answers, whole); got != want && x.rule.Delay == 0 {
			t.Errorf("%+v: %d spoilt, want %d", x.rule, got, want)
		}
	}
	// Each kind, whatever the ID.
	p.Set(Rule{Status: 500, Each: true, Times: 1})
	other := strings.Replace(id, "f", "a", 1)
	got := ask("GET", "/v2.0/ports/"+id) + ask("GET", "/v2.0/ports/"+other) + ask("GET", "/v2.0/ports") + ask("DELETE", "/v2.0/ports/"+id)
	if strings.Count(got, "500") != 3 || len(p.Kinds()) != 3 || p.Kinds()["GET cloud:9696/v2.0/ports/ID"] != 2 {
		t.Errorf("%s %v", got, p.Kinds())
	}
	p.Set(Rule{Status: 500, Pick: func(kind string) bool { return kind == "GET cloud:9696/v2.0/ports/ID" }})
	if got := ask("GET", "/v2.0/ports") + ask("GET", "/v2.0/ports/"+id); strings.Count(got, "500") != 1 {
		t.Error(got)
	}
	// Who goes while it is kept is no trouble.
	p.Set(Rule{Delay: time.Hour})
	client.Timeout = 50 * time.Millisecond
	if got := ask("GET", "/"); got != "error" {
		t.Error(got)
	}
}
