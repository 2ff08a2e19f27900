package volume

import (
	"encoding/hex"
	"hash/fnv"
	"path"
	"regexp"
	"strings"
)

// kind is what a path below a Pod's kubelet directory is.
type kind int

const (
	kindForeign     kind = iota // not below the Pod's directory
	kindUnknown                 // below it, but nothing this package knows
	kindFiles                   // volumes/kubernetes.io~{configmap,…}/<volume>
	kindEmptyDir                // volumes/kubernetes.io~empty-dir/<volume>
	kindHosts                   // etc-hosts
	kindTermination             // containers/<container>/<id>
	kindSubPath                 // volume-subpaths/<volume>/<container>/<index>
	kindCRIFile                 // a file of containerd's sandbox directory
	kindShm                     // the sandbox's /dev/shm
)

// source is a classified mount source.
type source struct {
	kind kind
	// rel is the path below the Pod's directory.
	rel string
	// plugin is the kubelet's volume plugin directory, volume the volume's name.
	plugin, volume string
	// container, and id (termination) or index (subPath).
	container, id string
}

// Volume plugins of the kubelet whose volumes its AtomicWriter fills.
var atomicPlugins = map[string]bool{
	"kubernetes.io~configmap":    true,
	"kubernetes.io~secret":       true,
	"kubernetes.io~projected":    true,
	"kubernetes.io~downward-api": true,
}

const emptyDirPlugin = "kubernetes.io~empty-dir"

// safeName is what Kubernetes allows for names of volumes and containers, and a bit
// more for persistent volumes'; such a name is one path element and never "..".
var safeName = regexp.MustCompile(`^[a-z0-9][a-z0-9.-]{0,252}$`)

// criFile are files and the /dev/shm containerd's CRI plugin makes for a sandbox.
var criFile = regexp.MustCompile(`/io\.containerd\.grpc\.v1\.cri/sandboxes/[a-z0-9]{1,64}/(hostname|hosts|resolv\.conf|shm)$`)

// classify reads a path; it touches no file. podDir is absolute and clean.
func classify(podDir, src, dst string) source {
	if !path.IsAbs(src) || path.Clean(src) != src {
		return source{}
	}
	if m := criFile.FindStringSubmatch(src); m != nil {
		switch {
		case m[1] == "shm" && dst == "/dev/shm":
			return source{kind: kindShm}
		case m[1] != "shm" && dst == "/etc/"+m[1]:
			return source{kind: kindCRIFile, volume: m[1]}
		}
	}
	// What CRI gives a Pod with hostIPC, which in a VM means the VM's.
	if src == "/dev/shm" && dst == src {
		return source{kind: kindShm}
	}
	rel, ok := strings.CutPrefix(src, podDir+"/")
	if !ok {
		return source{}
	}
	return classifyBelow(rel)
}

func classifyBelow(rel string) source {
	s := source{kind: kindUnknown, rel: rel}
	el := strings.Split(rel, "/")
	switch {
	case rel == "etc-hosts":
		s.kind = kindHosts
	case len(el) == 3 && el[0] == "volumes" && safeName.MatchString(el[2]):
		s.plugin, s.volume = el[1], el[2]
		if atomicPlugins[el[1]] {
			s.kind = kindFiles
		} else if el[1] == emptyDirPlugin {
			s.kind = kindEmptyDir
		}
	case len(el) == 3 && el[0] == "containers" && safeName.MatchString(el[1]) && safeName.MatchString(el[2]):
		s.kind, s.container, s.id = kindTermination, el[1], el[2]
	case len(el) == 4 && el[0] == "volume-subpaths" && safeName.MatchString(el[1]) && safeName.MatchString(el[2]) && safeName.MatchString(el[3]):
		s.kind, s.volume, s.container, s.id = kindSubPath, el[1], el[2], el[3]
	}
	return s
}

// maxName bounds a guest volume's name, a directory there.
const maxName = 100

// guestName joins parts to a name: [a-z0-9.-], at most maxName characters, the same
// for the same parts. A long one ends in a hash of the whole.
func guestName(parts ...string) string {
	name := strings.Join(parts, ".")
	if len(name) <= maxName {
		return name
	}
	sum := "." + hash([]byte(name))
	return name[:maxName-len(sum)] + sum
}

func hash(b []byte) string {
	h := fnv.New64a()
	_, _ = h.Write(b)
	return hex.EncodeToString(h.Sum(nil))
}
