package command

import (
	"context"
	"errors"
	"fmt"
	"os"
	"sync"
	"time"

	"github.com/containerd/errdefs"
	"github.com/containerd/log"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/util/uuid"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/leaderelection"
	"k8s.io/client-go/tools/leaderelection/resourcelock"

	v1alpha1 "github.com/hypernetes/hypernetes/api/hypernetes/v1alpha1"
)

// Times of client-go's other users: a leader that cannot reach the API server for renew
// stops before anybody else begins.
const (
	leaseFor = 15 * time.Second
	renew    = 10 * time.Second
	retry    = 2 * time.Second
)

// lead runs f once no other replica leads under the name, and gives the lease back when f
// has ended. Its error is errdefs.ErrUnavailable if the lease was lost meanwhile.
//
// The sidecars need no election of their own: they wait for the socket, which only the
// leader beside them serves, and end when it goes.
func lead(ctx context.Context, cfg *rest.Config, name string, f func(context.Context) error) error {
	api, err := kubernetes.NewForConfig(cfg)
	if err != nil {
		return err
	}
	host, err := os.Hostname()
	if err != nil {
		return fmt.Errorf("this replica's name: %w", err)
	}
	identity := host + "_" + string(uuid.NewUUID())
	// It outlives ctx: the lease is held until f has ended.
	elected, release := context.WithCancel(context.WithoutCancel(ctx))
	defer release()
	// Whichever is first, f's beginning or ctx's end, decides whether f runs.
	var first sync.Once
	began, result := false, make(chan error, 1)
	defer context.AfterFunc(ctx, func() {
		if first.Do(func() {}); !began {
			release()
		}
	})()
	elector, err := leaderelection.NewLeaderElector(leaderelection.LeaderElectionConfig{
		Lock: &resourcelock.LeaseLock{
			LeaseMeta:  metav1.ObjectMeta{Namespace: v1alpha1.SystemNamespace, Name: name},
			Client:     api.CoordinationV1(),
			LockConfig: resourcelock.ResourceLockConfig{Identity: identity},
		},
		Name: name, LeaseDuration: leaseFor, RenewDeadline: renew, RetryPeriod: retry, ReleaseOnCancel: true,
		Callbacks: leaderelection.LeaderCallbacks{
			OnStartedLeading: func(leading context.Context) {
				if first.Do(func() { began = true }); !began {
					return
				}
				defer release()
				work, cancel := context.WithCancel(leading)
				defer cancel()
				defer context.AfterFunc(ctx, cancel)()
				log.G(ctx).WithField("lease", name).Info("leading")
				result <- f(work)
			},
			OnStoppedLeading: func() {},
			OnNewLeader: func(other string) {
				if other != identity {
					log.G(ctx).WithFields(log.Fields{"lease": name, "leader": other}).Info("another replica leads: waiting")
				}
			},
		},
	})
	if err != nil {
		return err
	}
	elector.Run(elected)
	lost := elected.Err() == nil
	if first.Do(func() {}); began {
		err = <-result
	}
	if lost {
		err = errors.Join(fmt.Errorf("lease %s/%s was lost: another replica leads, or the API server does not answer: %w", v1alpha1.SystemNamespace, name, errdefs.ErrUnavailable), err)
	}
	return err
}
