package keystone_test

import (
	"context"
	"strings"
	"testing"

	"github.com/containerd/errdefs"

	"github.com/hypernetes/hypernetes/identity/keystone"
	"github.com/hypernetes/hypernetes/identity/keystone/keystonetest"
	"github.com/hypernetes/hypernetes/identity/keystone/login"
)

type one struct{ project string }

func (o one) TenantOf(_ context.Context, id string) (string, error) {
	if id == o.project {
		return "blue", nil
	}
	return "", errdefs.ErrNotFound
}

// BenchmarkReview: a token that is remembered, one that Keystone is asked for, and one that
// never reaches it. Against the real Keystone too if H8S_OPENSTACK is set.
func BenchmarkReview(b *testing.B) {
	run := func(b *testing.B, k keystonetest.Keystone) {
		a := keystonetest.NewAdmin(b, k)
		service := a.ServiceUser()
		project := a.Project("default", "bench")
		u := a.User("default", "bench")
		a.Grant(project, u, "member")
		id := a.Token(a.Password(u, project)).ID
		s := keystone.NewService(func() (login.Credentials, error) { return service, nil }, k.Wrap)
		reviewer := func(b *testing.B) *keystone.Reviewer {
			r, err := keystone.NewReviewer(s, one{project}, keystone.StandardRoles(), nil)
			if err != nil {
				b.Fatal(err)
			}
			return r
		}
		b.Run("hit", func(b *testing.B) {
			r := reviewer(b)
			if _, err := r.Review(b.Context(), id); err != nil {
				b.Fatal(err)
			}
			b.ReportAllocs()
			for b.Loop() {
				if _, err := r.Review(b.Context(), id); err != nil {
					b.Fatal(err)
				}
			}
		})
		b.Run("miss", func(b *testing.B) {
			for b.Loop() {
				// A new one remembers nothing.
				if _, err := reviewer(b).Review(b.Context(), id); err != nil {
					b.Fatal(err)
				}
			}
		})
		b.Run("implausible", func(b *testing.B) {
			r, junk := reviewer(b), strings.Repeat("a", 3000)
			for b.Loop() {
				if _, err := r.Review(b.Context(), junk); err == nil {
					b.Fatal("known")
				}
			}
		})
	}
	b.Run("fake", func(b *testing.B) { run(b, keystonetest.Of(keystonetest.NewFake(b))) })
	b.Run("real", func(b *testing.B) { run(b, keystonetest.Real(b)) })
}
