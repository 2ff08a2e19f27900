// Package inject owns what "injecting" into a Pod means: which configurations a Deployment
// asks for by annotation, what such a configuration may look like, and how a Pod looks with
// it. It must not know how Pods are admitted or where configurations are kept.
package inject

import (
	"fmt"
	"slices"
	"strings"

	"github.com/containerd/errdefs"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/util/validation"
	"sigs.k8s.io/yaml"
)

const (
	// AnnotationPrefix and a name, with the value "true", ask for the configuration of that name.
	AnnotationPrefix = "initializer.kubernetes.io/"
	// ConfigSuffix and a name in front make the name of its ConfigMap, Key is the key in it.
	ConfigSuffix = "-initializer"
	Key          = "config"

	maxConfig     = 64 << 10
	maxNames      = 8
	maxContainers = 8
	maxVolumes    = 16
)

// Fragment is what is added to a Pod.
type Fragment struct {
	InitContainers []corev1.Container `json:"initContainers,omitempty"`
	Containers     []corev1.Container `json:"containers,omitempty"`
	Volumes        []corev1.Volume    `json:"volumes,omitempty"`
}

// single is the other spelling: one container's own fields, with volumes beside them.
type single struct {
	corev1.Container `json:",inline"`
	Volumes          []corev1.Volume `json:"volumes,omitempty"`
}

// Names are the configurations that annotations ask for, sorted. Names that could not be a
// ConfigMap's are left out: they ask for nothing that can exist.
func Names(annotations map[string]string) []string {
	var names []string
	for key, value := range annotations {
		name, found := strings.CutPrefix(key, AnnotationPrefix)
		if !found || value != "true" || len(validation.IsDNS1123Subdomain(name+ConfigSuffix)) > 0 {
			continue
		}
		names = append(names, name)
	}
	slices.Sort(names)
	if len(names) > maxNames {
		names = names[:maxNames]
	}
	return names
}

// Parse reads a configuration, untrusted text: either lists of containers, initContainers
// and volumes, or one container with volumes. Indentation that YAML rejects or reads as
// something else is mended if there is only one way to read it; what is wrong otherwise is
// said with the line or field.
func Parse(config string) (Fragment, error) {
	if len(config) > maxConfig {
		return Fragment{}, fmt.Errorf("config: %d bytes, at most %d are read: %w", len(config), maxConfig, errdefs.ErrInvalidArgument)
	}
	f, err := parse(config)
	if err == nil {
		return f, nil
	}
	if mended, ok := mend(config); ok {
		if f, again := parse(mended); again == nil {
			return f, nil
		}
	}
	return Fragment{}, fmt.Errorf("config: %v: indent the fields of a container and of a volume below its \"- name:\": %w", err, errdefs.ErrInvalidArgument)
}

func parse(config string) (Fragment, error) {
	var shape map[string]any
	if err := yaml.Unmarshal([]byte(config), &shape); err != nil {
		return Fragment{}, err
	}
	var f Fragment
	if _, one := shape["image"]; one {
		var s single
		if err := yaml.UnmarshalStrict([]byte(config), &s); err != nil {
			return Fragment{}, err
		}
		f = Fragment{Containers: []corev1.Container{s.Container}, Volumes: s.Volumes}
	} else if err := yaml.UnmarshalStrict([]byte(config), &f); err != nil {
		return Fragment{}, err
	}
	return f, f.check()
}

// check finds what the API server would refuse the whole Pod for, as far as it can be told
// without the Pod.
func (f Fragment) check() error {
	if len(f.Containers)+len(f.InitContainers) == 0 {
		return fmt.Errorf("containers: none given")
	}
	if n := len(f.Containers) + len(f.InitContainers); n > maxContainers {
		return fmt.Errorf("containers: %d given, at most %d can be injected", n, maxContainers)
	}
	if len(f.Volumes) > maxVolumes {
		return fmt.Errorf("volumes: %d given, at most %d can be injected", len(f.Volumes), maxVolumes)
	}
	seen := map[string]bool{}
	for _, list := range []struct {
		field      string
		containers []corev1.Container
	}{{"containers", f.Containers}, {"initContainers", f.InitContainers}} {
		for i, c := range list.containers {
			field := fmt.Sprintf("%s[%d]", list.field, i)
			switch {
			case len(validation.IsDNS1123Label(c.Name)) > 0:
				return fmt.Errorf("%s.name: %q: want a DNS label of at most 63 characters", field, c.Name)
			case seen[c.Name]:
				return fmt.Errorf("%s.name: %q is given twice", field, c.Name)
			case strings.TrimSpace(c.Image) == "" || c.Image != strings.TrimSpace(c.Image):
				return fmt.Errorf("%s.image: %q: want the name of an image", field, c.Image)
			}
			seen[c.Name] = true
			for j, m := range c.VolumeMounts {
				if m.Name == "" || m.MountPath == "" {
					return fmt.Errorf("%s.volumeMounts[%d]: want a name and a mountPath", field, j)
				}
			}
		}
	}
	volumes := map[string]bool{}
	for i, v := range f.Volumes {
		if len(validation.IsDNS1123Label(v.Name)) > 0 {
			return fmt.Errorf("volumes[%d].name: %q: want a DNS label of at most 63 characters", i, v.Name)
		}
		if volumes[v.Name] {
			return fmt.Errorf("volumes[%d].name: %q is given twice", i, v.Name)
		}
		volumes[v.Name] = true
	}
	return nil
}

// Apply returns pod's spec with f in it. A container or volume that the Pod already has by
// the same name is left alone, which makes a second application change nothing and lets an
// injected container share a Pod's volume. It fails, changing nothing, with
// errdefs.ErrInvalidArgument if a container mounts what neither has.
func Apply(spec *corev1.PodSpec, f Fragment) error {
	out := spec.DeepCopy()
	for _, v := range f.Volumes {
		if !slices.ContainsFunc(out.Volumes, func(have corev1.Volume) bool { return have.Name == v.Name }) {
			out.Volumes = append(out.Volumes, *v.DeepCopy())
		}
	}
	has := func(name string) bool {
		same := func(c corev1.Container) bool { return c.Name == name }
		return slices.ContainsFunc(out.Containers, same) || slices.ContainsFunc(out.InitContainers, same)
	}
	add := func(field string, to *[]corev1.Container, from []corev1.Container) error {
		for _, c := range from {
			if has(c.Name) {
				continue
			}
			for _, m := range c.VolumeMounts {
				if !slices.ContainsFunc(out.Volumes, func(v corev1.Volume) bool { return v.Name == m.Name }) {
					return fmt.Errorf("config: %s %q mounts the volume %q, which neither the configuration nor the Pod has: add it to volumes: %w",
						field, c.Name, m.Name, errdefs.ErrInvalidArgument)
				}
			}
			*to = append(*to, *c.DeepCopy())
		}
		return nil
	}
	if err := add("container", &out.Containers, f.Containers); err != nil {
		return err
	}
	if err := add("initContainer", &out.InitContainers, f.InitContainers); err != nil {
		return err
	}
	*spec = *out
	return nil
}
