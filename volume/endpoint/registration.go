package endpoint

import (
	"context"
	"sync"

	"github.com/containerd/log"
	"google.golang.org/grpc"
	registration "k8s.io/kubelet/pkg/apis/pluginregistration/v1"
)

// Registration is what the kubelet is told of a CSI driver at its plugins_registry.
type Registration struct {
	registration.UnimplementedRegistrationServer
	driver, socket string

	mu         sync.Mutex
	registered bool
	last       string
	changed    func(registered bool)
}

var _ registration.RegistrationServer = (*Registration)(nil)

// NewRegistration tells of a driver at a socket; changed is told whether the kubelet has it.
func NewRegistration(driver, socket string, changed func(registered bool)) *Registration {
	return &Registration{driver: driver, socket: socket, changed: changed, last: "the kubelet did not ask yet"}
}

// Driver is the driver's name.
func (r *Registration) Driver() string { return r.driver }

// Server serves it.
func (r *Registration) Server() *grpc.Server {
	s := grpc.NewServer()
	registration.RegisterRegistrationServer(s, r)
	return s
}

// State tells whether the kubelet has the driver, and why not.
func (r *Registration) State() (registered bool, reason string) {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.registered, r.last
}

// GetInfo implements registration.RegistrationServer.
func (r *Registration) GetInfo(context.Context, *registration.InfoRequest) (*registration.PluginInfo, error) {
	return &registration.PluginInfo{Type: registration.CSIPlugin, Name: r.driver, Endpoint: r.socket, SupportedVersions: []string{"1.0.0"}}, nil
}

// NotifyRegistrationStatus implements registration.RegistrationServer. The kubelet tries
// again by itself as long as the socket is there.
func (r *Registration) NotifyRegistrationStatus(ctx context.Context, s *registration.RegistrationStatus) (*registration.RegistrationStatusResponse, error) {
	r.mu.Lock()
	r.registered, r.last = s.GetPluginRegistered(), s.GetError()
	r.mu.Unlock()
	entry := log.G(ctx).WithField("driver", r.driver)
	if s.GetPluginRegistered() {
		entry.Info("registered with the kubelet")
	} else {
		entry.Errorf("the kubelet does not take the driver: %.500s", s.GetError())
	}
	r.changed(s.GetPluginRegistered())
	return &registration.RegistrationStatusResponse{}, nil
}
