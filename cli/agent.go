package cli

import (
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"

	"github.com/containerd/errdefs"
	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"github.com/hypernetes/hypernetes/cluster"
	"github.com/hypernetes/hypernetes/cluster/layout"
	"github.com/hypernetes/hypernetes/cluster/settings"
	"github.com/hypernetes/hypernetes/cluster/token"
)

// tokenEnv may hold the token of h8s agent.
const tokenEnv = "H8S_TOKEN"

func newAgentCommand() *cobra.Command {
	var name, server, nodeIP, text, file, cinder string
	var ignore bool
	cmd := &cobra.Command{
		Use:   "agent --server https://ADDRESS:6443 --token TOKEN",
		Short: "Join this machine to another's cluster, in the foreground",
		Long: `Runs a node on the machine's own network that belongs to the cluster of an h8s server,
in the foreground, for a service manager. The token, made by h8s token create on the
server, is needed once; it also says by what authority to know the server. Later starts
need neither token nor server.`,
		Example: `  h8s agent --server https://192.0.2.10:6443 --token-file token
  H8S_TOKEN=$(cat token) h8s agent --server https://192.0.2.10:6443`,
		Args: noArgs,
	}
	f := cmd.Flags()
	f.StringVarP(&name, "name", "n", "", "name of the node; the machine's host name if empty")
	f.StringVar(&server, "server", "", "API server to join, https://ADDRESS:PORT")
	f.StringVar(&text, "token", "", "token; it is taken out of the process's command line at once")
	f.StringVar(&file, "token-file", "", "file that holds the token, - for standard input; else $H8S_TOKEN")
	f.StringVar(&nodeIP, "node-ip", "", "address of the node; found by its default route if empty")
	f.BoolVar(&ignore, "ignore-preflight", false, "start even if h8s doctor finds something missing")
	f.StringVar(&cinder, "cinder-config", "", "file that says where Cinder's NFS exports are mounted on this node (docs/storage.md); none if empty")
	cmd.MarkFlagsMutuallyExclusive("token", "token-file")
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		if err := needRoot(); err != nil {
			return err
		}
		if text != "" {
			return withoutToken(text)
		}
		secret, err := readToken(cmd.InOrStdin(), file)
		if err != nil {
			return err
		}
		if name == "" {
			name = hostNode()
		}
		a, l, err := find(name)
		if err != nil {
			return err
		}
		s, err := agentSettings(l, server)
		if err != nil {
			return err
		}
		if s, err = onHost(s, nodeIP); err != nil {
			return err
		}
		if cmd.Flags().Changed("cinder-config") {
			if s.CinderConfig = cinder; cinder != "" {
				if s.CinderConfig, err = filepath.Abs(cinder); err != nil {
					return err
				}
			}
			if err := s.Validate(); err != nil {
				return err
			}
		}
		return runForeground(cmd, a, l, s, secret, ignore)
	}
	return cmd
}

// hostNode is the node's name made of the machine's.
func hostNode() string {
	host, _ := os.Hostname() // an empty name is refused later
	host, _, _ = strings.Cut(strings.ToLower(host), ".")
	return host
}

func agentSettings(l layout.Node, server string) (settings.Node, error) {
	s, err := settings.Load(l.StatePath("node.json"))
	switch {
	case errdefs.IsNotFound(err):
		s, err = settings.Node{Name: l.Name, Role: settings.Agent, APIPort: settings.APIPort}, nil
		if server == "" {
			return s, becausef("H8S_USAGE", "node %s is new: give the --server whose cluster it is to join: %w", l.Name, errdefs.ErrInvalidArgument)
		}
	case err == nil && (!s.IsAgent() || !s.HostNetwork):
		return s, becausef("H8S_USAGE", "node %s of this machine is no agent on its own network; choose another --name: %w", l.Name, errdefs.ErrInvalidArgument)
	}
	if err != nil {
		return s, err
	}
	if server != "" {
		want, err := settings.ParseServer(server)
		if err != nil {
			return s, err
		}
		if s.Server != "" && s.Server != want && cluster.Joined(l) {
			return s, becausef("H8S_USAGE", "node %s has joined %s; to join another cluster remove it first: h8s reset --name %s: %w", l.Name, s.Server, l.Name, errdefs.ErrInvalidArgument)
		}
		s.Server = want
	}
	return s, s.Validate()
}

// readToken takes the token from a file, standard input or the environment. There may be
// none: a node that has joined needs none.
func readToken(stdin io.Reader, file string) (string, error) {
	var b []byte
	var err error
	switch file {
	case "":
		b = []byte(os.Getenv(tokenEnv))
		if err := os.Unsetenv(tokenEnv); err != nil {
			return "", err
		}
	case "-":
		b, err = io.ReadAll(io.LimitReader(stdin, 4096))
	default:
		var f *os.File
		if f, err = os.Open(file); err == nil {
			b, err = io.ReadAll(io.LimitReader(f, 4096))
			err = errors.Join(err, f.Close())
		}
	}
	if err != nil {
		return "", fmt.Errorf("token-file %s: %w", file, err)
	}
	text := strings.TrimSpace(string(b))
	if text == "" {
		return "", nil
	}
	_, err = token.Parse(text)
	return text, err
}

// withoutToken starts this program again with the token on a pipe: the command line of a
// process is for all the machine's users to read, and this one lives long.
func withoutToken(text string) error {
	if _, err := token.Parse(text); err != nil {
		return err
	}
	fds := make([]int, 2)
	if err := unix.Pipe(fds); err != nil {
		return err
	}
	if _, err := unix.Write(fds[1], []byte(text)); err != nil { // far below a pipe's capacity
		return err
	}
	if err := unix.Close(fds[1]); err != nil {
		return err
	}
	exe, err := os.Executable()
	if err != nil {
		return err
	}
	args := replaceToken(os.Args, fmt.Sprintf("/proc/self/fd/%d", fds[0]))
	return fmt.Errorf("run %s: %w", exe, unix.Exec(exe, args, os.Environ()))
}

// replaceToken puts --token-file in the place of --token.
func replaceToken(args []string, file string) []string {
	var out []string
	for i := 0; i < len(args); i++ {
		switch {
		case args[i] == "--token" && i+1 < len(args):
			out = append(out, "--token-file", file)
			i++
		case strings.HasPrefix(args[i], "--token="):
			out = append(out, "--token-file="+file)
		default:
			out = append(out, args[i])
		}
	}
	return out
}
