package main

import (
	"bytes"
	"fmt"
	"os"
	"slices"
	"strings"

	"golang.org/x/sys/unix"
)

// stat prints a line per file: name, type, mode in octal, owner, links, inode,
// device number of devices, target of links, and extended attributes, values in quotes.
func stat(args []string) int {
	code := 0
	for _, name := range args {
		line, err := describeFile(name)
		if err != nil {
			fmt.Fprintln(os.Stderr, "stat:", err)
			code = 1
			continue
		}
		fmt.Println(line)
	}
	return code
}

var fileTypes = map[uint32]string{
	unix.S_IFREG: "file", unix.S_IFDIR: "dir", unix.S_IFLNK: "link", unix.S_IFIFO: "fifo",
	unix.S_IFCHR: "char", unix.S_IFBLK: "block", unix.S_IFSOCK: "socket",
}

func describeFile(name string) (string, error) {
	var st unix.Stat_t
	if err := unix.Lstat(name, &st); err != nil {
		return "", fmt.Errorf("%s: %w", name, err)
	}
	kind := fileTypes[st.Mode&unix.S_IFMT]
	out := fmt.Sprintf("%s %s %04o %d:%d links=%d inode=%d", name, kind, st.Mode&^unix.S_IFMT, st.Uid, st.Gid, st.Nlink, st.Ino)
	switch kind {
	case "char", "block":
		out += fmt.Sprintf(" device=%d:%d", unix.Major(uint64(st.Rdev)), unix.Minor(uint64(st.Rdev)))
	case "link":
		target, err := os.Readlink(name)
		if err != nil {
			return "", err
		}
		out += " to=" + target
	}
	attributes, err := extended(name)
	return out + attributes, err
}

func extended(name string) (string, error) {
	list := make([]byte, 64<<10)
	n, err := unix.Llistxattr(name, list)
	if err != nil {
		return "", fmt.Errorf("%s: attributes: %w", name, err)
	}
	names := strings.FieldsFunc(string(list[:n]), func(r rune) bool { return r == 0 })
	slices.Sort(names)
	var out bytes.Buffer
	for _, attribute := range names {
		value := make([]byte, 64<<10)
		n, err := unix.Lgetxattr(name, attribute, value)
		if err != nil {
			return "", fmt.Errorf("%s: attribute %s: %w", name, attribute, err)
		}
		fmt.Fprintf(&out, " %s=%q", attribute, value[:n])
	}
	return out.String(), nil
}
