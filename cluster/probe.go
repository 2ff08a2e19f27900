package cluster

import (
	"context"
	"crypto/tls"
	"fmt"
	"net"
	"net/http"
	"os"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/hypernetes/hypernetes/cluster/component"
	"github.com/hypernetes/hypernetes/cluster/layout"
	"github.com/hypernetes/hypernetes/cluster/settings"
)

// dialer reaches the node's network.
type dialer func(ctx context.Context, network, address string) (net.Conn, error)

// probes returns, by component, what tells that it serves.
func probes(in component.Input, dial dialer) map[string]func(context.Context) error {
	anyCert := &tls.Config{MinVersion: tls.VersionTLS12, InsecureSkipVerify: true} // loopback of the node, health only
	node := in.Settings.NodeIP
	return map[string]func(context.Context) error{
		"etcd":                    etcdProbe(in.Node, dial),
		"kube-apiserver":          httpProbe(dial, anyCert, fmt.Sprintf("https://%s:%d/readyz", node, settings.APIPort)),
		"kube-controller-manager": httpProbe(dial, anyCert, "https://127.0.0.1:10257/healthz"),
		"kube-scheduler":          httpProbe(dial, anyCert, "https://127.0.0.1:10259/readyz"),
		"kube-proxy":              httpProbe(dial, anyCert, "http://127.0.0.1:10256/livez"),
		"kubelet":                 httpProbe(dial, anyCert, "http://127.0.0.1:10248/healthz"),
		// Its readyz waits for the first scrape, a minute away; answering is enough.
		"metrics-server":        httpProbe(dial, anyCert, fmt.Sprintf("https://%s:%d/livez", node, component.MetricsPort)),
		"containerd":            criProbe(in.Node),
		component.Controller:    httpProbe(dial, nil, fmt.Sprintf("http://127.0.0.1:%d/readyz", settings.ControllerHealthPort)),
		component.Kubestack:     httpProbe(dial, nil, fmt.Sprintf("http://127.0.0.1:%d/readyz", settings.KubestackHealthPort)),
		component.CSINode:       httpProbe(dial, nil, fmt.Sprintf("http://127.0.0.1:%d/readyz", settings.CSINodePort)),
		component.CSIController: httpProbe(dial, nil, fmt.Sprintf("http://127.0.0.1:%d/readyz", settings.CSIControllerPort)),
		component.CSICinder:     httpProbe(dial, nil, fmt.Sprintf("http://127.0.0.1:%d/readyz", settings.CSICinderPort)),
		component.Registry:      httpProbe(dial, nil, "http://"+in.Settings.RegistryAddress()+"/v2/"),
	}
}

func httpProbe(dial dialer, tlsConfig *tls.Config, url string) func(context.Context) error {
	client := &http.Client{Transport: &http.Transport{
		DialContext: dial, TLSClientConfig: tlsConfig, DisableKeepAlives: true, TLSHandshakeTimeout: time.Second,
	}}
	return func(ctx context.Context) error {
		req, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
		if err != nil {
			return err
		}
		resp, err := client.Do(req)
		if err != nil {
			return err
		}
		defer resp.Body.Close()
		if resp.StatusCode != http.StatusOK {
			return fmt.Errorf("%s: %s", url, resp.Status)
		}
		return nil
	}
}

// etcdProbe presents a client certificate, since etcd serves its health to no other.
func etcdProbe(n layout.Node, dial dialer) func(context.Context) error {
	return func(ctx context.Context) error {
		pair, err := tls.LoadX509KeyPair(n.PKI("etcd-client.crt"), n.PKI("etcd-client.key"))
		if err != nil {
			return err
		}
		cfg := &tls.Config{MinVersion: tls.VersionTLS12, InsecureSkipVerify: true, Certificates: []tls.Certificate{pair}}
		return httpProbe(dial, cfg, "https://127.0.0.1:2379/readyz")(ctx)
	}
}

// criProbe asks containerd's CRI for its version over the socket the host sees.
func criProbe(n layout.Node) func(context.Context) error {
	return func(ctx context.Context) error {
		if _, err := os.Stat(n.ContainerdSocket()); err != nil {
			return err
		}
		conn, err := dialCRI(n)
		if err != nil {
			return err
		}
		defer conn.Close()
		_, err = cri.NewRuntimeServiceClient(conn).Version(ctx, &cri.VersionRequest{})
		return err
	}
}

func dialCRI(n layout.Node) (*grpc.ClientConn, error) {
	return grpc.NewClient("unix://"+n.ContainerdSocket(), grpc.WithTransportCredentials(insecure.NewCredentials()))
}
