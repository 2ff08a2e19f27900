// Package storage owns the guest's disks: image layers and scratch space found by
// serial, overlays, and project quotas on the scratch file system.
//
// It must not know containers, volumes or the protocol.
package storage

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"time"

	"github.com/containerd/errdefs"

	"github.com/hypernetes/hypernetes/guest/hyperstart/uevent"
)

// diskTimeout is how long a hot-plugged disk may take to appear; a VM under software
// emulation on a busy node is slow.
const diskTimeout = 20 * time.Second

var validSerial = regexp.MustCompile(`^[a-zA-Z0-9_-]{1,36}$`)

// Find waits for the disk with that serial and returns its device node.
func Find(ctx context.Context, serial string) (string, error) {
	if !validSerial.MatchString(serial) {
		return "", fmt.Errorf("disk serial %.80q: must match %s: %w", serial, validSerial, errdefs.ErrInvalidArgument)
	}
	ctx, cancel := context.WithTimeout(ctx, diskTimeout)
	defer cancel()
	var dev string
	err := uevent.Wait(ctx, func() (bool, error) {
		dev = bySerial("/sys/block", serial)
		if dev == "" {
			return false, nil
		}
		_, err := os.Stat(dev)
		return err == nil, nil
	})
	if err != nil {
		return "", fmt.Errorf("disk with serial %s has not appeared: %w: %w", serial, errdefs.ErrNotFound, err)
	}
	return dev, nil
}

func bySerial(sys, serial string) string {
	entries, err := os.ReadDir(sys)
	if err != nil {
		return ""
	}
	for _, e := range entries {
		switch name := e.Name(); {
		case strings.HasPrefix(name, "sd"):
			page, err := os.ReadFile(filepath.Join(sys, name, "device/vpd_pg80"))
			if err == nil && vpdSerial(page) == serial {
				return "/dev/" + name
			}
		case strings.HasPrefix(name, "vd"):
			b, err := os.ReadFile(filepath.Join(sys, name, "serial"))
			if err == nil && strings.TrimSpace(string(b)) == serial {
				return "/dev/" + name
			}
		}
	}
	return ""
}

// vpdSerial decodes SCSI vital product data page 0x80: four bytes of head, the last
// two being the length, then the serial.
func vpdSerial(page []byte) string {
	if len(page) < 4 || page[1] != 0x80 {
		return ""
	}
	n := int(page[2])<<8 | int(page[3])
	if n > len(page)-4 {
		return ""
	}
	return strings.Trim(string(page[4:4+n]), " \x00")
}
