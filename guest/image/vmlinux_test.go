package image

import (
	"bytes"
	"encoding/binary"
	"os/exec"
	"testing"
)

// lz4Packed packs data with the lz4 program, in the format of the kernel's build.
func lz4Packed(t *testing.T, data []byte) []byte {
	t.Helper()
	if _, err := exec.LookPath("lz4"); err != nil {
		t.Skip("no lz4 to pack with: install the Debian package lz4")
	}
	cmd := exec.Command("lz4", "-l", "-9", "-c")
	cmd.Stdin = bytes.NewReader(data)
	out, err := cmd.Output()
	if err != nil {
		t.Fatal(err)
	}
	return binary.LittleEndian.AppendUint32(out, uint32(len(data)))
}

func kernelLike() []byte {
	b := []byte("\x7fELF")
	for i := range 3 << 20 {
		b = append(b, byte(i), byte(i>>8)&0x0f, 0, 0)
	}
	return b
}

func TestExtractVmlinux(t *testing.T) {
	want := kernelLike()
	payload := lz4Packed(t, want)
	bz := make([]byte, 3*512+0x2cc)
	bz[0x1f1] = 2
	copy(bz[0x202:], "HdrS")
	binary.LittleEndian.PutUint32(bz[0x248:], 0x2cc)
	binary.LittleEndian.PutUint32(bz[0x24c:], uint32(len(payload)))
	bz = append(bz, payload...)
	got, err := ExtractVmlinux(append(bz, "trailer"...))
	if err != nil || !bytes.Equal(got, want) {
		t.Fatalf("%d bytes, want %d: %v", len(got), len(want), err)
	}
	for _, cut := range []int{0, 0x210, 0x300, len(bz) - 1} {
		if _, err := ExtractVmlinux(bz[:cut]); err == nil {
			t.Errorf("no error for the first %d bytes", cut)
		}
	}
}

func TestNotesHavePVH(t *testing.T) {
	note := func(name string, kind uint32, desc []byte) []byte {
		b := binary.LittleEndian.AppendUint32(nil, uint32(len(name)))
		b = binary.LittleEndian.AppendUint32(b, uint32(len(desc)))
		b = binary.LittleEndian.AppendUint32(b, kind)
		b = append(b, name...)
		return append(append(b, make([]byte, -len(name)&3)...), desc...)
	}
	other, pvh := note("Linux\x00", 0, make([]byte, 4)), note("Xen\x00", 18, make([]byte, 4))
	if !notesHavePVH(append(append([]byte(nil), other...), pvh...)) {
		t.Error("note not found")
	}
	if notesHavePVH(other) || notesHavePVH(pvh[:14]) {
		t.Error("note found where there is none")
	}
}

func FuzzDecompress(f *testing.F) {
	f.Add([]byte{0x02, 0x21, 0x4c, 0x18, 4, 0, 0, 0, 0x30, 'a', 'b', 'c', 7, 0, 0, 0})
	f.Add([]byte{0x02, 0x21, 0x4c, 0x18, 9, 0, 0, 0, 0x1f, 'a', 1, 0, 255, 255, 3, 0x10, 'b', 0, 0, 0, 0})
	f.Fuzz(func(_ *testing.T, b []byte) {
		if len(b) > 4 {
			_, _ = lz4Legacy(b)
			notesHavePVH(b)
		}
	})
}
