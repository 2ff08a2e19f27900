// Command helloworld answers every request with a greeting and writes a line
// per request, and one every few seconds, to a log file that a sidecar reads.
package main

import (
	"flag"
	"fmt"
	"log"
	"net/http"
	"os"
	"path/filepath"
	"time"
)

func main() {
	listen := flag.String("listen", ":8080", "address")
	file := flag.String("log", "/var/log/helloworld.log", "log file")
	every := flag.Duration("every", 5*time.Second, "interval of heartbeat lines")
	flag.Parse()
	if err := os.MkdirAll(filepath.Dir(*file), 0o755); err != nil {
		log.Fatal(err)
	}
	f, err := os.OpenFile(*file, os.O_CREATE|os.O_WRONLY|os.O_APPEND, 0o644)
	if err != nil {
		log.Fatal(err)
	}
	out := log.New(f, "", log.LstdFlags|log.LUTC)
	host, _ := os.Hostname()
	go func() {
		for range time.Tick(*every) {
			out.Printf("heartbeat of %s", host)
		}
	}()
	out.Printf("started on %s", *listen)
	log.Fatal(http.ListenAndServe(*listen, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		out.Printf("%s %s", r.Method, r.URL.Path)
		fmt.Fprintf(w, "Hello, World! This is %s.\n", host)
	})))
}
