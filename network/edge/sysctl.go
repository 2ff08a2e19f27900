package edge

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"strings"
)

// Sysctls are those of the calling thread's namespace: use them inside netns.NS.Do.

func sysctl(name string) (string, error) {
	b, err := os.ReadFile("/proc/sys/" + name)
	return strings.TrimSpace(string(b)), err
}

// setSysctl writes only what differs: some values reset others when written.
func setSysctl(name, value string) error {
	have, err := sysctl(name)
	if err == nil && have == value {
		return nil
	}
	if err := os.WriteFile("/proc/sys/"+name, []byte(value), 0); err != nil {
		return fmt.Errorf("sysctl %s=%s: %w", name, value, err)
	}
	return nil
}

// setSysctls sets all; those of a family the kernel lacks are left out.
func setSysctls(values map[string]string) error {
	for name, v := range values {
		if err := setSysctl(name, v); err != nil && !(strings.HasPrefix(name, "net/ipv6/") && errors.Is(err, fs.ErrNotExist)) {
			return err
		}
	}
	return nil
}
