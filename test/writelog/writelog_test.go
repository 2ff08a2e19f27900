package writelog

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"testing"
)

const disk = 64 << 10

// made is a log of entries of sector, number of sectors and flags. Each writes its index.
func made(entries ...[3]uint64) []byte {
	le := binary.LittleEndian
	b := make([]byte, 512)
	le.PutUint64(b, magic)
	le.PutUint64(b[8:], version)
	le.PutUint64(b[16:], uint64(len(entries)))
	le.PutUint32(b[24:], 512)
	for i, e := range entries {
		h := make([]byte, 512)
		for j, v := range e {
			le.PutUint64(h[8*j:], v)
		}
		b = append(b, h...)
		if e[2]&(flagDiscard|flagMark) == 0 {
			b = append(b, bytes.Repeat([]byte{byte(i + 1)}, int(e[1])*512)...)
		}
	}
	return b
}

func TestRead(t *testing.T) {
	b := made([3]uint64{0, 16, 0}, [3]uint64{0, 0, flagFlush}, [3]uint64{1, 1, flagFUA}, [3]uint64{8, 2, flagDiscard}, [3]uint64{0, 0, flagMark}, [3]uint64{0, 0, flagFlush})
	l, err := Read(bytes.NewReader(b), int64(len(b)), disk)
	if err != nil {
		t.Fatal(err)
	}
	if got := slices.Collect(l.Cuts()); !slices.Equal(got, []int{1, 2, 5}) {
		t.Errorf("cuts at %v", got)
	}
	if end := l.Entries[5].End; end != int64(len(b)) {
		t.Errorf("ends at %d of %d", end, len(b))
	}
	d := Disk{}
	if err := d.Apply(l, 0, 3, nil); err != nil {
		t.Fatal(err)
	}
	before := d.Clone()
	if err := d.Apply(l, 3, 6, nil); err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(t.TempDir(), "disk")
	for _, x := range []struct {
		d    Disk
		want []byte
	}{
		{before, slices.Concat(bytes.Repeat([]byte{1}, 512), bytes.Repeat([]byte{3}, 512), bytes.Repeat([]byte{1}, 7168))},
		{d, slices.Concat(bytes.Repeat([]byte{1}, 512), bytes.Repeat([]byte{3}, 512), bytes.Repeat([]byte{1}, 3072), make([]byte, 1024), bytes.Repeat([]byte{1}, 3072))},
	} {
		if err := x.d.Save(path, disk); err != nil {
			t.Fatal(err)
		}
		if got, err := os.ReadFile(path); err != nil || !bytes.Equal(got, append(x.want, make([]byte, disk-len(x.want))...)) {
			t.Errorf("the disk has other content, %v", err)
		}
	}
	// Each page for itself.
	half := Disk{}
	if err := half.Apply(l, 0, 1, func(_ int, page int64) bool { return page == 1 }); err != nil {
		t.Fatal(err)
	}
	if half[0] != nil || half[1] == nil {
		t.Errorf("pages %v", half)
	}
}

func TestReadRefuses(t *testing.T) {
	good := made([3]uint64{0, 2, 0})
	change := func(at int, v byte) []byte {
		b := slices.Clone(good)
		b[at] = v
		return b
	}
	for name, b := range map[string][]byte{
		"nothing": nil, "no log": change(0, 0), "another version": change(8, 2), "no sectors": change(25, 0), "odd sectors": change(24, 1),
		"more entries": change(16, 2), "many entries": change(23, 0xff), "cut off": good[:len(good)-1],
		"beyond the disk": change(512, 255), "a long one": change(512+15, 0x80), "unknown flags": change(512+18, 1),
	} {
		if l, err := Read(bytes.NewReader(b), int64(len(b)), disk); err == nil {
			t.Errorf("%s: %+v", name, l.Entries)
		}
	}
}

// TestQEMU: what QEMU wrote can be read, and makes the disk that it wrote.
func TestQEMU(t *testing.T) {
	if _, err := exec.LookPath("qemu-io"); err != nil {
		t.Skipf("skipped: %v: install the Debian package qemu-utils", err)
	}
	dir := t.TempDir()
	image, log := filepath.Join(dir, "image"), filepath.Join(dir, "log")
	for path, size := range map[string]int64{image: disk, log: 0} {
		if err := os.WriteFile(path, make([]byte, size), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	node := fmt.Sprintf("driver=blklogwrites,discard=unmap,file.driver=file,file.discard=unmap,file.filename=%s,log.driver=file,log.filename=%s", image, log)
	args := []string{"--image-opts", node}
	for _, c := range []string{"write -P 1 0 16k", "flush", "write -P 2 512 1k", "write -f -P 3 8k 4k", "discard 4k 4k", "write -z 12k 512", "flush"} {
		args = append(args, "-c", c)
	}
	if out, err := exec.Command("qemu-io", args...).CombinedOutput(); err != nil || bytes.Contains(out, []byte("failed")) {
		t.Fatalf("qemu-io: %v: %s", err, out)
	}
	f, err := os.Open(log)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	st, err := f.Stat()
	if err != nil {
		t.Fatal(err)
	}
	l, err := Read(f, st.Size(), disk)
	if err != nil {
		t.Fatal(err)
	}
	if got := slices.Collect(l.Cuts()); len(got) < 3 {
		t.Errorf("cuts at %v of %+v", got, l.Entries)
	}
	d := Disk{}
	if err := d.Apply(l, 0, len(l.Entries), nil); err != nil {
		t.Fatal(err)
	}
	again := filepath.Join(dir, "again")
	if err := d.Save(again, disk); err != nil {
		t.Fatal(err)
	}
	want, _ := os.ReadFile(image)
	if got, err := os.ReadFile(again); err != nil || !bytes.Equal(got, want) || len(want) != disk {
		t.Errorf("the log makes another disk, %v", err)
	}
}

func FuzzRead(f *testing.F) {
	f.Add(made([3]uint64{0, 16, 0}, [3]uint64{0, 0, flagFlush}, [3]uint64{8, 2, flagDiscard}))
	f.Add(made([3]uint64{0, 0, flagMark}, [3]uint64{1, 1, flagFUA}))
	f.Fuzz(func(t *testing.T, b []byte) {
		l, err := Read(bytes.NewReader(b), int64(len(b)), disk)
		if err != nil {
			return
		}
		d := Disk{}
		if err := d.Apply(l, 0, len(l.Entries), nil); err != nil {
			t.Fatalf("a log that was read cannot be applied: %v", err)
		}
		for n := range d {
			if n < 0 || n*page >= disk {
				t.Fatalf("page %d of a disk of %d", n, disk)
			}
		}
	})
}
