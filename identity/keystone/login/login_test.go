package login

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
)

const clouds = `
clouds:
  alpha:
    auth: {auth_url: "http://127.0.0.1:5000", username: ann, password: s3cret-one, user_domain_name: Default, project_name: alpha, project_domain_id: default}
    region_name: RegionOne
  byid:
    auth: {auth_url: https://k.example/identity/v3/, user_id: u1, password: s3cret-two, project_id: 1234567890}
    cacert: ca.pem
    verify: false
  app:
    auth_type: v3applicationcredential
    auth: {auth_url: https://k.example:5000/v3, application_credential_id: a1, application_credential_secret: s3cret-three, project_name: ignored}
  appname:
    auth: {auth_url: https://k.example:5000/v3, application_credential_name: ci, application_credential_secret: s, username: ann, domain_name: Default}
  token: {auth_type: token, auth: {auth_url: https://k.example:5000/v3, token: gAAAAsecret}}
  split: {auth: {auth_url: https://k.example:5000/v3, username: ann, default_domain: default, project_name: p}}
  system: {auth: {auth_url: https://k.example:5000/v3, username: ann, password: x, default_domain: default, system_scope: all}}
  trust: {auth: {auth_url: https://k.example:5000/v3, username: ann, password: x, default_domain: default, trust_id: t}}
  nourl: {auth: {username: ann}}
  old: {auth: {auth_url: "https://k.example:5000/v2.0"}}
  nodomain: {auth: {auth_url: https://k.example:5000/v3, username: ann, password: x, project_id: p}}
  noproject: {auth: {auth_url: https://k.example:5000/v3, username: ann, password: x, user_domain_id: d}}
  noprojectdomain: {auth: {auth_url: https://k.example:5000/v3, username: ann, password: x, user_domain_id: d, project_name: p}}
  nopassword: {auth: {auth_url: https://k.example:5000/v3, username: ann, user_domain_id: d, project_id: p}}
  nosecret: {auth_type: v3applicationcredential, auth: {auth_url: https://k.example:5000/v3, application_credential_id: d}}
  odd: {auth_type: v3oidcpassword, auth: {auth_url: https://k.example:5000/v3}}
  inurl: {auth: {auth_url: "https://ann:s3cret-five@k.example:5000/v3"}}
  newline: {auth: {auth_url: https://k.example:5000/v3, username: "a\nb"}}
  list: {auth: {auth_url: [x]}}
  profile: {profile: vexxhost, auth: {username: ann}}
  empty: {}
`

const secure = `clouds: {split: {auth: {password: s3cret-four}}, alpha: {auth: {}}}`

func write(t *testing.T) string {
	t.Helper()
	dir := t.TempDir()
	for name, text := range map[string]string{"clouds.yaml": clouds, "secure.yaml": secure} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	return filepath.Join(dir, "clouds.yaml")
}

func TestFromFile(t *testing.T) {
	file := write(t)
	for cloud, want := range map[string]Credentials{
		"alpha":   {URL: "http://127.0.0.1:5000/v3", Method: Password, Username: "ann", UserDomainName: "Default", ProjectName: "alpha", ProjectDomainID: "default", Secret: "s3cret-one"},
		"byid":    {URL: "https://k.example/identity/v3", Method: Password, UserID: "u1", ProjectID: "1234567890", Secret: "s3cret-two", Insecure: true, CACert: filepath.Join(filepath.Dir(file), "ca.pem")},
		"app":     {URL: "https://k.example:5000/v3", Method: ApplicationCredential, ApplicationCredentialID: "a1", Secret: "s3cret-three"},
		"appname": {URL: "https://k.example:5000/v3", Method: ApplicationCredential, ApplicationCredentialName: "ci", Username: "ann", UserDomainName: "Default", Secret: "s"},
		"token":   {URL: "https://k.example:5000/v3", Method: Token, Secret: "gAAAAsecret"},
		"split":   {URL: "https://k.example:5000/v3", Method: Password, Username: "ann", UserDomainID: "default", ProjectName: "p", ProjectDomainID: "default", Secret: "s3cret-four"},
	} {
		got, err := FromFile(file, cloud)
		if err != nil {
			t.Errorf("%s: %v", cloud, err)
			continue
		}
		want.Source = got.Source
		if got != want {
			t.Errorf("%s: %+v\nwant %+v", cloud, fields2(got), fields2(want))
		}
		for _, text := range []string{got.String(), got.CacheKey(), fmt.Sprintf("%v %+v %#v %s", got, got, got, got)} {
			if got.Secret != "s" && strings.Contains(text, got.Secret) {
				t.Errorf("%s: the secret is printed: %s", cloud, text)
			}
		}
	}
}

// fields2 shows the secret, which printing does not.
func fields2(c Credentials) string {
	type plain Credentials
	return fmt.Sprintf("%+v", plain(c))
}

// TestErrorsNameFieldAndRemedy: each says which field, and what to do, and no secret.
func TestErrorsNameFieldAndRemedy(t *testing.T) {
	file := write(t)
	for cloud, words := range map[string][]string{
		"system": {"auth.system_scope", "project_id"}, "trust": {"auth.trust_id", "application credential"},
		"nourl": {"auth.auth_url", "https://HOST:5000/v3"}, "old": {"auth.auth_url", "/v3"},
		"nodomain": {"auth.user_domain_name", "ann"}, "noproject": {"auth.project_name"}, "noprojectdomain": {"auth.project_domain_name", `"p"`},
		"nopassword": {"auth.password"}, "nosecret": {"auth.application_credential_secret"}, "odd": {"auth_type", "v3oidcpassword"},
		"inurl": {"auth.auth_url", "username"}, "newline": {"auth.username"}, "list": {"auth.auth_url"}, "profile": {"auth_url", "vexxhost"}, "empty": {"auth.auth_url"},
	} {
		_, err := FromFile(file, cloud)
		if !errdefs.IsInvalidArgument(err) {
			t.Errorf("%s: %v", cloud, err)
			continue
		}
		for _, w := range append(words, cloud) {
			if !strings.Contains(err.Error(), w) {
				t.Errorf("%s: no %q in: %v", cloud, w, err)
			}
		}
		if strings.Contains(err.Error(), "s3cret") {
			t.Errorf("%s: the secret is printed: %v", cloud, err)
		}
	}
	if _, err := FromFile(file, "gamma"); !errdefs.IsNotFound(err) || !strings.Contains(err.Error(), "alpha") {
		t.Errorf("a cloud that is not there: %v", err)
	}
	if _, err := FromFile(file+"x", "alpha"); !errdefs.IsNotFound(err) {
		t.Errorf("a file that is not there: %v", err)
	}
}

func TestEnvironment(t *testing.T) {
	load := func(kv ...string) (Credentials, error) {
		env := map[string]string{}
		for _, s := range kv {
			k, v, _ := strings.Cut(s, "=")
			env[k] = v
		}
		return Load(Options{Getenv: func(k string) string { return env[k] }})
	}
	c, err := load("OS_AUTH_URL=http://k:5000", "OS_USERNAME=ann", "OS_PASSWORD=x", "OS_USER_DOMAIN_NAME=Default", "OS_PROJECT_NAME=alpha", "OS_PROJECT_DOMAIN_NAME=Default", "OS_INSECURE=true")
	if err != nil || c.Username != "ann" || c.ProjectDomain != "Default" || !c.Insecure {
		t.Errorf("%+v %v", c, err)
	}
	if c, err := load("OS_AUTH_URL=http://k:5000", "OS_TOKEN=tt", "OS_TENANT_ID=p"); err != nil || c.Method != Token || c.ProjectID != "p" {
		t.Errorf("%+v %v", c, err)
	}
	if _, err := load("OS_AUTH_URL=http://k:5000", "OS_USERNAME=ann"); !errdefs.IsInvalidArgument(err) || !strings.Contains(err.Error(), "OS_USER_DOMAIN_NAME") {
		t.Errorf("no domain: %v", err)
	}
	if _, err := load(); !errdefs.IsNotFound(err) || !strings.Contains(err.Error(), "--cloud") {
		t.Errorf("nothing: %v", err)
	}
	file := write(t)
	if c, err := load("OS_CLOUD=alpha", "OS_CLIENT_CONFIG_FILE="+file); err != nil || c.Username != "ann" {
		t.Errorf("%+v %v", c, err)
	}
	if c, err := load("OS_CLOUD=alpha", "XDG_CONFIG_HOME="+t.TempDir()); !errdefs.IsNotFound(err) {
		t.Errorf("no file: %+v %v", c, err)
	}
}

func TestCacheKey(t *testing.T) {
	a := Credentials{URL: "u", Method: Password, Username: "ann", UserDomainID: "d1", ProjectID: "p", Secret: "one"}
	b := a
	b.UserDomainID = "d2"
	if a.CacheKey() == b.CacheKey() {
		t.Error("users of the same name in two domains share a token")
	}
	b = a
	b.Secret = "two"
	if a.CacheKey() != b.CacheKey() {
		t.Error("the password is in the key")
	}
	a.Method, b.Method = Token, Token
	if a.CacheKey() == b.CacheKey() {
		t.Error("two tokens share a token")
	}
}

// FuzzParse: no file makes it panic, and no error repeats a password.
func FuzzParse(f *testing.F) {
	f.Add([]byte(clouds))
	f.Add([]byte(secure))
	f.Add([]byte("clouds: {alpha: {auth: null}}"))
	f.Fuzz(func(t *testing.T, text []byte) {
		s := settings{}
		if _, err := s.parse("clouds.yaml", text, "alpha"); err != nil {
			return
		}
		c, err := s.credentials("test", func(f string) string { return f })
		if err != nil {
			if p := s["password"]; len(p) > 12 && strings.Contains(err.Error(), p) {
				t.Errorf("the password is printed: %v", err)
			}
			return
		}
		if c.Secret == "" || !strings.HasSuffix(c.URL, "/v3") {
			t.Errorf("%s", fields2(c))
		}
	})
}
