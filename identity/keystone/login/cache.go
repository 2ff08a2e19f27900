package login

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net/http"
	"os"
	"path/filepath"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"github.com/hypernetes/hypernetes/atomicfile"
)

const (
	// renewBefore is how long before its end a token is replaced, unless it lives shorter than
	// that altogether.
	renewBefore = 5 * time.Minute
	// checkAfter is for how long a token is used without asking Keystone whether it is good
	// still: who is given one that was revoked could not get another before its end.
	checkAfter = 5 * time.Minute
	// maxCached bounds a cache file.
	maxCached = 16 << 10
)

// Cache keeps tokens in files that only their owner can read, one for each way to log in.
// Many processes may use it at once; one of them logs in.
type Cache struct {
	Dir string
	// Now is time.Now if nil.
	Now func() time.Time
}

// CacheDir is where tokens are kept: below $XDG_CACHE_HOME or ~/.cache.
func CacheDir() (string, error) {
	dir, err := os.UserCacheDir()
	if err != nil {
		return "", fmt.Errorf("where tokens are kept: %w: set HOME or XDG_CACHE_HOME", err)
	}
	return filepath.Join(dir, "h8s", "keystone"), nil
}

// kept is what a file holds.
type kept struct {
	ID      string    `json:"token"`
	Expires time.Time `json:"expires"`
	Issued  time.Time `json:"issued"`
	Checked time.Time `json:"checked"`
}

// Bearer is a token and its end.
type Bearer struct {
	ID      string
	Expires time.Time
}

// String leaves the token itself out.
func (b Bearer) String() string { return "token until " + b.Expires.Format(time.RFC3339) }

// GoString leaves the token itself out.
func (b Bearer) GoString() string { return b.String() }

func (c Cache) now() time.Time {
	if c.Now != nil {
		return c.Now()
	}
	return time.Now()
}

// Token returns a token that is kept, or a new one. fresh asks for a new one in any case.
func (c Cache) Token(ctx context.Context, cred Credentials, client *http.Client, fresh bool) (Bearer, error) {
	path := filepath.Join(c.Dir, cred.CacheKey()+".json")
	unlock, err := c.lock(ctx, path+".lock")
	if err != nil {
		return Bearer{}, err
	}
	defer unlock()
	if k, ok := read(path); ok && !fresh && c.lasts(k) {
		age := c.now().Sub(k.Checked)
		if age >= 0 && age < checkAfter {
			return Bearer{k.ID, k.Expires}, nil
		}
		err := cred.Check(ctx, client, k.ID)
		if err == nil {
			k.Checked = c.now()
			return Bearer{k.ID, k.Expires}, c.write(path, k)
		}
		if !errdefs.IsUnauthorized(err) && ctx.Err() == nil {
			// Keystone is away: the API server may remember the token.
			return Bearer{k.ID, k.Expires}, nil
		}
	}
	issued, err := cred.Login(ctx, client)
	if err != nil {
		return Bearer{}, err
	}
	now := c.now()
	return Bearer{issued.ID, issued.Expires}, c.write(path, kept{ID: issued.ID, Expires: issued.Expires, Issued: now, Checked: now})
}

// lasts says whether there is enough time left.
func (c Cache) lasts(k kept) bool {
	margin := min(renewBefore, k.Expires.Sub(k.Issued)/5)
	return k.ID != "" && k.Expires.Sub(c.now()) > margin
}

// lock waits for the file's lock.
func (c Cache) lock(ctx context.Context, path string) (func(), error) {
	if err := os.MkdirAll(c.Dir, 0o700); err != nil {
		return nil, fmt.Errorf("where tokens are kept: %w", err)
	}
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE|unix.O_NOFOLLOW, 0o600)
	if err != nil {
		return nil, fmt.Errorf("where tokens are kept: %w", err)
	}
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	for {
		err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB)
		if err == nil {
			return func() { _ = f.Close() }, nil // which unlocks it
		}
		if !errors.Is(err, unix.EWOULDBLOCK) && !errors.Is(err, unix.EINTR) {
			_ = f.Close()
			return nil, fmt.Errorf("lock %s: %w", path, err)
		}
		select {
		case <-ctx.Done():
			_ = f.Close()
			return nil, fmt.Errorf("another process is logging in (%s is locked): %w", path, ctx.Err())
		case <-tick.C:
		}
	}
}

// read returns what a file holds, if only its owner, who is us, can have written it.
func read(path string) (kept, bool) {
	f, err := os.OpenFile(path, os.O_RDONLY|unix.O_NOFOLLOW, 0)
	if err != nil {
		return kept{}, false
	}
	defer f.Close()
	var st unix.Stat_t
	if unix.Fstat(int(f.Fd()), &st) != nil || st.Uid != uint32(os.Geteuid()) || fs.FileMode(st.Mode)&0o077 != 0 || st.Mode&unix.S_IFMT != unix.S_IFREG {
		return kept{}, false
	}
	text, err := io.ReadAll(io.LimitReader(f, maxCached))
	var k kept
	if err != nil || json.Unmarshal(text, &k) != nil {
		return kept{}, false
	}
	return k, true
}

func (c Cache) write(path string, k kept) error {
	text, err := json.Marshal(k)
	if err != nil {
		return err
	}
	if err := atomicfile.Write(path, text, 0o600); err != nil {
		return fmt.Errorf("where tokens are kept: %w", err)
	}
	return nil
}
