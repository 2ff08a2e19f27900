package openstack

import (
	"context"
	"encoding/json"
	"fmt"
	"net/http"
	"net/url"
	"slices"
	"strings"

	"github.com/containerd/errdefs"
)

// Collection is resources of one type.
type Collection struct {
	// Path of it below the service, Key and One what the JSON of it and of one resource is
	// called.
	Path, Key, One string
}

const maxPages = 256

// List returns what a collection has of a query, all pages of it.
func List[T any](ctx context.Context, c *Client, x Collection, q url.Values) ([]T, error) {
	var all []T
	for range maxPages {
		answer := map[string]json.RawMessage{}
		if err := c.Do(ctx, http.MethodGet, x.Path, q, nil, &answer); err != nil {
			return nil, err
		}
		var page []T
		if err := json.Unmarshal(answer[x.Key], &page); err != nil {
			return nil, fmt.Errorf("list %s: an answer of another shape: %w: %w", x.Path, err, errdefs.ErrUnavailable)
		}
		all = append(all, page...)
		var links []struct{ Rel, Href string }
		_ = json.Unmarshal(answer[x.Key+"_links"], &links)
		i := slices.IndexFunc(links, func(l struct{ Rel, Href string }) bool { return l.Rel == "next" })
		if i < 0 || len(page) == 0 {
			return all, nil
		}
		// Only the query of what the server says is used: where it is we know.
		next, err := url.Parse(links[i].Href)
		if err != nil {
			return nil, fmt.Errorf("list %s: next page %q: %w", x.Path, links[i].Href, errdefs.ErrUnavailable)
		}
		q = next.Query()
	}
	return nil, fmt.Errorf("list %s: more than %d pages: %w", x.Path, maxPages, errdefs.ErrUnavailable)
}

// Get returns one resource, nil if there is none of that ID.
func Get[T any](ctx context.Context, c *Client, x Collection, id string) (*T, error) {
	answer := map[string]*T{}
	err := c.Do(ctx, http.MethodGet, x.Path+"/"+url.PathEscape(id), nil, nil, &answer)
	if errdefs.IsNotFound(err) {
		return nil, nil
	} else if err != nil {
		return nil, err
	}
	return one(answer, x, id)
}

// Put creates or, with an ID, updates one resource and returns it.
func Put[T any](ctx context.Context, c *Client, x Collection, id string, body map[string]any) (*T, error) {
	method, path := http.MethodPost, x.Path
	if id != "" {
		method, path = http.MethodPut, x.Path+"/"+url.PathEscape(id)
	}
	answer := map[string]*T{}
	if err := c.Do(ctx, method, path, nil, map[string]any{x.One: body}, &answer); err != nil {
		return nil, err
	}
	return one(answer, x, id)
}

func one[T any](answer map[string]*T, x Collection, id string) (*T, error) {
	if answer[x.One] == nil {
		return nil, fmt.Errorf("%s: an answer of another shape: %w", strings.TrimSuffix(x.Path+"/"+id, "/"), errdefs.ErrUnavailable)
	}
	return answer[x.One], nil
}

// Remove deletes one resource; one that is gone is no error.
func Remove(ctx context.Context, c *Client, x Collection, id string, q url.Values) error {
	err := c.Do(ctx, http.MethodDelete, x.Path+"/"+url.PathEscape(id), q, nil, nil)
	if errdefs.IsNotFound(err) {
		return nil
	}
	return err
}
