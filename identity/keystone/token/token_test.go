package token

import (
	"strings"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/google/go-cmp/cmp"
)

// real is what Keystone 22 (Zed) answered, its catalogue cut.
const real = `{"token":{"methods":["password"],"user":{"domain":{"id":"default","name":"Default"},"id":"f0bf2f87157943f699a44efd0147131d","name":"alpha","password_expires_at":null},"audit_ids":["3ZNipdmiRxyAq8FIJ5dgvA"],"expires_at":"2026-11-21T02:32:30.000000Z","issued_at":"2026-11-21T01:32:30.000000Z","project":{"domain":{"id":"default","name":"Default"},"id":"c6ceed27a81e43f784841bf8a249adce","name":"alpha"},"is_domain":false,"roles":[{"id":"0e8a34ac45d6465d85e7e4b53d7c539c","name":"member"},{"id":"0f5c1223f5464de3ac229a998bf94485","name":"reader"}]}}`

func TestDecode(t *testing.T) {
	got, err := Decode([]byte(real))
	if err != nil {
		t.Fatal(err)
	}
	standard := Ref{"default", "Default"}
	want := Token{
		Methods: []string{"password"}, AuditIDs: []string{"3ZNipdmiRxyAq8FIJ5dgvA"},
		IssuedAt: time.Date(2026, 11, 21, 1, 32, 30, 0, time.UTC), Expires: time.Date(2026, 11, 21, 2, 32, 30, 0, time.UTC),
		User:    Owned{Ref{"f0bf2f87157943f699a44efd0147131d", "alpha"}, standard},
		Project: &Owned{Ref{"c6ceed27a81e43f784841bf8a249adce", "alpha"}, standard},
		Roles:   []Role{{Ref{"0e8a34ac45d6465d85e7e4b53d7c539c", "member"}, ""}, {Ref{"0f5c1223f5464de3ac229a998bf94485", "reader"}, ""}},
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Error(diff)
	}
}

func TestDecodeNotices(t *testing.T) {
	for name, c := range map[string]struct {
		add  string
		seen func(Token) bool
	}{
		"system":            {`"system":{"all":true}`, func(t Token) bool { return t.System }},
		"domain":            {`"domain":{"id":"d"}`, func(t Token) bool { return t.Domain != nil }},
		"trust":             {`"OS-TRUST:trust":{"id":"x"}`, func(t Token) bool { return t.Trust }},
		"an empty trust":    {`"OS-TRUST:trust":{}`, func(t Token) bool { return t.Trust }},
		"oauth1":            {`"OS-OAUTH1":{"access_token_id":"x"}`, func(t Token) bool { return t.OAuth1 }},
		"bound":             {`"oauth2_credential":{"x5t#S256":"x"}`, func(t Token) bool { return t.Bound }},
		"bind":              {`"bind":{"kerberos":"x"}`, func(t Token) bool { return t.Bound }},
		"access rules":      {`"application_credential":{"id":"c","restricted":true,"access_rules":[{}]}`, func(t Token) bool { return t.ApplicationCredential.AccessRules }},
		"no access rules":   {`"application_credential":{"id":"c","access_rules":null}`, func(t Token) bool { return !t.ApplicationCredential.AccessRules }},
		"empty rules":       {`"application_credential":{"id":"c","access_rules":[]}`, func(t Token) bool { return t.ApplicationCredential.AccessRules }},
		"no system":         {`"system":null`, func(t Token) bool { return !t.System }},
		"restricted if not": {`"application_credential":{"id":"c"}`, func(t Token) bool { return t.ApplicationCredential.Restricted }},
	} {
		got, err := Decode([]byte(strings.Replace(real, `{"token":{`, `{"token":{`+c.add+",", 1)))
		if err != nil || !c.seen(got) {
			t.Errorf("%s: %+v %v", name, got, err)
		}
	}
}

func TestDecodeRefuses(t *testing.T) {
	for _, text := range []string{
		"", "null", "[]", `{}`, `{"token":null}`, `{"token":{}}`, `{"token":{"user":{"id":"u"}}}`, `{"token":{"user":{"id":7},"expires_at":"2026-11-21T02:32:30Z"}}`,
		`{"token":{"user":{"id":"u"},"expires_at":"soon"}}`, `{"token":{"user":{"id":"u"},"expires_at":"2026-11-21T02:32:30Z","project":{}}}`,
		`{"token":{"user":{"id":"u"},"expires_at":"2026-11-21T02:32:30Z","roles":[` + strings.Repeat("{},", MaxItems) + `{}]}}`,
		strings.Repeat(" ", MaxBody+1),
	} {
		if _, err := Decode([]byte(text)); !errdefs.IsInvalidArgument(err) {
			t.Errorf("%.80q: %v", text, err)
		}
	}
}

// FuzzDecode: whatever is read has a user and an end, and nothing makes it panic.
func FuzzDecode(f *testing.F) {
	f.Add([]byte(real))
	f.Add([]byte(`{"token":{"user":{"id":"u"},"expires_at":"2026-11-21T02:32:30Z","application_credential":{"id":"c","access_rules":[]},"system":{"all":true}}}`))
	f.Fuzz(func(t *testing.T, body []byte) {
		got, err := Decode(body)
		if err != nil {
			return
		}
		if got.User.ID == "" || len(got.Roles) > MaxItems || (got.Project != nil && got.Project.ID == "") {
			t.Errorf("%+v", got)
		}
	})
}
