package tenant

import (
	"context"
	"fmt"

	"github.com/containerd/errdefs"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"sigs.k8s.io/controller-runtime/pkg/event"

	v1alpha1 "github.com/hypernetes/hypernetes/api/hypernetes/v1alpha1"
	"github.com/hypernetes/hypernetes/identity/binding"
)

// conditionProject is true while the Keystone project that a Tenant claims is there,
// enabled and its own. Nothing of the tenant is deleted when it is not: its users cannot
// log in, and what runs goes on until the operator decides.
const conditionProject = "ProjectReady"

// Projects tells how Keystone's projects are, from what is known already.
type Projects interface {
	// Project returns a condition's status, its reason and its message; no status if nothing
	// is known yet.
	Project(id string) (status metav1.ConditionStatus, reason, message string)
	// Changed names the Tenants of whose projects it says something else than before.
	Changed() <-chan event.GenericEvent
}

// project writes the condition.
func (r *tenants) project(ctx context.Context, t *v1alpha1.Tenant) (*fault, error) {
	k := t.Spec.Keystone
	if k == nil {
		meta.RemoveStatusCondition(&t.Status.Conditions, conditionProject)
		return nil, nil
	}
	status, reason, message := metav1.ConditionUnknown, "NoKeystone", "this cluster has no Keystone: h8s up --openstack-cloud-config FILE --openstack-cloud NAME gives it one"
	owner, err := binding.Project(ctx, r.client, k.ProjectID)
	switch {
	case err != nil && !errdefs.IsNotFound(err):
		return nil, err
	case err == nil && owner.UID != t.UID:
		status, reason = metav1.ConditionFalse, "ProjectTaken"
		message = fmt.Sprintf("spec.keystone.projectID: %s: tenant %s has this project: a project is one tenant's: name another", k.ProjectID, owner.Name)
	case r.o.Projects != nil:
		status, reason, message = r.o.Projects.Project(k.ProjectID)
	}
	if status == "" {
		// What was known before this process began holds until it knows better.
		was := meta.FindStatusCondition(t.Status.Conditions, conditionProject)
		if was != nil && was.ObservedGeneration == t.Generation {
			status, reason, message = was.Status, was.Reason, was.Message
		} else {
			status, reason, message = metav1.ConditionUnknown, "NotAsked", "Keystone was not asked for the project yet"
		}
	}
	news := set(&t.Status.Conditions, t.Generation, conditionProject, status, reason, message)
	if status != metav1.ConditionFalse {
		return nil, nil
	}
	if news {
		r.note(t, corev1.EventTypeWarning, reason, "Reconcile", "%s", message)
	}
	return &fault{phaseDegraded, reason, message}, nil
}
