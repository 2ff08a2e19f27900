package node

import (
	"errors"
	"io"
	"io/fs"
	"os"
)

// maxLog is the size in bytes above which a log is moved aside; a component's logs take
// about twice that at most.
const maxLog = 32 << 20

// OpenLog opens a log file for appending, after TrimLog.
func OpenLog(path string) (*os.File, error) {
	if err := TrimLog(path); err != nil {
		return nil, err
	}
	return os.OpenFile(path, os.O_CREATE|os.O_WRONLY|os.O_APPEND, 0o640)
}

// TrimLog moves what is in a log of more than 32 MiB to path.1, replacing what was there,
// and cuts the log to nothing. It may be called while the log is written: writers append,
// so they go on at its new end. What they write while it copies is lost, as with
// logrotate's copytruncate: they are other programs, and cannot be told to open it anew.
func TrimLog(path string) error {
	log, err := os.OpenFile(path, os.O_RDWR, 0)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	defer log.Close()
	if st, err := log.Stat(); err != nil || st.Size() <= maxLog {
		return err
	}
	aside, err := os.OpenFile(path+".1", os.O_CREATE|os.O_WRONLY|os.O_TRUNC, 0o640)
	if err != nil {
		return err
	}
	if _, err := io.Copy(aside, log); err != nil {
		_ = aside.Close()
		return err
	}
	if err := aside.Close(); err != nil {
		return err
	}
	return log.Truncate(0)
}
