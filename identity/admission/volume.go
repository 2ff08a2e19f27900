package admission

import (
	"context"
	"fmt"
	"regexp"
	"time"

	"github.com/containerd/log"
	corev1 "k8s.io/api/core/v1"

	v1alpha1 "github.com/hypernetes/hypernetes/api/hypernetes/v1alpha1"
)

// flexDriver is what volumes of Cinder's were asked for by before there was CSI. Nobody
// serves it any more: it is rewritten to the volume source that is served.
const flexDriver = "cinder/flexvolume_driver"

// cinderTimeout bounds a question to the cloud: admission goes on without the answer.
const cinderTimeout = 2 * time.Second

var volumeID = regexp.MustCompile(`^[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}$`)

// rewriteVolumes makes volumes of flexDriver what they mean today, inline cinder volumes.
// The option cinderConfig named a file of the node with its credential; the cluster has its
// own.
func rewriteVolumes(pod *corev1.Pod) error {
	for i := range pod.Spec.Volumes {
		v := &pod.Spec.Volumes[i]
		if v.FlexVolume == nil || v.FlexVolume.Driver != flexDriver {
			continue
		}
		at, flex := fmt.Sprintf("spec.volumes[%d].flexVolume", i), v.FlexVolume
		for option := range flex.Options {
			if option != "volumeID" && option != "cinderConfig" {
				return refusef("%s.options[%s]: not known to driver %s: leave it out, or use a persistentVolumeClaim", at, option, flexDriver)
			}
		}
		id := flex.Options["volumeID"]
		if !volumeID.MatchString(id) {
			return refusef("%s.options.volumeID: %q: want the ID of a volume of Cinder's, as openstack volume list shows it", at, id)
		}
		if flex.SecretRef != nil {
			return refusef("%s.secretRef: %s: driver %s has no use for it: leave it out", at, flex.SecretRef.Name, flexDriver)
		}
		v.FlexVolume = nil
		v.Cinder = &corev1.CinderVolumeSource{VolumeID: id, FSType: flex.FSType, ReadOnly: flex.ReadOnly}
	}
	return nil
}

// checkVolumes refuses what would fail later, when the Pod has a node: volumes that are not
// the tenant's, and such as only a virtual machine can have. The answer that counts is the
// node's plugin's; so what cannot be found out here passes, with a warning if that helps.
func (h *decider) checkVolumes(ctx context.Context, namespace string, pod *corev1.Pod) (warnings []string, err error) {
	var tenant *v1alpha1.Tenant
	for i, v := range pod.Spec.Volumes {
		if v.Cinder == nil {
			continue
		}
		at := fmt.Sprintf("spec.volumes[%d].cinder", i)
		if !volumeID.MatchString(v.Cinder.VolumeID) {
			return nil, refusef("%s.volumeID: %q: want the ID of a volume of Cinder's, as openstack volume list shows it", at, v.Cinder.VolumeID)
		}
		if class := pod.Spec.RuntimeClassName; class != nil && !hyper(*class) {
			return nil, refusef("%s: volumes are disks of the Pod's virtual machine and RuntimeClass %s has none: use RuntimeClass hyper", at, *class)
		}
		if tenant == nil {
			if tenant, err = h.read.tenantOf(ctx, namespace); err != nil {
				return nil, err
			}
			if tenant == nil {
				return nil, nil // mutateTenantPod refused it
			}
		}
		if tenant.Spec.Keystone == nil || tenant.Spec.Keystone.ProjectID == "" {
			return nil, refusef("%s: tenant %s has no OpenStack project, so no volume there is its own: ask the operator to set spec.keystone.projectID of the Tenant", at, tenant.Name)
		}
		if h.VolumeOf == nil {
			warnings = append(warnings, at+": the cluster belongs to no OpenStack: the Pod will wait for the volume")
			continue
		}
		brief, cancel := context.WithTimeout(ctx, cinderTimeout)
		own, known, err := h.VolumeOf(brief, v.Cinder.VolumeID, tenant.Spec.Keystone.ProjectID)
		cancel()
		switch {
		case err != nil:
			log.G(ctx).WithError(err).WithField("volume", v.Cinder.VolumeID).Warn("admission could not ask whose a volume is; its node will")
		case known && !own:
			return nil, refusef("%s.volumeID: %s: is no volume of project %s, tenant %s's: name one that openstack volume list shows there", at, v.Cinder.VolumeID, tenant.Spec.Keystone.ProjectID, tenant.Name)
		case !known:
			warnings = append(warnings, fmt.Sprintf("%s.volumeID: %s: project %s has no such volume: the Pod will wait for it", at, v.Cinder.VolumeID, tenant.Spec.Keystone.ProjectID))
		}
	}
	return warnings, nil
}

// flexCondition picks Pods whose volumes are to be rewritten.
var flexCondition = `has(object.spec.volumes) && object.spec.volumes.exists(v, has(v.flexVolume) && v.flexVolume.driver == "` + flexDriver + `")`
