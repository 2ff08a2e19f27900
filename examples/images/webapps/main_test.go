package main

import (
	"archive/zip"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

func TestServesWarAndDirectory(t *testing.T) {
	dir := t.TempDir()
	f, err := os.Create(filepath.Join(dir, "sample.war"))
	if err != nil {
		t.Fatal(err)
	}
	z := zip.NewWriter(f)
	w, err := z.Create("index.html")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := w.Write([]byte("from the war")); err != nil {
		t.Fatal(err)
	}
	if err := z.Close(); err != nil {
		t.Fatal(err)
	}
	if err := f.Close(); err != nil {
		t.Fatal(err)
	}
	if err := os.MkdirAll(filepath.Join(dir, "plain"), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dir, "plain", "a.txt"), []byte("from the directory"), 0o644); err != nil {
		t.Fatal(err)
	}
	s := &server{dir: dir}
	for _, tc := range []struct {
		path, want string
		code       int
	}{
		{"/", "sample", http.StatusOK},
		{"/sample", "", http.StatusFound},
		{"/sample/", "from the war", http.StatusOK},
		{"/sample/missing", "", http.StatusNotFound},
		{"/plain/a.txt", "from the directory", http.StatusOK},
		{"/nothing/", "", http.StatusNotFound},
	} {
		rec := httptest.NewRecorder()
		s.ServeHTTP(rec, httptest.NewRequest(http.MethodGet, tc.path, nil))
		if rec.Code != tc.code || !strings.Contains(rec.Body.String(), tc.want) {
			t.Errorf("GET %s: %d %q; want %d %q", tc.path, rec.Code, rec.Body, tc.code, tc.want)
		}
	}
}
