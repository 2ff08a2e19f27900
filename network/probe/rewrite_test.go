package probe

import (
	"encoding/json"
	"reflect"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/util/intstr"
	"k8s.io/utils/ptr"

	"github.com/hypernetes/hypernetes/api/hypernetes/v1alpha1"
	api "github.com/hypernetes/hypernetes/api/probe/v1"
)

func httpGet(p intstr.IntOrString, more ...func(*corev1.HTTPGetAction)) *corev1.HTTPGetAction {
	g := &corev1.HTTPGetAction{Port: p}
	for _, f := range more {
		f(g)
	}
	return g
}

func TestRewrite(t *testing.T) {
	pod := &corev1.Pod{Spec: corev1.PodSpec{
		InitContainers: []corev1.Container{{
			Name: "sidecar", RestartPolicy: ptr.To(corev1.ContainerRestartPolicyAlways),
			Ports:        []corev1.ContainerPort{{Name: "web", ContainerPort: 81}},
			StartupProbe: &corev1.Probe{ProbeHandler: corev1.ProbeHandler{TCPSocket: &corev1.TCPSocketAction{Port: intstr.FromString("web")}}},
		}},
		Containers: []corev1.Container{{
			Name:  "main",
			Ports: []corev1.ContainerPort{{Name: "web", ContainerPort: 8080}},
			LivenessProbe: &corev1.Probe{
				ProbeHandler: corev1.ProbeHandler{HTTPGet: httpGet(intstr.FromString("web"), func(g *corev1.HTTPGetAction) {
					g.Path, g.Scheme = "/live?$(HOME)", corev1.URISchemeHTTPS
					g.HTTPHeaders = []corev1.HTTPHeader{{Name: "Host", Value: "a<b"}}
				})},
				InitialDelaySeconds: 1, TimeoutSeconds: 7, PeriodSeconds: 3, SuccessThreshold: 1, FailureThreshold: 5,
				TerminationGracePeriodSeconds: ptr.To[int64](9),
			},
			ReadinessProbe: &corev1.Probe{ProbeHandler: corev1.ProbeHandler{GRPC: &corev1.GRPCAction{Port: 50, Service: ptr.To("s")}}},
			StartupProbe:   &corev1.Probe{ProbeHandler: corev1.ProbeHandler{Exec: &corev1.ExecAction{Command: []string{"true"}}}},
			Lifecycle: &corev1.Lifecycle{
				PostStart:  &corev1.LifecycleHandler{HTTPGet: httpGet(intstr.FromString("99"))},
				PreStop:    &corev1.LifecycleHandler{TCPSocket: &corev1.TCPSocketAction{Port: intstr.FromInt32(9)}},
				StopSignal: ptr.To(corev1.SIGTERM),
			},
		}, {Name: "asleep", Lifecycle: &corev1.Lifecycle{PreStop: &corev1.LifecycleHandler{Sleep: &corev1.SleepAction{Seconds: 1}}}}},
	}}
	before := pod.DeepCopy()
	if got := Network(pod); len(got) != 5 || got[0] != "spec.initContainers[0].startupProbe.tcpSocket" {
		t.Errorf("network handlers %q", got)
	}
	if err := Rewrite(pod); err != nil {
		t.Fatal(err)
	}
	main, was := &pod.Spec.Containers[0], &before.Spec.Containers[0]
	want := []struct {
		handler *corev1.ExecAction
		request Request
	}{
		{pod.Spec.InitContainers[0].StartupProbe.Exec, Request{TCP: &TCP{81}, TimeoutSeconds: 1}},
		{main.LivenessProbe.Exec, Request{HTTP: &HTTP{"HTTPS", 8080, "/live?$(HOME)", was.LivenessProbe.HTTPGet.HTTPHeaders}, TimeoutSeconds: 7}},
		{main.ReadinessProbe.Exec, Request{GRPC: &GRPC{50, "s"}, TimeoutSeconds: 1}},
		{main.Lifecycle.PostStart.Exec, Request{HTTP: &HTTP{Scheme: "HTTP", Port: 99, Path: "/"}, Hook: true}},
		{main.Lifecycle.PreStop.Exec, Request{TCP: &TCP{9}, Hook: true}},
	}
	for i, w := range want {
		if w.handler == nil || len(w.handler.Command) != 2 || w.handler.Command[0] != api.Program {
			t.Fatalf("%d: %+v", i, w.handler)
		}
		if strings.Contains(w.handler.Command[1], "$") {
			t.Errorf("%d: the kubelet would expand %q", i, w.handler.Command[1])
		}
		got, err := Decode(w.handler.Command[1])
		if err != nil || !reflect.DeepEqual(got, w.request) {
			t.Errorf("%d: %+v, %v, want %+v", i, got, err, w.request)
		}
	}
	if len(Network(pod)) != 0 {
		t.Errorf("left: %q", Network(pod))
	}
	// All else is as it was.
	rest := pod.DeepCopy()
	rest.Annotations = nil
	rest.Spec.InitContainers[0].StartupProbe.ProbeHandler = before.Spec.InitContainers[0].StartupProbe.ProbeHandler
	rest.Spec.Containers[0].LivenessProbe.ProbeHandler = was.LivenessProbe.ProbeHandler
	rest.Spec.Containers[0].ReadinessProbe.ProbeHandler = was.ReadinessProbe.ProbeHandler
	rest.Spec.Containers[0].Lifecycle.PostStart = was.Lifecycle.PostStart
	rest.Spec.Containers[0].Lifecycle.PreStop = was.Lifecycle.PreStop
	if !reflect.DeepEqual(rest, before) {
		t.Errorf("changed more than handlers:\n%+v\n%+v", rest, before)
	}
	var kept map[string]corev1.ProbeHandler
	if err := json.Unmarshal([]byte(pod.Annotations[v1alpha1.AnnotationProbes]), &kept); err != nil {
		t.Fatal(err)
	}
	if len(kept) != 5 || !reflect.DeepEqual(kept["containers[main].livenessProbe"], was.LivenessProbe.ProbeHandler) ||
		!reflect.DeepEqual(kept["containers[main].lifecycle.preStop"].TCPSocket, was.Lifecycle.PreStop.TCPSocket) ||
		kept["initContainers[sidecar].startupProbe"].TCPSocket == nil {
		t.Errorf("kept %s", pod.Annotations[v1alpha1.AnnotationProbes])
	}

	// Again, and with a container another webhook has added.
	once := pod.DeepCopy()
	if err := Rewrite(pod); err != nil || !reflect.DeepEqual(pod, once) {
		t.Errorf("not idempotent: %v", err)
	}
	pod.Spec.Containers = append(pod.Spec.Containers, corev1.Container{Name: "late", LivenessProbe: &corev1.Probe{ProbeHandler: corev1.ProbeHandler{HTTPGet: httpGet(intstr.FromInt32(1))}}})
	if err := Rewrite(pod); err != nil {
		t.Fatal(err)
	}
	kept = nil
	if err := json.Unmarshal([]byte(pod.Annotations[v1alpha1.AnnotationProbes]), &kept); err != nil || len(kept) != 6 {
		t.Errorf("kept %d, %v", len(kept), err)
	}
}

func TestRewriteRefuses(t *testing.T) {
	probe := func(h corev1.ProbeHandler) corev1.Pod {
		return corev1.Pod{Spec: corev1.PodSpec{Containers: []corev1.Container{
			{Name: "first", LivenessProbe: &corev1.Probe{ProbeHandler: corev1.ProbeHandler{HTTPGet: httpGet(intstr.FromInt32(1))}}},
			{Name: "main", Ports: []corev1.ContainerPort{{Name: "web", ContainerPort: 80}}, ReadinessProbe: &corev1.Probe{ProbeHandler: h}},
		}}}
	}
	hook := func(h corev1.LifecycleHandler) corev1.Pod {
		return corev1.Pod{Spec: corev1.PodSpec{Containers: []corev1.Container{{Lifecycle: &corev1.Lifecycle{PreStop: &h}}}}}
	}
	edit := func(f func(*corev1.HTTPGetAction)) corev1.Pod {
		return probe(corev1.ProbeHandler{HTTPGet: httpGet(intstr.FromInt32(80), f)})
	}
	forged := edit(func(*corev1.HTTPGetAction) {})
	forged.Annotations = map[string]string{v1alpha1.AnnotationProbes: "x"}
	for name, c := range map[string]struct {
		pod  corev1.Pod
		says string
	}{
		"host":         {edit(func(g *corev1.HTTPGetAction) { g.Host = "10.0.0.1" }), `spec.containers[1].readinessProbe.httpGet.host "10.0.0.1"`},
		"tcp host":     {probe(corev1.ProbeHandler{TCPSocket: &corev1.TCPSocketAction{Port: intstr.FromInt32(1), Host: "x"}}), "spec.containers[1].readinessProbe.tcpSocket.host"},
		"hook host":    {hook(corev1.LifecycleHandler{HTTPGet: httpGet(intstr.FromInt32(1), func(g *corev1.HTTPGetAction) { g.Host = "h" })}), "spec.containers[0].lifecycle.preStop.httpGet.host"},
		"unknown port": {probe(corev1.ProbeHandler{TCPSocket: &corev1.TCPSocketAction{Port: intstr.FromString("wep")}}), `spec.containers[1].readinessProbe.tcpSocket.port "wep": container main has no port of that name`},
		"port":         {probe(corev1.ProbeHandler{GRPC: &corev1.GRPCAction{Port: 65536}}), "spec.containers[1].readinessProbe.grpc.port 65536"},
		"port 0":       {hook(corev1.LifecycleHandler{TCPSocket: &corev1.TCPSocketAction{}}), "spec.containers[0].lifecycle.preStop.tcpSocket.port 0"},
		"scheme":       {edit(func(g *corev1.HTTPGetAction) { g.Scheme = "http" }), `scheme "http": must be HTTP or HTTPS`},
		"header":       {edit(func(g *corev1.HTTPGetAction) { g.HTTPHeaders = []corev1.HTTPHeader{{Name: "a b"}} }), `header "a b"`},
		"large":        {edit(func(g *corev1.HTTPGetAction) { g.Path = strings.Repeat("x", api.MaxArgument) }), "over the limit"},
		"two":          {probe(corev1.ProbeHandler{Exec: &corev1.ExecAction{}, TCPSocket: &corev1.TCPSocketAction{Port: intstr.FromInt32(1)}}), "more than 1 handler"},
		"two of hook":  {hook(corev1.LifecycleHandler{Sleep: &corev1.SleepAction{}, HTTPGet: httpGet(intstr.FromInt32(1))}), "more than 1 handler"},
		"annotation":   {forged, "metadata.annotations[hypernetes.io/probes]"},
	} {
		t.Run(name, func(t *testing.T) {
			before := c.pod.DeepCopy()
			err := Rewrite(&c.pod)
			if !errdefs.IsInvalidArgument(err) || !strings.Contains(err.Error(), c.says) {
				t.Errorf("got %v", err)
			}
			if !reflect.DeepEqual(&c.pod, before) {
				t.Error("changed the pod")
			}
		})
	}
}

func TestDecodeRefuses(t *testing.T) {
	ok := Command(Request{TCP: &TCP{1}, TimeoutSeconds: 1})[1]
	for _, s := range []string{"", "!", ok + "=", ok + "\n", strings.Repeat("A", api.MaxArgument+1), "e30", "e30K"} {
		if _, err := Decode(s); !errdefs.IsInvalidArgument(err) {
			t.Errorf("%.40q: %v", s, err)
		}
	}
}

func FuzzDecode(f *testing.F) {
	f.Add(Command(Request{HTTP: &HTTP{Scheme: "HTTP", Port: 1, Path: "/\u2028<&>", Headers: []corev1.HTTPHeader{{Name: "A", Value: "b"}}}, TimeoutSeconds: 3})[1])
	f.Add(Command(Request{GRPC: &GRPC{Port: 1, Service: "x"}})[1])
	f.Add(Command(Request{TCP: &TCP{Port: 1}, Hook: true})[1])
	f.Fuzz(func(t *testing.T, s string) {
		r, err := Decode(s)
		if err != nil {
			if !errdefs.IsInvalidArgument(err) {
				t.Error(err)
			}
			return
		}
		if c := Command(r); c[1] != s {
			t.Errorf("%q came back as %q", s, c[1])
		}
	})
}
