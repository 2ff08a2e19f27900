package node

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/hypernetes/hypernetes/cluster/layout"
	"github.com/hypernetes/hypernetes/cluster/settings"
)

// AnchorConfig is what the anchor process is told on its standard input.
type AnchorConfig struct {
	Node      layout.Node
	Settings  settings.Node
	MachineID string
	// Nameservers go to the node's /etc/resolv.conf.
	Nameservers []string
}

// RunAnchor is the body of the hidden `h8s anchor` command. It runs in new
// namespaces, sets them up as in says, writes "ok" or the error to ready, and waits
// for SIGTERM for as long as the node lives.
func RunAnchor(in io.Reader, ready io.WriteCloser, wait func()) error {
	var cfg AnchorConfig
	err := json.NewDecoder(in).Decode(&cfg)
	if err == nil {
		err = cfg.setUp()
	}
	answer := "ok"
	if err != nil {
		answer = err.Error()
	}
	if _, werr := io.WriteString(ready, answer); werr != nil {
		return errors.Join(err, werr)
	}
	if cerr := ready.Close(); err != nil || cerr != nil {
		return errors.Join(err, cerr)
	}
	wait()
	return nil
}

func (c AnchorConfig) setUp() error {
	if !c.Settings.HostNetwork {
		if err := unix.Sethostname([]byte(c.Node.Name)); err != nil {
			return fmt.Errorf("set host name: %w", err)
		}
		if err := configureNetwork(c.Settings); err != nil {
			return fmt.Errorf("network: %w", err)
		}
	} else if err := addRules(rulesTable, false); err != nil {
		return fmt.Errorf("nftables: %w", err)
	}
	if err := mount(mountPlan(c.Node)); err != nil {
		return fmt.Errorf("mounts: %w", err)
	}
	if err := c.writeFiles(); err != nil {
		return fmt.Errorf("files: %w", err)
	}
	return nil
}

// writeFiles puts the node's identity into its private /etc.
func (c AnchorConfig) writeFiles() error {
	files := map[string]string{"machine-id": c.MachineID + "\n"}
	if !c.Settings.HostNetwork {
		files["hostname"] = c.Node.Name + "\n"
		files["hosts"] = fmt.Sprintf("127.0.0.1 localhost\n::1 localhost\n%s %s\n", c.Settings.NodeIP, c.Node.Name)
		files["resolv.conf"] = resolvConf(c.Nameservers)
	}
	for name, content := range files {
		path := filepath.Join("/etc", name)
		// Remove first: resolv.conf is often a link into the host's /run.
		if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
		if err := os.WriteFile(path, []byte(content), 0o644); err != nil {
			return err
		}
	}
	return c.overrideUUID()
}

// overrideUUID gives the node a product UUID of its own; the kubelet reports it and
// two nodes of one machine would look like one.
func (c AnchorConfig) overrideUUID() error {
	const path = "/sys/class/dmi/id/product_uuid"
	if _, err := os.Stat(path); err != nil || len(c.MachineID) != 32 {
		return nil
	}
	m := c.MachineID
	own := filepath.Join("/run", "product_uuid")
	if err := os.WriteFile(own, []byte(strings.Join([]string{m[:8], m[8:12], m[12:16], m[16:20], m[20:]}, "-")+"\n"), 0o444); err != nil {
		return err
	}
	return unix.Mount(own, path, "", unix.MS_BIND, "")
}

func resolvConf(nameservers []string) string {
	if len(nameservers) == 0 {
		return "# The node has no way out (h8s up --egress gives it one), so no resolver either.\n"
	}
	var b strings.Builder
	for _, s := range nameservers {
		fmt.Fprintf(&b, "nameserver %s\n", s)
	}
	return b.String()
}
