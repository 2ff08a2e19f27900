package cli

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"slices"
	"strings"
	"time"

	"github.com/containerd/errdefs"
	"github.com/spf13/cobra"

	"github.com/hypernetes/hypernetes/cluster/apiclient"
	"github.com/hypernetes/hypernetes/cluster/kubeconfig"
	"github.com/hypernetes/hypernetes/identity/keystone/login"
)

const (
	execVersion = "client.authentication.k8s.io/v1"
	// execInfo is where kubectl says what it expects of a plugin.
	execInfo = "KUBERNETES_EXEC_INFO"
)

// loginTimeout bounds asking Keystone, and waiting for another process that does.
const loginTimeout = time.Minute

func newCredentialCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use: "credential", Short: "Print credentials for kubectl",
		Long: "Prints credentials as kubectl expects them of an exec plugin. h8s login writes a\nkubeconfig that runs these commands.",
	}
	cmd.AddCommand(newCredentialKeystoneCommand())
	return cmd
}

// cloudFlag adds --cloud.
func cloudFlag(cmd *cobra.Command, cloud *string) {
	cmd.Flags().StringVar(cloud, "cloud", "", "cloud of clouds.yaml; $OS_CLOUD, else the OS_* variables if empty")
	_ = cmd.RegisterFlagCompletionFunc("cloud", func(*cobra.Command, []string, string) ([]string, cobra.ShellCompDirective) { // the flag is there
		names, _ := login.Clouds(login.Options{}) // none to offer
		return names, cobra.ShellCompDirectiveNoFileComp
	})
}

func newCredentialKeystoneCommand() *cobra.Command {
	var cloud string
	var fresh bool
	cmd := &cobra.Command{
		Use: "keystone", Short: "Print a Keystone token for kubectl", Args: noArgs,
		Long: `Prints a Keystone token for a project, as kubectl expects it of an exec plugin. What to
log in with is read from clouds.yaml and secure.yaml, or from the OS_* variables:
a password, a token, or an application credential.

The token is kept in ~/.cache/h8s/keystone, in a file only you can read, until shortly
before its end.`,
		Example: `  h8s credential keystone --cloud alpha
  curl -H "X-Auth-Token: $(h8s credential keystone --cloud alpha | jq -r .status.token)" …`,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if err := checkExecInfo(os.Getenv(execInfo)); err != nil {
				return err
			}
			token, _, err := keystoneToken(cmd.Context(), cloud, fresh)
			if err != nil {
				return err
			}
			return printCredential(cmd.OutOrStdout(), token)
		},
	}
	cloudFlag(cmd, &cloud)
	cmd.Flags().BoolVar(&fresh, "fresh", false, "log in anew whatever is kept")
	return cmd
}

// checkExecInfo refuses to answer somebody who expects another version.
func checkExecInfo(text string) error {
	if text == "" {
		return nil
	}
	var info struct{ APIVersion string }
	if err := json.Unmarshal([]byte(text), &info); err != nil {
		return usagef("%s: not the JSON kubectl writes: %v", execInfo, err)
	}
	if info.APIVersion != execVersion {
		return usagef("users[].user.exec.apiVersion %q of your kubeconfig: want %s; h8s login writes it so", info.APIVersion, execVersion)
	}
	return nil
}

// keystoneToken is a token of the cache, or a new one.
func keystoneToken(ctx context.Context, cloud string, fresh bool) (login.Bearer, login.Credentials, error) {
	cred, err := login.Load(login.Options{Cloud: cloud})
	if err != nil {
		return login.Bearer{}, cred, err
	}
	dir, err := login.CacheDir()
	if err != nil {
		return login.Bearer{}, cred, err
	}
	transport, err := cred.Transport()
	if err != nil {
		return login.Bearer{}, cred, err
	}
	defer transport.CloseIdleConnections()
	ctx, cancel := context.WithTimeout(ctx, loginTimeout)
	defer cancel()
	token, err := login.Cache{Dir: dir}.Token(ctx, cred, login.HTTP(transport), fresh)
	if errdefs.IsUnauthorized(err) || errdefs.IsUnavailable(err) {
		err = because("H8S_LOGIN", err)
	}
	return token, cred, err
}

func printCredential(w io.Writer, token login.Bearer) error {
	// It asks again a little before the end.
	type status struct {
		ExpirationTimestamp string `json:"expirationTimestamp"`
		Token               string `json:"token"`
	}
	return json.NewEncoder(w).Encode(struct {
		APIVersion string `json:"apiVersion"`
		Kind       string `json:"kind"`
		Status     status `json:"status"`
	}{execVersion, "ExecCredential", status{token.Expires.Add(-time.Minute).UTC().Format(time.RFC3339), token.ID}})
}

type loginOptions struct {
	cloud, node, server, ca, file, context, namespace string
	check                                             bool
}

func newLoginCommand() *cobra.Command {
	o := &loginOptions{}
	cmd := &cobra.Command{
		Use: "login --cloud NAME", Short: "Log in with OpenStack's credentials", Args: noArgs,
		Long: `Makes a context of your kubeconfig that logs in with Keystone, and selects it. No
secret is written there: kubectl runs h8s credential keystone, which reads clouds.yaml.

The cluster is this machine's node, or any other that --server and
--certificate-authority name. A user of several projects makes a context for each.`,
		Example: `  h8s login --cloud alpha
  h8s login --cloud alpha --server https://192.0.2.1:6443 --certificate-authority ca.crt --namespace web`,
		RunE: func(cmd *cobra.Command, _ []string) error { return runLogin(cmd, o) },
	}
	cloudFlag(cmd, &o.cloud)
	addNodeFlag(cmd, &o.node)
	f := cmd.Flags()
	f.StringVar(&o.server, "server", "", "URL of another cluster's API server than that of the node")
	f.StringVar(&o.ca, "certificate-authority", "", "file with the certificate of who signed that server's")
	f.StringVar(&o.file, "kubeconfig", "", "file to write; $KUBECONFIG, else ~/.kube/config if empty")
	f.StringVar(&o.context, "context", "", "name of the context; made of the cluster's and the cloud's if empty")
	f.StringVar(&o.namespace, "namespace", "", "namespace that commands mean when they name none")
	f.BoolVar(&o.check, "check", true, "ask the cluster who you are")
	return cmd
}

// where is the cluster's address and authority.
func (o *loginOptions) where() (kubeconfig.Entry, error) {
	if o.server != "" || o.ca != "" {
		if o.server == "" || o.ca == "" {
			return kubeconfig.Entry{}, usagef("--server %q, --certificate-authority %q: want both, or neither for the node of this machine", o.server, o.ca)
		}
		if !strings.HasPrefix(o.server, "https://") {
			return kubeconfig.Entry{}, usagef("--server %q: want a URL like https://192.0.2.1:6443", o.server)
		}
		ca, err := os.ReadFile(o.ca)
		if err != nil {
			return kubeconfig.Entry{}, fmt.Errorf("--certificate-authority: %w: %w", err, errdefs.ErrInvalidArgument)
		}
		return kubeconfig.Entry{Name: "cluster", Server: strings.TrimRight(o.server, "/"), CA: ca}, nil
	}
	_, l, err := find(o.node)
	if err != nil {
		return kubeconfig.Entry{}, err
	}
	e, err := kubeconfig.Load(l.Kubeconfig())
	switch {
	case errors.Is(err, fs.ErrPermission):
		return e, becausef("H8S_NOT_ROOT", "node %s is root's to read: log in as root, or name the cluster with --server and --certificate-authority (its ca.crt holds no secret): %w", l.Name, errdefs.ErrPermissionDenied)
	case errors.Is(err, fs.ErrNotExist):
		return e, notRunning(l)
	case err != nil:
		return e, err
	}
	return kubeconfig.Entry{Name: l.Name, Server: e.Server, CA: e.CA}, nil
}

func runLogin(cmd *cobra.Command, o *loginOptions) error {
	entry, err := o.where()
	if err != nil {
		return err
	}
	file := o.file
	if file == "" {
		if file, err = kubeconfig.UserPath(); err != nil {
			return err
		}
	}
	token, cred, err := keystoneToken(cmd.Context(), o.cloud, false)
	if err != nil {
		return err
	}
	who := ""
	if o.check {
		if who, err = whoAmI(cmd.Context(), entry, token.ID); err != nil {
			return err
		}
	}
	if entry.Exec, err = plugin(o.cloud); err != nil {
		return err
	}
	cloud := o.cloud
	if cloud == "" {
		cloud = "openstack"
	}
	cluster := entry.Name
	if entry.Name = o.context; entry.Name == "" {
		entry.Name = cluster + "-" + cloud
	}
	entry.Namespace = o.namespace
	if err := kubeconfig.Merge(file, entry); err != nil {
		return err
	}
	out := cmd.OutOrStdout()
	if who != "" {
		fmt.Fprintln(out, who)
	}
	fmt.Fprintf(out, "kubectl context is %q, in %s.\n", entry.Name, file)
	if cred.Source == "environment" {
		fmt.Fprintln(cmd.ErrOrStderr(), "It needs the OS_* variables wherever kubectl runs; a cloud of clouds.yaml would not.")
	}
	return nil
}

// plugin is how kubectl gets a token.
func plugin(cloud string) (*kubeconfig.Exec, error) {
	self, err := os.Executable()
	if err != nil {
		return nil, err
	}
	e := &kubeconfig.Exec{Command: self, Args: []string{"credential", "keystone"}, Hint: "h8s of Hypernetes is not where h8s login found it: run h8s login again."}
	if cloud == "" {
		cloud = os.Getenv("OS_CLOUD")
	}
	if cloud == "" {
		return e, nil
	}
	e.Args = append(e.Args, "--cloud", cloud)
	file, err := login.Options{}.Find()
	if err != nil {
		return nil, err
	}
	e.Env = []string{"OS_CLIENT_CONFIG_FILE=" + file}
	return e, nil
}

// whoAmI asks the cluster what it takes the token for.
func whoAmI(ctx context.Context, e kubeconfig.Entry, token string) (string, error) {
	api, err := apiclient.New(apiclient.Config{Server: e.Server, CA: e.CA, Token: token})
	if err != nil {
		return "", err
	}
	defer api.Close()
	ctx, cancel := context.WithTimeout(ctx, loginTimeout)
	defer cancel()
	var o struct {
		Status struct {
			UserInfo struct {
				Username string
				Groups   []string
				Extra    map[string][]string
			}
		}
	}
	review := map[string]any{"apiVersion": "authentication.k8s.io/v1", "kind": "SelfSubjectReview"}
	err = api.Create(ctx, "/apis/authentication.k8s.io/v1/selfsubjectreviews", review, &o)
	var status *apiclient.StatusError
	switch {
	case errors.As(err, &status) && status.Code == 401:
		return "", becausef("H8S_LOGIN", "OpenStack takes the credentials, the cluster at %s does not: the project may be no tenant's there, "+
			"the user may have none of the roles reader, member and manager in it, or the cluster may not belong to this OpenStack; its h8s-controller's log says which: %w", e.Server, errdefs.ErrPermissionDenied)
	case err != nil:
		return "", (&session{api, e}).told(err)
	}
	u := o.Status.UserInfo
	first := func(key string) string {
		if v := u.Extra["hypernetes.io/"+key]; len(v) > 0 {
			return v[0]
		}
		return "?"
	}
	var roles []string
	for _, g := range u.Groups {
		if i := strings.LastIndex(g, ":"); strings.HasPrefix(g, "h8s:tenant:") && !slices.Contains(roles, g[i+1:]) {
			roles = append(roles, g[i+1:])
		}
	}
	return fmt.Sprintf("You are %s (%s), %s of tenant %s (project %s).", u.Username, first("user-name"), strings.Join(roles, ", "), first("tenant"), first("project-name")), nil
}
