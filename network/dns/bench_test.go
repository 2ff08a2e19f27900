package dns

import (
	"encoding/binary"
	"fmt"
	"net"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/miekg/dns"
	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
)

// BenchmarkQueries asks over UDP on the loopback, by eight clients at a time that wait
// for each answer; the clients' own work is part of it. The upstream of "forwarded" is a
// server in this process.
func BenchmarkQueries(b *testing.B) {
	u := newUpstream(b)
	_, at := resolver(b, func(c *Config) { c.Rate, c.CacheEntries = 1_000_000, 100 }, u)
	for _, c := range []struct {
		name string
		ask  func(i int) string
	}{
		{"cluster", func(int) string { return "web.blue.svc.cluster.local." }},
		{"headless", func(int) string { return "db.blue.svc.cluster.local." }},
		{"nxdomain", func(int) string { return "www.example.com.blue.svc.cluster.local." }},
		{"cached", func(int) string { return "www.example.com." }},
		{"forwarded", func(i int) string { return fmt.Sprintf("ok%d.example.com.", i) }},
	} {
		b.Run(c.name, func(b *testing.B) {
			const clients = 8
			took := make([]time.Duration, b.N)
			var wg sync.WaitGroup
			b.ResetTimer()
			for client := range clients {
				wg.Add(1)
				go func() {
					defer wg.Done()
					conn, err := net.Dial("udp", at)
					if err != nil {
						b.Error(err)
						return
					}
					defer conn.Close()
					buf := make([]byte, 4096)
					for i := client; i < b.N; i += clients {
						q, err := new(dns.Msg).SetQuestion(c.ask(i), dns.TypeA).Pack()
						if err != nil {
							b.Error(err)
							return
						}
						began := time.Now()
						_ = conn.SetDeadline(began.Add(10 * time.Second))
						if _, err := conn.Write(q); err != nil {
							b.Error(err)
							return
						}
						n, err := conn.Read(buf)
						if err != nil || n < 12 || binary.BigEndian.Uint16(buf) != binary.BigEndian.Uint16(q) || buf[3]&0xf == dns.RcodeServerFailure {
							b.Error(n, err)
							return
						}
						took[i] = time.Since(began)
					}
				}()
			}
			wg.Wait()
			b.StopTimer()
			slices.Sort(took)
			b.ReportMetric(float64(b.N)/b.Elapsed().Seconds(), "queries/s")
			b.ReportMetric(float64(took[b.N/2].Microseconds()), "p50-µs")
			b.ReportMetric(float64(took[b.N*99/100].Microseconds()), "p99-µs")
		})
	}
}

// BenchmarkUpdate makes a view of many Services with five endpoints each ready.
func BenchmarkUpdate(b *testing.B) {
	for _, n := range []int{100, 1000, 5000} {
		v := view()
		for i := range n {
			name := fmt.Sprintf("svc-%d", i)
			ip := fmt.Sprintf("10.97.%d.%d", i/250, 1+i%250)
			if i%2 == 0 {
				ip = corev1.ClusterIPNone
			}
			v.Services = append(v.Services, service("blue", name, nil, ip))
			s := slice("blue", name, discoveryv1.AddressTypeIPv4)
			for e := range 5 {
				s.Endpoints = append(s.Endpoints, discoveryv1.Endpoint{Addresses: []string{fmt.Sprintf("192.168.%d.%d", (5*i+e)/250, 1+(5*i+e)%250)}})
			}
			v.Slices = append(v.Slices, s)
		}
		b.Run(fmt.Sprint(n), func(b *testing.B) {
			s, err := newServer(Config{Domain: "cluster.local"})
			check(b, err)
			b.ReportAllocs()
			for b.Loop() {
				s.Update(v)
			}
		})
	}
}
