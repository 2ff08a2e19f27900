package volume

import (
	"slices"

	"google.golang.org/protobuf/proto"

	hyperstart "github.com/hypernetes/hypernetes/api/hyperstart/v1"
)

// inlineBudget bounds the files inline in one CreateRequest, which also carries the
// spec and must stay under 4 MiB.
const inlineBudget = 2 << 20

func requests(decisions []Decision) (volumes []*hyperstart.Volume, puts []*hyperstart.PutFilesRequest) {
	index := map[string]int{}
	budget := inlineBudget
	for _, d := range decisions {
		if d.Volume == nil {
			continue
		}
		if i, ok := index[d.Volume.Name]; ok {
			if i >= 0 {
				mergeDirectories(volumes[i], d.Volume)
			}
			continue
		}
		v := proto.Clone(d.Volume).(*hyperstart.Volume)
		if size := partsSize(d.Parts); size > budget || len(d.Parts) > 1 {
			// The first part makes the volume. Naming it in the CreateRequest too could
			// only do harm: an empty tree of the same version.
			index[v.Name] = -1
			puts = append(puts, putRequests(v.Name, d.Parts)...)
			continue
		} else if size > 0 {
			budget -= size
			v.Kind = &hyperstart.Volume_Files{Files: d.Parts[0]}
		}
		index[v.Name] = len(volumes)
		volumes = append(volumes, v)
	}
	return volumes, puts
}

func partsSize(parts []*hyperstart.FileTree) (n int) {
	for _, p := range parts {
		n += proto.Size(p)
	}
	return n
}

func mergeDirectories(into, from *hyperstart.Volume) {
	if a, b := into.GetEmptyDir(), from.GetEmptyDir(); a != nil && b != nil {
		a.Directories = merge(a.Directories, b.Directories)
	}
	if a, b := into.GetBlock(), from.GetBlock(); a != nil && b != nil {
		a.Directories = merge(a.Directories, b.Directories)
	}
}

func merge(a, b []string) []string {
	for _, d := range b {
		if !slices.Contains(a, d) {
			a = append(a, d)
		}
	}
	return a
}

func putRequests(volume string, parts []*hyperstart.FileTree) []*hyperstart.PutFilesRequest {
	var out []*hyperstart.PutFilesRequest
	for i, p := range parts {
		out = append(out, &hyperstart.PutFilesRequest{Volume: volume, Tree: p, More: i+1 < len(parts)})
	}
	return out
}
