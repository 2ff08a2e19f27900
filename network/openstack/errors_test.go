package openstack

import (
	"net/http"
	"strings"
	"testing"
	"time"
	"unicode"

	"github.com/containerd/errdefs"
	"github.com/gophercloud/gophercloud/v2"
)

func TestClassify(t *testing.T) {
	for name, x := range map[string]struct {
		status int
		body   string
		is     func(error) bool
		text   string
	}{
		"neutron":      {409, `{"NeutronError": {"type": "NetworkInUse", "message": "in use", "detail": ""}}`, errdefs.IsFailedPrecondition, "NetworkInUse: in use (HTTP 409)"},
		"neutron text": {400, `{"NeutronError": "no"}`, errdefs.IsInvalidArgument, "no (HTTP 400)"},
		"keystone":     {401, `{"error": {"code": 401, "message": "who?", "title": "Unauthorized"}}`, errdefs.IsUnauthorized, "who? (HTTP 401)"},
		"octavia":      {403, `{"faultcode": "Client", "faultstring": "Quota has been met."}`, errdefs.IsPermissionDenied, "Quota has been met. (HTTP 403)"},
		"cinder":       {400, `{"badRequest": {"code": 400, "message": "Invalid volume: no"}}`, errdefs.IsInvalidArgument, "Invalid volume: no (HTTP 400)"},
		"cinder quota": {413, `{"overLimit": {"code": 413, "message": "too much", "retryAfter": "0"}}`, errdefs.IsResourceExhausted, "overLimit: too much (HTTP 413)"},
		"no service":   {400, `{"x": {"message": "y"}}`, errdefs.IsInvalidArgument, "Bad Request (HTTP 400)"},
		"proxy":        {502, "<html>\x00", errdefs.IsUnavailable, "Bad Gateway (HTTP 502)"},
		"long":         {404, `{"NeutronError": {"type": "X\n", "message": "` + strings.Repeat("é", 4000) + `"}}`, errdefs.IsNotFound, "…"},
		"precondition": {412, "", errdefs.IsConflict, ""},
	} {
		err := Classify(gophercloud.ErrUnexpectedResponseCode{Actual: x.status, Body: []byte(x.body), ResponseHeader: http.Header{}})
		if !x.is(err) || !strings.Contains(err.Error(), x.text) || len(err.Error()) > 600 {
			t.Errorf("%s: %v", name, err)
		}
		if again := Classify(err); again != err {
			t.Errorf("%s: classified again: %v", name, again)
		}
	}
	inner := gophercloud.ErrUnexpectedResponseCode{Actual: 503}
	if err := Classify(&gophercloud.ErrUnableToReauthenticate{ErrReauth: inner}); !errdefs.IsUnavailable(err) {
		t.Error(err)
	}
	if err := Classify(&gophercloud.ErrErrorAfterReauthentication{ErrOriginal: gophercloud.ErrUnexpectedResponseCode{Actual: 403}}); !errdefs.IsPermissionDenied(err) {
		t.Error(err)
	}
}

func TestAfter(t *testing.T) {
	now := time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC)
	for text, want := range map[string]time.Duration{
		"": 0, "x": 0, "-1": 0, " 12 ": 12 * time.Second, "99999": maxAfter, "999999999999999999999": 0,
		"Thu, 01 Jan 2026 00:00:30 GMT": 30 * time.Second, "Thu, 01 Jan 2025 00:00:30 GMT": 0,
	} {
		if got := after(text, now); got != want {
			t.Errorf("%q: %s, want %s", text, got, want)
		}
	}
}

func FuzzRead(f *testing.F) {
	f.Add([]byte(`{"NeutronError": {"type": "X", "message": "y"}}`))
	f.Add([]byte(`{"NeutronError": "x", "faultstring": "y"}`))
	f.Fuzz(func(t *testing.T, body []byte) {
		kind, message := read(body)
		for s, most := range map[string]int{kind: 64, message: maxMessage} {
			if len(s) > max(most, maxMessage)+len("…") || strings.ContainsFunc(s, func(r rune) bool { return !unicode.IsPrint(r) && r != ' ' }) {
				t.Errorf("%q", s)
			}
		}
	})
}
