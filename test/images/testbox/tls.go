package main

import (
	"encoding/json"
	"flag"
	"fmt"
	"net/http"
	"path/filepath"
	"strings"
	"time"
)

// serveTLS is what the API server calls: at /validate an admission webhook that refuses
// objects whose names begin with "refused", at /apis/GROUP/VERSION an aggregated API
// without resources.
func serveTLS(args []string) int {
	fs := flag.NewFlagSet("tls", flag.ExitOnError)
	addr := fs.String("addr", ":8443", "address")
	dir := fs.String("dir", "/tls", "folder of tls.crt and tls.key, as a Secret has them")
	_ = fs.Parse(args)
	mux := http.NewServeMux()
	mux.HandleFunc("POST /validate", func(w http.ResponseWriter, r *http.Request) {
		var review struct{ Request struct{ UID, Name string } }
		if err := json.NewDecoder(http.MaxBytesReader(w, r.Body, 1<<20)).Decode(&review); err != nil {
			http.Error(w, err.Error(), http.StatusBadRequest)
			return
		}
		reply(w, map[string]any{"apiVersion": "admission.k8s.io/v1", "kind": "AdmissionReview", "response": map[string]any{
			"uid": review.Request.UID, "allowed": !strings.HasPrefix(review.Request.Name, "refused"),
			"status": map[string]any{"message": "testbox refuses " + review.Request.Name},
		}})
	})
	mux.HandleFunc("GET /apis/{group}/{version}", func(w http.ResponseWriter, r *http.Request) {
		reply(w, map[string]any{"apiVersion": "v1", "kind": "APIResourceList", "resources": []any{},
			"groupVersion": r.PathValue("group") + "/" + r.PathValue("version")})
	})
	server := &http.Server{Addr: *addr, Handler: mux, ReadHeaderTimeout: 10 * time.Second}
	fmt.Println("testbox: serving TLS")
	return fail(server.ListenAndServeTLS(filepath.Join(*dir, "tls.crt"), filepath.Join(*dir, "tls.key")))
}

func reply(w http.ResponseWriter, v any) {
	w.Header().Set("Content-Type", "application/json")
	_ = json.NewEncoder(w).Encode(v)
}
