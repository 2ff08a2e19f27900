package controller

import (
	"context"
	"time"

	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/log"
	"sigs.k8s.io/controller-runtime/pkg/manager"

	corev1 "k8s.io/api/core/v1"

	v1alpha1 "github.com/hypernetes/hypernetes/api/hypernetes/v1alpha1"
	"github.com/hypernetes/hypernetes/network/claim"
)

var (
	_ manager.Runnable               = (*sweeper)(nil)
	_ manager.LeaderElectionRunnable = (*sweeper)(nil)
)

// sweeper gives up claims whose owner went while nobody looked, and deletes those that
// were kept back long enough.
type sweeper struct{ base }

// NeedLeaderElection implements manager.LeaderElectionRunnable.
func (s *sweeper) NeedLeaderElection() bool { return true }

// Start implements manager.Runnable.
func (s *sweeper) Start(ctx context.Context) error {
	tick := time.NewTicker(s.o.Sweep)
	defer tick.Stop()
	for {
		if err := s.sweep(ctx); err != nil && ctx.Err() == nil {
			log.FromContext(ctx).Error(err, "sweep of claims")
		}
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
		}
	}
}

func (s *sweeper) sweep(ctx context.Context) error {
	for _, kind := range []string{claim.Address, claim.VNI} {
		all, err := s.o.Claims.List(ctx, kind)
		if err != nil {
			return err
		}
		for _, c := range all {
			if !c.Held() {
				continue
			}
			if gone, err := s.gone(ctx, c.Owner); err != nil {
				return err
			} else if gone {
				log.FromContext(ctx).Info("claim of an object that is gone", "claim", c.Name, "owner", c.Owner.String())
				if err := s.o.Claims.Release(ctx, c, s.quarantine(ctx, c.Pool)); err != nil && !apierrors.IsConflict(err) {
					return err
				}
			}
		}
		if err := s.o.Claims.Sweep(ctx, all); err != nil {
			return err
		}
	}
	return nil
}

// gone asks the API server whether an owner is no more. What it does not know it leaves.
func (s *sweeper) gone(ctx context.Context, o claim.Owner) (bool, error) {
	var obj client.Object
	switch o.Kind {
	case claim.KindService:
		obj = &corev1.Service{}
	case claim.KindFloatingIP:
		obj = &v1alpha1.FloatingIP{}
	case claim.KindNetwork:
		obj = &v1alpha1.Network{}
	default:
		return false, nil
	}
	err := s.live.Get(ctx, client.ObjectKey{Namespace: o.Namespace, Name: o.Name}, obj)
	if apierrors.IsNotFound(err) {
		return true, nil
	}
	if err != nil {
		return false, err
	}
	if svc, ok := obj.(*corev1.Service); ok && obj.GetUID() == o.UID {
		return !ours(svc) && svc.DeletionTimestamp.IsZero(), nil
	}
	return obj.GetUID() != o.UID, nil
}
