// Package cni is the CNI plugin: a go-between of the runtime, the node daemon and, for Pods
// on the default network, the upstream plugins that do the work there. It must not know
// the API server, nor make any network itself.
package cni

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/containernetworking/cni/pkg/invoke"
	"github.com/containernetworking/cni/pkg/skel"
	"github.com/containernetworking/cni/pkg/types"
	current "github.com/containernetworking/cni/pkg/types/100"
	cniversion "github.com/containernetworking/cni/pkg/version"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"

	api "github.com/hypernetes/hypernetes/api/kubestack/v1"
)

const (
	addTimeout  = 150 * time.Second // the daemon's own is shorter
	callTimeout = 20 * time.Second
	// codeNotReady of STATUS: the plugin cannot take ADD requests.
	codeNotReady = 50
)

// Main is the plugin.
func Main(version string) {
	skel.PluginMainFuncs(Funcs(), cniversion.PluginSupports("0.4.0", "1.0.0", "1.1.0"), "Hypernetes CNI plugin "+version)
}

// Funcs are the verbs.
func Funcs() skel.CNIFuncs {
	return skel.CNIFuncs{Add: add, Del: del, Check: check, Status: checkStatus, GC: collect}
}

// config is the plugin's part of the network configuration.
type config struct {
	types.PluginConf
	// Socket of the node daemon.
	Socket string `json:"socket,omitempty"`
	// Delegates are the plugins of the default network, in order.
	Delegates []map[string]any `json:"delegates"`
}

// read reads a configuration, raw as well: delegates are handed the parts we do not know.
func read(stdin []byte) (*config, map[string]json.RawMessage, error) {
	c, raw := &config{}, map[string]json.RawMessage{}
	for _, to := range []any{c, &raw} {
		if err := json.Unmarshal(stdin, to); err != nil {
			return nil, nil, types.NewError(types.ErrDecodingFailure, "read the network configuration", err.Error())
		}
	}
	if c.Socket == "" {
		c.Socket = api.Socket
	}
	for i, d := range c.Delegates {
		if t, ok := d["type"].(string); !ok || t == "" {
			return nil, nil, types.NewError(types.ErrInvalidNetworkConfig, fmt.Sprintf("delegates[%d].type: want the name of a plugin", i), "")
		}
	}
	return c, raw, nil
}

// call asks the daemon.
func call[T any](c *config, timeout time.Duration, f func(context.Context, api.KubestackClient) (T, error)) (T, error) {
	var none T
	conn, err := grpc.NewClient("unix:"+c.Socket, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		return none, err
	}
	defer conn.Close()
	ctx, cancel := context.WithTimeout(context.Background(), timeout)
	defer cancel()
	return f(ctx, api.NewKubestackClient(conn))
}

// failure is the daemon's error as CNI's.
func failure(verb string, err error) error {
	s := status.Convert(err)
	code := uint(types.ErrInternal)
	switch s.Code() {
	case codes.Unavailable, codes.DeadlineExceeded, codes.Canceled, codes.ResourceExhausted, codes.AlreadyExists, codes.FailedPrecondition:
		code = types.ErrTryAgainLater
	case codes.InvalidArgument:
		code = types.ErrInvalidNetworkConfig
	case codes.NotFound:
		code = types.ErrUnknownContainer
	}
	return types.NewError(code, s.Message(), "kubestack: "+verb+": "+s.Code().String())
}

// request is what the daemon is asked.
func request(args *skel.CmdArgs) *api.AttachRequest {
	q := &api.AttachRequest{ContainerId: args.ContainerID, Netns: args.Netns, Interface: args.IfName}
	for _, pair := range strings.Split(args.Args, ";") {
		key, value, _ := strings.Cut(pair, "=")
		switch key {
		case "K8S_POD_NAMESPACE":
			q.PodNamespace = value
		case "K8S_POD_NAME":
			q.PodName = value
		case "K8S_POD_UID":
			q.PodUid = value
		}
	}
	return q
}

func add(args *skel.CmdArgs) error {
	c, raw, err := read(args.StdinData)
	if err != nil {
		return err
	}
	q := request(args)
	if q.PodNamespace == "" || q.PodName == "" {
		return types.NewError(types.ErrInvalidEnvironmentVariables, "CNI_ARGS: want K8S_POD_NAMESPACE and K8S_POD_NAME", args.Args)
	}
	answer, err := call(c, addTimeout, func(ctx context.Context, k api.KubestackClient) (*api.AddResponse, error) { return k.Add(ctx, q) })
	if err != nil {
		return failure("ADD", err)
	}
	if answer.Delegate == nil {
		result, err := resultOf(answer, args.Netns)
		if err != nil {
			return err
		}
		return types.PrintResult(result, c.CNIVersion)
	}
	if len(c.Delegates) == 0 {
		return types.NewError(types.ErrInvalidNetworkConfig, "delegates: none, but the Pod is on the default network", "")
	}
	ctx, cancel := context.WithTimeout(context.Background(), addTimeout)
	defer cancel()
	var result types.Result
	for i, d := range c.Delegates {
		conf, err := delegate(raw, d, answer.Delegate.PodCidrs, result)
		if err != nil {
			return err
		}
		if result, err = invoke.DelegateAdd(ctx, d["type"].(string), conf, nil); err != nil {
			// What the ones before made goes with the DEL that follows a failed ADD.
			return fmt.Errorf("delegates[%d] (%s): %w", i, d["type"], err)
		}
	}
	return types.PrintResult(result, c.CNIVersion)
}

// resultOf makes a CNI result of the daemon's answer.
func resultOf(a *api.AddResponse, netns string) (*current.Result, error) {
	out := &current.Result{CNIVersion: current.ImplementedSpecVersion}
	out.DNS = types.DNS{Nameservers: a.DnsServers, Search: a.DnsSearch, Options: a.DnsOptions}
	for _, f := range a.Interfaces {
		at := len(out.Interfaces)
		out.Interfaces = append(out.Interfaces, &current.Interface{Name: f.Name, Mac: f.Mac, Mtu: int(f.Mtu), Sandbox: netns})
		for i, s := range f.Addresses {
			ip, prefix, err := net.ParseCIDR(s)
			if err != nil {
				return nil, fmt.Errorf("kubestack answered with address %q: %w", s, err)
			}
			prefix.IP = ip
			address := &current.IPConfig{Interface: current.Int(at), Address: *prefix}
			if i < len(f.Gateways) {
				address.Gateway = net.ParseIP(f.Gateways[i])
			}
			out.IPs = append(out.IPs, address)
			if at != 0 || address.Gateway == nil {
				continue
			}
			zero := net.IPNet{IP: net.IPv4zero.To4(), Mask: net.CIDRMask(0, 32)}
			if ip.To4() == nil {
				zero = net.IPNet{IP: net.IPv6zero, Mask: net.CIDRMask(0, 128)}
			}
			out.Routes = append(out.Routes, &types.Route{Dst: zero, GW: address.Gateway})
		}
	}
	return out, nil
}

// delegate is the configuration of one delegate: what libcni would make of it in a list.
func delegate(raw map[string]json.RawMessage, d map[string]any, cidrs []string, prev types.Result) ([]byte, error) {
	conf := map[string]any{}
	for k, v := range d {
		conf[k] = v
	}
	for _, k := range []string{"cniVersion", "name", "prevResult", "cni.dev/valid-attachments", "cni.dev/attachments"} {
		if v, ok := raw[k]; ok {
			conf[k] = v
		}
	}
	if prev != nil {
		conf["prevResult"] = prev
	}
	// Only capabilities it has declared are given to it.
	delete(conf, "capabilities")
	wants, _ := d["capabilities"].(map[string]any)
	given := map[string]json.RawMessage{}
	if v, ok := raw["runtimeConfig"]; ok {
		if err := json.Unmarshal(v, &given); err != nil {
			return nil, types.NewError(types.ErrDecodingFailure, "runtimeConfig", err.Error())
		}
	}
	for k := range given {
		if on, _ := wants[k].(bool); !on {
			delete(given, k)
		}
	}
	if len(given) > 0 {
		conf["runtimeConfig"] = given
	}
	if ipam, ok := d["ipam"].(map[string]any); ok {
		conf["ipam"] = withRanges(ipam, cidrs)
	}
	return json.Marshal(conf)
}

// withRanges gives host-local this node's Pods' ranges. It wants some for DEL and CHECK as
// well, where it does not look at them.
func withRanges(ipam map[string]any, cidrs []string) map[string]any {
	out := map[string]any{}
	for k, v := range ipam {
		out[k] = v
	}
	if _, ok := out["ranges"]; ok && len(cidrs) == 0 {
		return out
	}
	if len(cidrs) == 0 {
		cidrs = []string{"192.0.2.0/24"} // documentation's
	}
	var ranges [][]map[string]string
	for _, c := range cidrs {
		ranges = append(ranges, []map[string]string{{"subnet": c}})
	}
	out["ranges"] = ranges
	return out
}

// eachDelegate runs f for the delegates, backwards if they are to be undone, and tells of
// every error.
func eachDelegate(c *config, raw map[string]json.RawMessage, backwards bool, f func(ctx context.Context, name string, conf []byte) error) error {
	ctx, cancel := context.WithTimeout(context.Background(), addTimeout)
	defer cancel()
	all := slices.Clone(c.Delegates)
	if backwards {
		slices.Reverse(all)
	}
	var errs []error
	for _, d := range all {
		conf, err := delegate(raw, d, nil, nil)
		if err == nil {
			err = f(ctx, d["type"].(string), conf)
		}
		if err != nil {
			errs = append(errs, fmt.Errorf("%s: %w", d["type"], err))
		}
	}
	return errors.Join(errs...)
}

func del(args *skel.CmdArgs) error {
	c, raw, err := read(args.StdinData)
	if err != nil {
		return err
	}
	answer, err := call(c, callTimeout, func(ctx context.Context, k api.KubestackClient) (*api.DelResponse, error) {
		return k.Del(ctx, request(args))
	})
	switch {
	case status.Code(err) == codes.Unavailable && !recorded(c, args):
		// No daemon, and it made nothing: the delegates need none.
	case err != nil:
		return failure("DEL", err)
	case !answer.Delegate:
		return nil
	}
	return eachDelegate(c, raw, true, func(ctx context.Context, name string, conf []byte) error {
		return invoke.DelegateDel(ctx, name, conf, nil)
	})
}

// recorded tells whether the daemon keeps an attachment, from its directory beside the
// socket: for when it cannot be asked.
func recorded(c *config, args *skel.CmdArgs) bool {
	_, err := os.Stat(filepath.Join(filepath.Dir(c.Socket), "attachments", args.ContainerID+"-"+args.IfName+".json"))
	return !errors.Is(err, os.ErrNotExist)
}

func check(args *skel.CmdArgs) error {
	c, raw, err := read(args.StdinData)
	if err != nil {
		return err
	}
	answer, err := call(c, callTimeout, func(ctx context.Context, k api.KubestackClient) (*api.CheckResponse, error) {
		return k.Check(ctx, request(args))
	})
	if err != nil {
		return failure("CHECK", err)
	}
	if !answer.Delegate {
		return nil
	}
	return eachDelegate(c, raw, false, func(ctx context.Context, name string, conf []byte) error {
		return invoke.DelegateCheck(ctx, name, conf, nil)
	})
}

func checkStatus(args *skel.CmdArgs) error {
	c, _, err := read(args.StdinData)
	if err != nil {
		return err
	}
	_, err = call(c, callTimeout, func(ctx context.Context, k api.KubestackClient) (*api.StatusResponse, error) {
		return k.Status(ctx, &api.StatusRequest{})
	})
	if err != nil {
		return types.NewError(codeNotReady, "kubestack is not ready: "+status.Convert(err).Message(), "")
	}
	return nil
}

func collect(args *skel.CmdArgs) error {
	c, raw, err := read(args.StdinData)
	if err != nil {
		return err
	}
	q := &api.GCRequest{}
	for _, a := range c.ValidAttachments {
		q.Valid = append(q.Valid, &api.Attachment{ContainerId: a.ContainerID, Interface: a.IfName})
	}
	var errs []error
	if _, err := call(c, addTimeout, func(ctx context.Context, k api.KubestackClient) (*api.GCResponse, error) { return k.GC(ctx, q) }); err != nil {
		errs = append(errs, failure("GC", err))
	}
	errs = append(errs, eachDelegate(c, raw, false, func(ctx context.Context, name string, conf []byte) error {
		err := invoke.DelegateGC(ctx, name, conf, nil)
		var e *types.Error
		if errors.As(err, &e) && (e.Code == types.ErrIncompatibleCNIVersion || strings.Contains(e.Msg, "unknown CNI_COMMAND")) {
			return nil // older than GC
		}
		return err
	}))
	return errors.Join(errs...)
}
