package main

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"

	"github.com/fsnotify/fsnotify"
)

// tailer remembers how far it has read each file.
type tailer struct {
	dir string
	out io.Writer
	at  map[string]int64
}

// run follows the directory until ctx ends.
func (t *tailer) run(ctx context.Context) error {
	w, err := fsnotify.NewWatcher()
	if err != nil {
		return err
	}
	defer w.Close()
	if err := w.Add(t.dir); err != nil {
		return fmt.Errorf("watch %s: %w", t.dir, err)
	}
	if err := t.drainAll(); err != nil {
		return err
	}
	for {
		select {
		case <-ctx.Done():
			return t.drainAll()
		case e, ok := <-w.Events:
			if !ok {
				return nil
			}
			if e.Has(fsnotify.Remove) || e.Has(fsnotify.Rename) {
				delete(t.at, e.Name)
				continue
			}
			if filepath.Ext(e.Name) == ".log" {
				if err := t.drain(e.Name); err != nil {
					return err
				}
			}
		case err := <-w.Errors:
			return err
		}
	}
}

func (t *tailer) drainAll() error {
	files, err := filepath.Glob(filepath.Join(t.dir, "*.log"))
	if err != nil {
		return err
	}
	for _, f := range files {
		if err := t.drain(f); err != nil {
			return err
		}
	}
	return nil
}

// drain prints the complete lines that were added to a file.
func (t *tailer) drain(name string) error {
	f, err := os.Open(name)
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	defer f.Close()
	st, err := f.Stat()
	if err != nil {
		return err
	}
	if st.Size() < t.at[name] {
		t.at[name] = 0 // truncated: begin again
	}
	if _, err := f.Seek(t.at[name], io.SeekStart); err != nil {
		return err
	}
	r := bufio.NewReader(f)
	for {
		line, err := r.ReadString('\n')
		if errors.Is(err, io.EOF) {
			return nil // an incomplete line waits for its end
		}
		if err != nil {
			return err
		}
		t.at[name] += int64(len(line))
		if _, err := fmt.Fprintf(t.out, "%s: %s", filepath.Base(name), line); err != nil {
			return err
		}
	}
}
