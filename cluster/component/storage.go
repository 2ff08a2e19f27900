package component

import (
	"cmp"
	"fmt"
	"strings"

	"github.com/hypernetes/hypernetes/cluster/settings"
)

// Components of storage: the CSI plugin of every node, and on the control plane the
// controllers of each driver with Kubernetes' own sidecars (dist/csi), which turn claims,
// snapshots and the like into calls to them.
const (
	CSINode       = "h8s-csi-node"
	CSIController = "h8s-csi-controller"
	CSISidecars   = "csi-sidecars"
	CSICinder     = CSIController + "-cinder"
)

// Names of the CSI drivers.
const (
	driverLocal  = "block.hypernetes.io"
	driverCinder = "cinder.csi.openstack.org"
)

// Directories of storage inside the node.
const (
	csiDir       = "/run/h8s-csi"
	volumeRuns   = "/run/h8s-volumes"
	volumeStates = "/var/lib/h8s-volumes"
)

// small keeps a program that has little to do small: it costs a few milliseconds of
// processor time now and then.
func small(c Component, limit string) Component {
	c.Env = append(c.Env, "GOGC=40", "GOMEMLIMIT="+limit)
	return c
}

// csiNode is the CSI plugin of a node, for both drivers.
func csiNode(in Input) Component {
	c := in.own(CSINode, "node",
		"--node="+in.Node.Name,
		"--kubeconfig="+in.Node.InnerKubeconfig(CSINode),
		"--kubelet-root=/var/lib/kubelet",
		"--state-dir="+volumeStates,
		"--run-dir="+volumeRuns,
		fmt.Sprintf("--health-address=127.0.0.1:%d", settings.CSINodePort),
	)
	if in.Settings.OpenStack == nil && !in.Settings.IsAgent() {
		c.Args = append(c.Args, "--drivers="+driverLocal)
	}
	if in.Settings.CinderConfig != "" {
		c.Args = append(c.Args, "--cinder-config="+in.Settings.CinderConfig)
	}
	c.Path = in.Artifacts.Bin("h8s-csi")
	c.Args[0] = "h8s-csi"
	return small(c, "64MiB")
}

// csiController is the keeper of one driver's volumes.
func csiController(in Input, driver string) Component {
	c := in.own(csiName(CSIController, driver), "controller",
		"--driver="+driver,
		"--endpoint=unix://"+csiSocket(driver),
		"--kubeconfig="+in.Node.InnerKubeconfig(CSIController),
		"--leader-elect=false", // there is one
	)
	c.Path = in.Artifacts.Bin("h8s-csi")
	c.Args[0] = "h8s-csi"
	port := settings.CSIControllerPort
	if driver == driverCinder {
		port = settings.CSICinderPort
		o := in.Settings.OpenStack
		c.Args = append(c.Args, "--openstack-cloud-config="+o.CloudConfig, "--openstack-cloud="+o.Cloud,
			"--openstack-profile="+cmp.Or(o.Profile, "full"), "--cinder-config="+in.Settings.CinderConfig)
	}
	c.Args = append(c.Args, fmt.Sprintf("--health-address=127.0.0.1:%d", port))
	return small(c, "64MiB")
}

// csiName is a component's name; those of the local driver have it as it is.
func csiName(name, driver string) string {
	if driver == driverCinder {
		return name + "-cinder"
	}
	return name
}

func csiSocket(driver string) string {
	return csiDir + "/" + strings.SplitN(driver, ".", 2)[0] + ".sock"
}

// sidecar is one of Kubernetes' programs beside a driver's controller.
func (in Input) sidecar(program, driver string, flags ...string) Component {
	c := in.own(csiName(program, driver), append([]string{"--kubeconfig=" + in.Node.InnerKubeconfig(CSISidecars)}, flags...)...)
	c.Path = in.Artifacts.Bin(program)
	c.Args[0] = program
	if driver != "" {
		c.After = append(c.After, csiName(CSIController, driver))
		c.Args = append(c.Args, "--csi-address="+csiSocket(driver))
	}
	return small(c, "64MiB")
}

// storage is what of storage runs on the control plane.
func storage(in Input) []Component {
	out := append([]Component{csiController(in, driverLocal)}, sidecars(in, driverLocal)...)
	out = append(out, in.sidecar("snapshot-controller", "", "--worker-threads=4"))
	if in.Settings.OpenStack != nil {
		out = append(out, csiController(in, driverCinder))
		out = append(out, sidecars(in, driverCinder)...)
		// Local volumes are where they are: nobody attaches them.
		out = append(out, in.sidecar("csi-attacher", driverCinder, "--timeout=60s", "--worker-threads=10"))
	}
	return out
}

func sidecars(in Input, driver string) []Component {
	provisioner := in.sidecar("csi-provisioner", driver,
		"--timeout=60s", "--worker-threads=10", "--extra-create-metadata=true", "--default-fstype=ext4",
		// The node that the scheduler chose, and no other; without one, the one with the most room.
		"--strict-topology=true", "--immediate-topology=false",
		"--retry-interval-start=500ms", "--retry-interval-max=1m",
	)
	if driver == driverLocal {
		// So that the scheduler chooses a node with room.
		provisioner.Args = append(provisioner.Args, "--enable-capacity=true", "--capacity-ownerref-level=-1", "--capacity-poll-interval=15s")
		provisioner.Env = append(provisioner.Env, "NAMESPACE=h8s-system")
	}
	return []Component{
		provisioner,
		in.sidecar("csi-resizer", driver, "--timeout=60s", "--workers=4", "--retry-interval-start=500ms", "--retry-interval-max=1m"),
		in.sidecar("csi-snapshotter", driver, "--timeout=60s", "--worker-threads=4", "--extra-create-metadata=true",
			"--retry-interval-start=500ms", "--retry-interval-max=1m"),
	}
}

// Sidecars are the programs of dist/csi that the control plane runs.
func Sidecars(openStack bool) []string {
	out := []string{"csi-provisioner", "csi-resizer", "csi-snapshotter", "snapshot-controller"}
	if openStack {
		out = append(out, "csi-attacher")
	}
	return out
}
