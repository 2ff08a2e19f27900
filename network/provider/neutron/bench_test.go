package neutron

import (
	"context"
	"fmt"
	"net/http"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/hypernetes/hypernetes/network/openstack"
)

// BenchmarkPorts is how many ports a second are made, bound to a node and removed again at
// the OpenStack of $H8S_OPENSTACK: by the provider, and by the same two requests alone, in
// turns, one at a time and as many as the controller has workers.
//
//	H8S_OPENSTACK=/var/tmp/h8s-openstack go test -run '^$' -bench Ports -benchtime 5x ./network/provider/neutron
func BenchmarkPorts(b *testing.B) {
	w := live(b)
	p := w.provider(openstack.Full)
	// A Neutron that is slow is measured, not given up.
	c, err := openstack.New(openstack.Options{File: w.config, Name: w.full, Transport: w.transport, Timeout: 10 * time.Minute})
	if err != nil {
		b.Fatal(err)
	}
	p.o.Cloud = c
	if w.admin, err = c.Client(b.Context(), openstack.Network, ""); err != nil {
		b.Fatal(err)
	}
	n := w.network("blue", "bench", "192.168.0.0/20")
	w.ensure(p, n)
	b.Cleanup(func() {
		if err := p.Release(context.Background(), n); err != nil {
			b.Error(err)
			w.clean()
		}
	})
	var address atomic.Int32
	next := func() string {
		a := address.Add(1) + 10
		return fmt.Sprintf("192.168.%d.%d", a/200, a%200+10)
	}
	ours := func() error {
		x := w.port(n, next(), w.host)
		st, err := p.EnsurePort(b.Context(), n, x)
		if err != nil {
			return err
		}
		if st.VIFType != "bridge" {
			return fmt.Errorf("bound as %q", st.VIFType)
		}
		x.Status.ProviderPortID = st.ID
		return p.ReleasePort(b.Context(), x)
	}
	bare := func() error {
		var made struct{ Port port }
		body := map[string]any{"port": map[string]any{
			"network_id": n.Status.ProviderNetworkID, "project_id": w.projects["blue"], "binding:host_id": w.host, "device_owner": deviceOwner, "device_id": "bench",
			"fixed_ips": []any{map[string]any{"subnet_id": n.Status.Subnets[0].ProviderSubnetID, "ip_address": next()}}, "security_groups": []any{n.Status.ProviderGroupID},
			"description": "hypernetes cluster=" + w.cluster + " uid=bench",
		}}
		if err := w.admin.Do(b.Context(), http.MethodPost, ports, nil, body, &made); err != nil {
			return err
		}
		return remove(b.Context(), w.admin, ports, made.Port.ID)
	}
	if err := ours(); err != nil { // the log-in, and what is asked for once
		b.Fatal(err)
	}
	const workers = 8
	took := map[string]time.Duration{}
	count := map[string]int{}
	for b.Loop() {
		for name, do := range map[string]func() error{"provider": ours, "requests": bare} {
			begun := time.Now()
			if err := do(); err != nil {
				b.Fatal(err)
			}
			took[name+"-alone"] += time.Since(begun)
			count[name+"-alone"]++
			begun = time.Now()
			var wg sync.WaitGroup
			for range workers {
				wg.Go(func() {
					if err := do(); err != nil {
						b.Error(err)
					}
				})
			}
			wg.Wait()
			took[name+"-8"] += time.Since(begun)
			count[name+"-8"] += workers
		}
	}
	for name, d := range took {
		b.ReportMetric(float64(count[name])/d.Seconds(), name+"-ports/s")
	}
}
