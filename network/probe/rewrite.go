package probe

import (
	"encoding/json"
	"fmt"
	"strconv"
	"strings"

	"github.com/containerd/errdefs"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/util/intstr"
	"k8s.io/apimachinery/pkg/util/validation"

	"github.com/hypernetes/hypernetes/api/hypernetes/v1alpha1"
	api "github.com/hypernetes/hypernetes/api/probe/v1"
)

// Rewrite replaces every httpGet, tcpSocket and grpc probe and every httpGet and
// tcpSocket hook of a Pod, keeping the originals in its annotation
// hypernetes.io/probes: JSON, the handler by "containers[name].livenessProbe" and so on.
// It is idempotent, also if containers have been added since. It fails, changing nothing,
// with errdefs.ErrInvalidArgument naming the field if a handler sets a host, names a port
// its container does not have, or is one the API server would refuse.
func Rewrite(pod *corev1.Pod) error {
	changes, err := plan(pod)
	if err != nil {
		return fmt.Errorf("%w: %w", err, errdefs.ErrInvalidArgument)
	}
	if len(changes) == 0 {
		return nil
	}
	originals := map[string]json.RawMessage{}
	if old := pod.Annotations[v1alpha1.AnnotationProbes]; old != "" {
		if err := json.Unmarshal([]byte(old), &originals); err != nil {
			return fmt.Errorf("metadata.annotations[%s]: is written by the cluster; remedy: leave it out: %w", v1alpha1.AnnotationProbes, errdefs.ErrInvalidArgument)
		}
	}
	for _, c := range changes {
		originals[c.key] = c.original
	}
	kept, err := json.Marshal(originals)
	if err != nil {
		return err
	}
	for _, c := range changes {
		c.apply(&corev1.ExecAction{Command: c.command})
	}
	if pod.Annotations == nil {
		pod.Annotations = map[string]string{}
	}
	pod.Annotations[v1alpha1.AnnotationProbes] = string(kept)
	return nil
}

// change replaces one handler.
type change struct {
	key      string
	original json.RawMessage
	command  []string
	apply    func(*corev1.ExecAction)
}

// Network lists the fields of a Pod that have the kubelet dial it, those Rewrite replaces.
func Network(pod *corev1.Pod) []string {
	var out []string
	for _, h := range handlers(pod) {
		for _, k := range []struct {
			name string
			set  bool
		}{{"httpGet", h.http != nil}, {"tcpSocket", h.tcp != nil}, {"grpc", h.grpc != nil}} {
			if k.set {
				out = append(out, h.field+"."+k.name)
			}
		}
	}
	return out
}

func plan(pod *corev1.Pod) ([]change, error) {
	var out []change
	for _, h := range handlers(pod) {
		if h.http == nil && h.tcp == nil && h.grpc == nil {
			continue
		}
		r, err := h.request()
		if err != nil {
			return nil, err
		}
		original, err := json.Marshal(h.original)
		if err != nil {
			return nil, fmt.Errorf("%s: %w", h.field, err)
		}
		command := Command(r)
		if n := len(command[1]); n > api.MaxArgument {
			return nil, fmt.Errorf("%s: path and headers of %d bytes (encoded) are over the limit of %d; remedy: fewer or shorter httpHeaders", h.field, n, api.MaxArgument)
		}
		out = append(out, change{key: h.key, original: original, command: command, apply: h.replace})
	}
	return out, nil
}

// handler is a probe's or a hook's, whichever it is.
type handler struct {
	field, key string
	container  *corev1.Container
	http       *corev1.HTTPGetAction
	tcp        *corev1.TCPSocketAction
	grpc       *corev1.GRPCAction
	// more is how many handlers of other kinds are set.
	more     int
	hook     bool
	timeout  int32
	original any
	replace  func(*corev1.ExecAction)
}

func handlers(pod *corev1.Pod) []handler {
	var out []handler
	for _, list := range []struct {
		name       string
		containers []corev1.Container
	}{{"initContainers", pod.Spec.InitContainers}, {"containers", pod.Spec.Containers}} {
		for i := range list.containers {
			c := &list.containers[i]
			field, key := fmt.Sprintf("spec.%s[%d].", list.name, i), fmt.Sprintf("%s[%s].", list.name, c.Name)
			for _, p := range []struct {
				name  string
				probe *corev1.Probe
			}{{"livenessProbe", c.LivenessProbe}, {"readinessProbe", c.ReadinessProbe}, {"startupProbe", c.StartupProbe}} {
				if p.probe == nil {
					continue
				}
				h := handler{
					field: field + p.name, key: key + p.name, container: c, original: p.probe.ProbeHandler,
					http: p.probe.HTTPGet, tcp: p.probe.TCPSocket, grpc: p.probe.GRPC,
					timeout: max(p.probe.TimeoutSeconds, 1),
					replace: func(e *corev1.ExecAction) { p.probe.ProbeHandler = corev1.ProbeHandler{Exec: e} },
				}
				if p.probe.Exec != nil {
					h.more++
				}
				out = append(out, h)
			}
			if c.Lifecycle == nil {
				continue
			}
			for _, l := range []struct {
				name string
				hook *corev1.LifecycleHandler
			}{{"lifecycle.postStart", c.Lifecycle.PostStart}, {"lifecycle.preStop", c.Lifecycle.PreStop}} {
				if l.hook == nil {
					continue
				}
				h := handler{
					field: field + l.name, key: key + l.name, container: c, original: *l.hook,
					http: l.hook.HTTPGet, tcp: l.hook.TCPSocket, hook: true,
					replace: func(e *corev1.ExecAction) { *l.hook = corev1.LifecycleHandler{Exec: e} },
				}
				if l.hook.Exec != nil {
					h.more++
				}
				if l.hook.Sleep != nil {
					h.more++
				}
				out = append(out, h)
			}
		}
	}
	return out
}

const hostRemedy = "a probe or hook goes to its own Pod here; remedy: leave host out (a virtual host's name belongs into httpHeaders as Host), or use exec"

// request translates a handler. What the API server would refuse of it is refused here,
// as the API server sees only the exec.
func (h handler) request() (Request, error) {
	r := Request{Hook: h.hook, TimeoutSeconds: h.timeout}
	kinds := h.more
	if g := h.http; g != nil {
		kinds++
		field := h.field + ".httpGet."
		if g.Host != "" {
			return r, fmt.Errorf("%shost %q: %s", field, g.Host, hostRemedy)
		}
		port, err := resolve(field+"port", g.Port, h.container)
		if err != nil {
			return r, err
		}
		r.HTTP = &HTTP{Scheme: string(g.Scheme), Port: port, Path: g.Path, Headers: g.HTTPHeaders}
		if r.HTTP.Scheme == "" {
			r.HTTP.Scheme = string(corev1.URISchemeHTTP)
		}
		if r.HTTP.Path == "" {
			r.HTTP.Path = "/"
		}
	}
	if t := h.tcp; t != nil {
		kinds++
		field := h.field + ".tcpSocket."
		if t.Host != "" {
			return r, fmt.Errorf("%shost %q: %s", field, t.Host, hostRemedy)
		}
		port, err := resolve(field+"port", t.Port, h.container)
		if err != nil {
			return r, err
		}
		r.TCP = &TCP{Port: port}
	}
	if g := h.grpc; g != nil {
		kinds++
		port, err := resolve(h.field+".grpc.port", intstr.FromInt32(g.Port), h.container)
		if err != nil {
			return r, err
		}
		r.GRPC = &GRPC{Port: port}
		if g.Service != nil {
			r.GRPC.Service = *g.Service
		}
	}
	if kinds > 1 {
		return r, fmt.Errorf("%s: may not specify more than 1 handler type", h.field)
	}
	if err := r.validate(); err != nil {
		return r, fmt.Errorf("%s: %w", h.field, err)
	}
	return r, nil
}

// resolve finds a port as the kubelet does: by number, by the container's own names, or
// written as a string.
func resolve(field string, p intstr.IntOrString, c *corev1.Container) (uint16, error) {
	n := int(p.IntVal)
	if p.Type == intstr.String {
		found := false
		for _, cp := range c.Ports {
			if cp.Name == p.StrVal {
				n, found = int(cp.ContainerPort), true
				break
			}
		}
		if !found {
			var err error
			if n, err = strconv.Atoi(p.StrVal); err != nil {
				return 0, fmt.Errorf("%s %q: container %s has no port of that name; remedy: name one of its ports, or write the number", field, p.StrVal, c.Name)
			}
		}
	}
	if msgs := validation.IsValidPortNum(n); len(msgs) > 0 {
		return 0, fmt.Errorf("%s %d: %s", field, n, strings.Join(msgs, ", "))
	}
	return uint16(n), nil
}
