// Package login owns how somebody logs in at Keystone: what clouds.yaml, secure.yaml and
// the OS_* variables say, and asking for a token with it. It must not know what the token
// is used for.
package login

import (
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"net/url"
	"slices"
	"strings"

	"github.com/containerd/errdefs"
)

// Method is how somebody authenticates.
type Method string

// Methods that are supported.
const (
	Password              Method = "password"
	Token                 Method = "token"
	ApplicationCredential Method = "application_credential"
)

// Credentials say who logs in, with what, where and for which project. Printing them does
// not show secrets.
type Credentials struct {
	// Source is where they were found, for people.
	Source string
	// URL of Keystone with its version: https://host:5000/v3.
	URL    string
	Method Method

	UserID, Username               string
	UserDomainID, UserDomainName   string
	ProjectID, ProjectName         string
	ProjectDomainID, ProjectDomain string
	ApplicationCredentialID        string
	ApplicationCredentialName      string

	// Secret is the password, the token or the application credential's secret.
	Secret string

	// CACert, Cert and Key are names of files; Insecure leaves the server unverified.
	CACert, Cert, Key string
	Insecure          bool
}

// String leaves the secret out.
func (c Credentials) String() string {
	return fmt.Sprintf("%s for %s at %s (%s)", c.Method, c.who(), c.URL, c.Source)
}

// GoString leaves the secret out.
func (c Credentials) GoString() string { return c.String() }

func (c Credentials) who() string {
	switch {
	case c.Method == ApplicationCredential && c.ApplicationCredentialID != "":
		return "application credential " + c.ApplicationCredentialID
	case c.Method == ApplicationCredential:
		return "application credential " + c.ApplicationCredentialName + " of user " + c.UserID + c.Username
	case c.Method == Token:
		return "a token"
	case c.UserID != "":
		return "user " + c.UserID
	}
	return "user " + c.Username + " of domain " + c.UserDomainID + c.UserDomainName
}

// CacheKey names what these credentials give a token for, to keep tokens apart: no secret but a
// token, which nobody can guess, has a part in it.
func (c Credentials) CacheKey() string {
	parts := []string{
		"1", c.URL, string(c.Method), c.UserID, c.Username, c.UserDomainID, c.UserDomainName,
		c.ProjectID, c.ProjectName, c.ProjectDomainID, c.ProjectDomain, c.ApplicationCredentialID, c.ApplicationCredentialName,
	}
	if c.Method == Token {
		sum := sha256.Sum256([]byte(c.Secret))
		parts = append(parts, hex.EncodeToString(sum[:]))
	}
	text, _ := json.Marshal(parts) // strings can be marshalled
	sum := sha256.Sum256(text)
	return hex.EncodeToString(sum[:16])
}

// settings are the fields of clouds.yaml's auth section, which the OS_* variables have too.
type settings map[string]string

// fields of the auth section, and auth_type and verify beside it.
var fields = []string{
	"auth_url", "username", "user_id", "password", "token", "user_domain_id", "user_domain_name",
	"project_id", "project_name", "project_domain_id", "project_domain_name", "domain_id", "domain_name", "default_domain",
	"application_credential_id", "application_credential_name", "application_credential_secret",
	"system_scope", "trust_id", "passcode", "tenant_id", "tenant_name",
}

// spelling says how an error names a field: clouds.yaml's way, or the variable.
type spelling func(field string) string

// credentials checks the settings and makes one of them.
func (s settings) credentials(source string, as spelling) (Credentials, error) {
	wrong := func(field, format string, args ...any) (Credentials, error) {
		return Credentials{}, fmt.Errorf("%s: %s: %s: %w", source, as(field), fmt.Sprintf(format, args...), errdefs.ErrInvalidArgument)
	}
	for _, f := range fields {
		if v := s[f]; strings.ContainsAny(v, "\r\n\x00") {
			return wrong(f, "holds a line break or a NUL: write it on one line")
		}
	}
	c := Credentials{
		Source: source,
		UserID: s["user_id"], Username: s["username"], UserDomainID: s["user_domain_id"], UserDomainName: s["user_domain_name"],
		ProjectID: first(s["project_id"], s["tenant_id"]), ProjectName: first(s["project_name"], s["tenant_name"]),
		ProjectDomainID: s["project_domain_id"], ProjectDomain: s["project_domain_name"],
		ApplicationCredentialID: s["application_credential_id"], ApplicationCredentialName: s["application_credential_name"],
		CACert: s["cacert"], Cert: s["cert"], Key: s["key"], Insecure: s["insecure"] == "true",
	}
	if c.UserDomainID+c.UserDomainName == "" {
		c.UserDomainID, c.UserDomainName = first(s["domain_id"], s["default_domain"]), s["domain_name"]
	}
	if c.ProjectDomainID+c.ProjectDomain == "" {
		c.ProjectDomainID, c.ProjectDomain = first(s["domain_id"], s["default_domain"]), s["domain_name"]
	}
	if c.UserDomainID != "" {
		c.UserDomainName = ""
	}
	if c.ProjectDomainID != "" {
		c.ProjectDomain = ""
	}
	var err error
	if c.URL, err = endpoint(s["auth_url"]); err != nil {
		return wrong("auth_url", "%v", err)
	}
	switch kind := s["auth_type"]; kind {
	case "password", "v3password":
		c.Method = Password
	case "token", "v3token":
		c.Method = Token
	case "v3applicationcredential", "application_credential":
		c.Method = ApplicationCredential
	case "":
		switch {
		case c.ApplicationCredentialID+c.ApplicationCredentialName+s["application_credential_secret"] != "":
			c.Method = ApplicationCredential
		case s["token"] != "" && s["password"] == "":
			c.Method = Token
		default:
			c.Method = Password
		}
	default:
		return wrong("auth_type", "%q: want password, token or v3applicationcredential", kind)
	}
	switch {
	case s["system_scope"] != "":
		return wrong("system_scope", "%q: a tenant's token is for a project: name it by project_id, or by project_name and project_domain_name", s["system_scope"])
	case s["trust_id"] != "":
		return wrong("trust_id", "%q: the cluster takes no tokens of trusts, which show the trustor as the user: make an application credential instead", s["trust_id"])
	case s["passcode"] != "":
		return wrong("passcode", "one-time codes are not supported, as every command would need one: make an application credential instead")
	}
	c.Secret = s[map[Method]string{Password: "password", Token: "token", ApplicationCredential: "application_credential_secret"}[c.Method]]
	domains := "_domain_id or _domain_name: names are not unique over domains"
	switch c.Method {
	case Password:
		switch {
		case c.UserID+c.Username == "":
			return wrong("username", "missing: set it with user_domain_name, or set user_id")
		case c.UserID == "" && c.UserDomainID+c.UserDomainName == "":
			return wrong("user_domain_name", "missing for username %q: set user%s", c.Username, domains)
		case c.Secret == "":
			return wrong("password", "missing: set it, or use an application credential (openstack application credential create NAME)")
		}
	case Token:
		if c.Secret == "" {
			return wrong("token", "missing: set it, for example to what openstack token issue -f value -c id prints")
		}
	case ApplicationCredential:
		switch {
		case c.Secret == "":
			return wrong("application_credential_secret", "missing: it was shown when the application credential was made; make another if it is lost")
		case c.ApplicationCredentialID == "" && c.ApplicationCredentialName == "":
			return wrong("application_credential_id", "missing: openstack application credential list shows it")
		case c.ApplicationCredentialID == "" && c.UserID+c.Username == "":
			return wrong("application_credential_id", "missing, and a name (%q) needs username and user_domain_name, or user_id, too", c.ApplicationCredentialName)
		case c.ApplicationCredentialID == "" && c.UserID == "" && c.UserDomainID+c.UserDomainName == "":
			return wrong("user_domain_name", "missing for username %q: set user%s", c.Username, domains)
		}
		// Its project is the one it was made for.
		c.ProjectID, c.ProjectName, c.ProjectDomainID, c.ProjectDomain = "", "", "", ""
		return c, nil
	}
	switch {
	case c.ProjectID != "":
		c.ProjectName, c.ProjectDomainID, c.ProjectDomain = "", "", ""
	case c.ProjectName == "" && c.Method == Token:
		c.ProjectDomainID, c.ProjectDomain = "", "" // the token's own
	case c.ProjectName == "":
		return wrong("project_name", "missing: set it with project_domain_name, or set project_id; a user may have several projects")
	case c.ProjectDomainID+c.ProjectDomain == "":
		return wrong("project_domain_name", "missing for project_name %q: set project%s", c.ProjectName, domains)
	}
	return c, nil
}

func first(values ...string) string {
	if i := slices.IndexFunc(values, func(v string) bool { return v != "" }); i >= 0 {
		return values[i]
	}
	return ""
}

// endpoint is the URL of version 3 below what auth_url says, which may name the version.
func endpoint(text string) (string, error) {
	if text == "" {
		return "", fmt.Errorf("missing: want Keystone's URL, for example https://HOST:5000/v3")
	}
	u, err := url.Parse(text)
	if err != nil || (u.Scheme != "http" && u.Scheme != "https") || u.Host == "" || u.RawQuery != "" || u.Fragment != "" {
		return "", fmt.Errorf("%q: want a URL like https://HOST:5000/v3", redactURL(text))
	}
	if u.User != nil {
		return "", fmt.Errorf("%q: has a user in it: leave it out, username and password are fields of their own", redactURL(text))
	}
	path := strings.TrimRight(u.Path, "/")
	if strings.HasSuffix(path, "/v2.0") {
		return "", fmt.Errorf("%q: version 2 of the Identity API is gone: use the URL that ends with /v3", text)
	}
	if !strings.HasSuffix(path, "/v3") {
		path += "/v3"
	}
	u.Path, u.RawPath = path, ""
	return u.String(), nil
}

func redactURL(text string) string {
	if i := strings.LastIndex(text, "@"); i >= 0 {
		return "…" + text[i:]
	}
	return text
}
