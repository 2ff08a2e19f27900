package supervisor

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"regexp"
	"strings"
)

const (
	// logTail is how much of a log's end is searched, in bytes.
	logTail = 16 << 10
	// maxWords bounds what is repeated of a log, in bytes.
	maxWords = 300
)

// wordsOf returns why a program says it ended, from the end of its log.
func wordsOf(path string) string {
	f, err := os.Open(path)
	if err != nil {
		return "none"
	}
	defer f.Close()
	if st, err := f.Stat(); err == nil && st.Size() > logTail {
		if _, err := f.Seek(-logTail, io.SeekEnd); err != nil {
			return "none"
		}
	}
	b, err := io.ReadAll(io.LimitReader(f, logTail))
	if err != nil {
		return "none"
	}
	return lastWords(b)
}

// stackLine matches the lines of a Go stack trace: positions, goroutines, calls.
var stackLine = regexp.MustCompile(`^(\t|goroutine \d+|created by |\[signal |exit status |[^\s(]+\.[^\s(]+\(.*\)$|[^\s]+\(0x.*\)$|\.\.\.)`)

// lastWords returns the last line of a log that says something: a stack trace does
// not, and of a panic the reason that was logged before it says more. JSON is reduced to
// its message and error.
func lastWords(log []byte) string {
	lines := bytes.Split(log, []byte("\n"))
	previous := func() string {
		for len(lines) > 0 {
			line := strings.ToValidUTF8(string(bytes.TrimRight(lines[len(lines)-1], " \r\t")), "?")
			lines = lines[:len(lines)-1]
			if line != "" && !stackLine.MatchString(line) {
				return strings.TrimSpace(line)
			}
		}
		return ""
	}
	words := previous()
	if strings.HasPrefix(words, "panic: ") {
		if text, ok := fromJSON(previous()); ok {
			return clip(text)
		}
		return clip(words)
	}
	if text, ok := fromJSON(words); ok {
		words = text
	}
	if words == "" {
		return "none"
	}
	return clip(words)
}

func clip(s string) string { return s[:min(len(s), maxWords)] }

// fromJSON reads a line of a structured log, as etcd writes them.
func fromJSON(line string) (string, bool) {
	var entry struct{ Msg, Error string }
	if !strings.HasPrefix(line, "{") || json.Unmarshal([]byte(line), &entry) != nil || entry.Msg == "" {
		return "", false
	}
	if entry.Error == "" {
		return entry.Msg, true
	}
	return fmt.Sprintf("%s: %s", entry.Msg, entry.Error), true
}
