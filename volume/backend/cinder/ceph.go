package cinder

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os/exec"
	"regexp"
	"strconv"
	"strings"
	"time"

	"github.com/containerd/errdefs"

	"github.com/hypernetes/hypernetes/volume/record"
)

var _ Fence = (*Ceph)(nil)

// Ceph is a Fence by Ceph's own commands, rbd and ceph: there is no client of Ceph for Go
// without its libraries.
type Ceph struct {
	// Conf is a ceph.conf, Keyring a file, User without "client.": one that may list and
	// change images' metadata and add to the blocklist, "profile rbd" on monitors and pools.
	Conf, Keyring, User string
	// Command makes a command; exec.CommandContext if nil.
	Command func(ctx context.Context, name string, args ...string) *exec.Cmd
}

const (
	cephTimeout = 30 * time.Second
	// blockFor is how long a client is refused, in seconds: years, as one that is cut off may
	// come back at any time. Numbers are not used twice, so it harms nobody.
	blockFor = 5 * 365 * 24 * 3600
	metaKey  = "h8s.clients."
)

// clientPattern is a client as Ceph writes it.
var clientPattern = regexp.MustCompile(`^(v[12]:|any:)?(\d{1,3}(\.\d{1,3}){3}|\[[0-9a-fA-F:.]+\]):\d{1,5}/\d{1,20}$`)

func (c *Ceph) run(ctx context.Context, name string, args ...string) ([]byte, error) {
	ctx, cancel := context.WithTimeout(ctx, cephTimeout)
	defer cancel()
	args = append([]string{"--conf", c.Conf, "--keyring", c.Keyring, "--id", c.User}, args...)
	command := c.Command
	if command == nil {
		command = exec.CommandContext
	}
	cmd := command(ctx, name, args...)
	var out, bad limitedBuffer
	cmd.Stdout, cmd.Stderr = &out, &bad
	cmd.WaitDelay = time.Second
	if err := cmd.Run(); err != nil {
		class := error(errdefs.ErrUnavailable)
		var exit *exec.ExitError
		if errors.As(err, &exit) && exit.ExitCode() == 2 {
			class = errdefs.ErrNotFound
		}
		return nil, fmt.Errorf("%s: %v: %.300q: %w", name, err, strings.TrimSpace(bad.String()), class)
	}
	return out.Bytes(), nil
}

// limitedBuffer keeps the first 256 KiB.
type limitedBuffer struct{ bytes.Buffer }

// Write implements io.Writer.
func (b *limitedBuffer) Write(p []byte) (int, error) {
	if room := 256<<10 - b.Len(); room > 0 {
		b.Buffer.Write(p[:min(len(p), room)])
	}
	return len(p), nil
}

func spec(r record.RBD) string { return r.Pool + "/" + r.Image }

// Clients implements Fence.
func (c *Ceph) Clients(ctx context.Context, r record.RBD) ([]string, error) {
	out, err := c.run(ctx, "rbd", "status", "--format", "json", spec(r))
	if errdefs.IsNotFound(err) {
		return nil, nil // an image that is gone is nobody's
	} else if err != nil {
		return nil, err
	}
	return clients(out)
}

func clients(out []byte) ([]string, error) {
	var answer struct {
		Watchers []struct {
			Address string `json:"address"`
		} `json:"watchers"`
	}
	if err := json.Unmarshal(out, &answer); err != nil {
		return nil, fmt.Errorf("rbd status: %w: %w", err, errdefs.ErrUnavailable)
	}
	var all []string
	for _, w := range answer.Watchers {
		if !clientPattern.MatchString(w.Address) {
			return nil, fmt.Errorf("rbd status: %.64q is no client: %w", w.Address, errdefs.ErrUnavailable)
		}
		all = append(all, w.Address)
	}
	return all, nil
}

// Remember implements Fence.
func (c *Ceph) Remember(ctx context.Context, r record.RBD, name string, clients []string) error {
	_, err := c.run(ctx, "rbd", "image-meta", "set", spec(r), metaKey+name, strings.Join(clients, " "))
	return err
}

// Remembered implements Fence. Images' metadata is what whoever may write the image may
// write: what is no client is not taken for one.
func (c *Ceph) Remembered(ctx context.Context, r record.RBD, name string) ([]string, error) {
	out, err := c.run(ctx, "rbd", "image-meta", "get", spec(r), metaKey+name)
	if errdefs.IsNotFound(err) {
		return nil, nil
	} else if err != nil {
		return nil, err
	}
	var all []string
	for _, w := range strings.Fields(string(out)) {
		if clientPattern.MatchString(w) && len(all) < maxClients {
			all = append(all, w)
		}
	}
	return all, nil
}

// Forget implements Fence.
func (c *Ceph) Forget(ctx context.Context, r record.RBD, name string) error {
	_, err := c.run(ctx, "rbd", "image-meta", "remove", spec(r), metaKey+name)
	if errdefs.IsNotFound(err) {
		return nil
	}
	return err
}

// Block implements Fence.
func (c *Ceph) Block(ctx context.Context, client string) error {
	if !clientPattern.MatchString(client) {
		return fmt.Errorf("%.64q is no client of Ceph: %w", client, errdefs.ErrInvalidArgument)
	}
	_, err := c.run(ctx, "ceph", "osd", "blocklist", "add", client, strconv.Itoa(blockFor))
	return err
}
