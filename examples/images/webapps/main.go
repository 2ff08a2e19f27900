// Command webapps is a small web server that deploys what appears in its
// webapps directory, as Tomcat does: NAME.war (a zip) or a directory NAME is
// served below /NAME/, ROOT below /. It serves files; it does not run servlets.
package main

import (
	"flag"
	"fmt"
	"html"
	"log"
	"net/http"
	"os"
	"path/filepath"
	"strings"
)

func main() {
	dir := flag.String("dir", "webapps", "directory with applications")
	listen := flag.String("listen", ":8080", "address")
	flag.Parse()
	s := &server{dir: *dir}
	log.SetFlags(log.LstdFlags | log.LUTC)
	log.Printf("serving %s on %s", *dir, *listen)
	log.Fatal(http.ListenAndServe(*listen, s))
}

// server looks the application up on every request, so that nothing has to
// watch the directory and a new file is served at once.
type server struct{ dir string }

func (s *server) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	log.Printf("%s %s from %s", r.Method, r.URL.Path, r.RemoteAddr)
	name, _, nested := strings.Cut(strings.TrimPrefix(r.URL.Path, "/"), "/")
	for _, app := range []struct{ name, prefix string }{{name, "/" + name}, {"ROOT", ""}} {
		if app.name == "" || strings.HasPrefix(app.name, ".") {
			continue
		}
		files, done, err := open(filepath.Join(s.dir, app.name))
		if err != nil {
			continue
		}
		defer done()
		if app.prefix != "" && !nested {
			http.Redirect(w, r, app.prefix+"/", http.StatusFound)
			return
		}
		http.StripPrefix(app.prefix, http.FileServerFS(files)).ServeHTTP(w, r)
		return
	}
	s.list(w, r)
}

// list answers for the root when there is no ROOT application.
func (s *server) list(w http.ResponseWriter, r *http.Request) {
	if r.URL.Path != "/" {
		http.NotFound(w, r)
		return
	}
	found, err := os.ReadDir(s.dir)
	if err != nil {
		http.Error(w, err.Error(), http.StatusInternalServerError)
		return
	}
	fmt.Fprintln(w, "<!DOCTYPE html><title>webapps</title><h1>Applications</h1><ul>")
	for _, f := range found {
		n := html.EscapeString(strings.TrimSuffix(f.Name(), ".war"))
		fmt.Fprintf(w, "<li><a href=\"/%s/\">%s</a>\n", n, n)
	}
	fmt.Fprintln(w, "</ul>")
}
