package keystone_test

import (
	"context"
	"net/url"
	"testing"

	"github.com/hypernetes/hypernetes/identity/keystone"
	"github.com/hypernetes/hypernetes/identity/keystone/keystonetest"
	"github.com/hypernetes/hypernetes/identity/keystone/login"
)

// asker shows a Service as Conformance wants it.
type asker struct{ *keystone.Service }

func (a asker) Project(ctx context.Context, id string) (string, bool, error) {
	p, err := a.Service.Project(ctx, id)
	return p.Name, p.Enabled, err
}

func (a asker) Tagged(ctx context.Context, query url.Values) ([]string, error) {
	list, err := a.Projects(ctx, query)
	var ids []string
	for _, p := range list {
		ids = append(ids, p.ID)
	}
	return ids, err
}

func TestConformance(t *testing.T) {
	keystonetest.Each(t, func(t *testing.T, k keystonetest.Keystone) {
		keystonetest.Conformance(t, k, func(c login.Credentials) keystonetest.Asker {
			return asker{keystone.NewService(func() (login.Credentials, error) { return c, nil }, k.Wrap)}
		})
	})
}
