package bootstrap

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"syscall"
	"time"

	bootapi "github.com/containerd/containerd/api/runtime/bootstrap/v1"
	taskapi "github.com/containerd/containerd/api/runtime/task/v3"
	"github.com/containerd/containerd/api/types"
	"github.com/containerd/errdefs"
	"github.com/containerd/log"
	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"
	"google.golang.org/protobuf/types/known/timestamppb"
)

const (
	defaultSocketDir = "/run/containerd/s"
	// version is containerd's newest: sandboxes, task API 3.
	version  = 3
	protocol = "ttrpc"
	// configLink is where start leaves the configuration's path for delete.
	configLink = "h8s-config"
	// maxSocketPath is what the kernel allows.
	maxSocketPath = 107
	// listenFD is the socket in the daemon.
	listenFD = 3
)

// socketPath is short whatever the names: a unix socket's path has 107 characters.
func socketPath(dir, address, namespace, id string) string {
	return filepath.Join(dir, fmt.Sprintf("%x", sha256.Sum256([]byte(address+"/"+namespace+"/"+id))))
}

// start leaves a daemon behind and writes its address. The working directory is the
// bundle.
func start(p Program, params Params, in io.Reader, out io.Writer) error {
	params, err := readParams(params, in)
	if err != nil {
		return err
	}
	if params.Bundle, err = os.Getwd(); err != nil {
		return fmt.Errorf("bundle: %w", err)
	}
	if err := p.Check(params); err != nil {
		return err
	}
	if err := linkConfig(params); err != nil {
		return err
	}
	l, err := listen(params.Socket)
	if err != nil {
		return err
	}
	// The file lives on in the daemon.
	l.SetUnlinkOnClose(false)
	err = spawn(params, l)
	if err != nil {
		_ = os.Remove(params.Socket)
	}
	if err = errors.Join(err, l.Close()); err != nil {
		return err
	}
	return answer(out, params.Socket)
}

func linkConfig(p Params) error {
	if p.ConfigPath == "" {
		return nil
	}
	name := filepath.Join(p.Bundle, configLink)
	if err := os.Symlink(p.ConfigPath, name); err != nil && !errors.Is(err, os.ErrExist) {
		return fmt.Errorf("note configuration: %w", err)
	}
	return nil
}

// listen binds the socket, readable by this user alone. A socket nobody answers on is
// replaced; one that is answered is an error.
func listen(path string) (*net.UnixListener, error) {
	if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
		return nil, fmt.Errorf("socket directory: %w", err)
	}
	if len(path) > maxSocketPath {
		return nil, fmt.Errorf("socket %s has more than %d characters; remedy: a shorter state directory of containerd: %w", path, maxSocketPath, errdefs.ErrInvalidArgument)
	}
	addr := &net.UnixAddr{Name: path, Net: "unix"}
	old := unix.Umask(0o177)
	l, err := net.ListenUnix("unix", addr)
	unix.Umask(old)
	if !errors.Is(err, unix.EADDRINUSE) {
		return l, err
	}
	if c, derr := net.DialTimeout("unix", path, time.Second); derr == nil {
		_ = c.Close()
		return nil, fmt.Errorf("a shim of this id lives: %w", err)
	}
	if err := os.Remove(path); err != nil {
		return nil, fmt.Errorf("replace dead socket: %w", err)
	}
	old = unix.Umask(0o177)
	defer unix.Umask(old)
	return net.ListenUnix("unix", addr)
}

// spawn starts this program again as the daemon, in a session of its own.
func spawn(p Params, l *net.UnixListener) error {
	self, err := os.Executable()
	if err != nil {
		return fmt.Errorf("own executable: %w", err)
	}
	f, err := l.File()
	if err != nil {
		return fmt.Errorf("socket: %w", err)
	}
	defer f.Close()
	args := []string{"-namespace", p.Namespace, "-id", p.ID, "-bundle", p.Bundle, "-socket", p.Socket, "-events", p.Address, "-config", p.ConfigPath}
	if p.Debug {
		args = append(args, "-debug")
	}
	cmd := exec.Command(self, append(args, "serve")...)
	cmd.Dir = p.Bundle
	cmd.ExtraFiles = []*os.File{f}
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	cmd.Env = append(os.Environ(), "GOMAXPROCS=2")
	if err := cmd.Start(); err != nil {
		return fmt.Errorf("start shim process: %w", err)
	}
	return cmd.Process.Release()
}

// answer tells containerd the address, and that it shall not mount root file systems:
// a guest's disks are none of the host kernel's business.
func answer(out io.Writer, socket string) error {
	claims, err := proto.Marshal(&types.MountCapabilities{Types: []string{"erofs", "ext4"}, Transforms: []string{"format", "mkdir", "mkfs"}})
	if err != nil {
		return err
	}
	name := string((&types.MountCapabilities{}).ProtoReflect().Descriptor().FullName())
	b, err := proto.Marshal(&bootapi.BootstrapResult{
		Version: version, Address: "unix://" + socket, Protocol: protocol,
		Extensions: []*bootapi.Extension{{Value: &anypb.Any{TypeUrl: "type.googleapis.com/" + name, Value: claims}}},
	})
	if err != nil {
		return err
	}
	_, err = out.Write(b)
	return err
}

// serve is the daemon.
func serve(p Program, params Params) error {
	f := os.NewFile(listenFD, "listener")
	l, err := net.FileListener(f)
	if err != nil {
		return fmt.Errorf("socket: %w", err)
	}
	_ = f.Close()
	logTo(params)
	// containerd may end with its whole session; the Pod does not.
	signal.Ignore(syscall.SIGHUP, syscall.SIGPIPE)
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM, syscall.SIGINT)
	defer stop()
	err = p.Serve(ctx, params, l)
	_ = os.Remove(params.Socket)
	if err != nil {
		log.L.WithError(err).Error("shim ends")
	}
	return err
}

// logTo has the log written to containerd's fifo. Opened for reading too it never blocks
// or breaks when containerd is away; what does not fit is lost.
func logTo(p Params) {
	_ = log.SetFormat(log.TextFormat)
	if p.Debug {
		_ = log.SetLevel("debug")
	}
	log.L = log.L.WithField("runtime", "io.containerd.hyper.v2").WithField("namespace", p.Namespace)
	out := io.Discard
	if fd, err := unix.Open(filepath.Join(p.Bundle, "log"), unix.O_RDWR|unix.O_NONBLOCK|unix.O_CLOEXEC, 0); err == nil {
		out = newLossy(fd)
	}
	log.L.Logger.SetOutput(out)
}

// deleteTimeout is below containerd's own of five seconds.
const deleteTimeout = 4 * time.Second

// sweepTimeout bounds collecting after all dead shims of a node.
const sweepTimeout = 30 * time.Second

// remove collects after a dead shim and reports the exit of whoever lived in it.
func remove(p Program, params Params, out io.Writer) error {
	log.L.Logger.SetOutput(io.Discard)
	if params.Bundle == "" {
		params.Bundle, _ = os.Getwd()
	}
	if params.ConfigPath == "" {
		params.ConfigPath = noted(params.Bundle)
	}
	ctx, cancel := context.WithTimeout(context.Background(), deleteTimeout)
	defer cancel()
	if err := p.Delete(ctx, params); err != nil {
		return err
	}
	b, err := proto.Marshal(&taskapi.DeleteResponse{ExitStatus: 128 + uint32(unix.SIGKILL), ExitedAt: timestamppb.Now()})
	if err != nil {
		return err
	}
	_, err = out.Write(b)
	return err
}

// sweep collects after every dead shim; what it says is for the supervisor's log.
func sweep(p Program, params Params) error {
	ctx, cancel := context.WithTimeout(context.Background(), sweepTimeout)
	defer cancel()
	return p.Sweep(ctx, params)
}

// noted finds the configuration's path for a sandbox's bundle or a container's, which
// names its sandbox; "" if nothing was noted.
func noted(bundle string) string {
	for _, dir := range []string{bundle, sandboxBundle(bundle)} {
		if target, err := os.Readlink(filepath.Join(dir, configLink)); err == nil {
			return target
		}
	}
	return ""
}

func sandboxBundle(bundle string) string {
	id, err := os.ReadFile(filepath.Join(bundle, "sandbox"))
	if err != nil {
		return bundle
	}
	return filepath.Join(filepath.Dir(bundle), filepath.Base(string(id)))
}
