package inject

import "strings"

// children are the keys whose value is a list, by the level they stand on: 0 the
// configuration, 1 a container or volume.
var topLists = map[string]bool{"containers": true, "initContainers": true, "volumes": true}

var containerLists = map[string]bool{"args": true, "command": true, "env": true, "envFrom": true, "ports": true, "volumeMounts": true, "volumeDevices": true}

// mend restores the indentation of a configuration that lost it, as the seeds' printed one
// did: every line is known by its key, so where it belongs follows from the key alone. It
// refuses what it does not know, scalars over several lines among it. Nesting is rebuilt to
// one depth of list inside a container (ports, mounts, environment); a line that was
// deeper than that is not understood.
func mend(config string) (string, bool) {
	const (
		atTop  = iota // expects a top-level key
		inItem        // in an item of a top-level list, or in a lone container
		inList        // in an item of a list of a container
	)
	var out strings.Builder
	state, base := atTop, 0 // base is the indentation of a container's keys
	volumes := false
	line := func(indent int, text string) { out.WriteString(strings.Repeat(" ", indent) + text + "\n") }
	for raw := range strings.Lines(config) {
		text := strings.TrimSpace(raw)
		if text == "" || strings.HasPrefix(text, "#") || text == "---" {
			continue
		}
		item := strings.HasPrefix(text, "-")
		content := strings.TrimSpace(strings.TrimPrefix(text, "-"))
		key, value, mapping := strings.Cut(content, ":")
		value = strings.TrimSpace(value)
		if strings.HasPrefix(value, "|") || strings.HasPrefix(value, ">") {
			return "", false
		}
		if !item && mapping && value == "" && topLists[key] {
			line(0, text)
			state, base, volumes = atTop, 2, key == "volumes"
			continue
		}
		switch {
		case volumes && item && key == "name":
			line(0, "- "+content)
			state = inItem
		case volumes && state == inItem && !item && mapping:
			// The volume's source: a key with its value on the line, or one with keys below.
			switch {
			case value != "":
				// A flow value, or a field of the source above.
				if strings.HasPrefix(value, "{") || strings.HasPrefix(value, "[") {
					line(2, content)
				} else {
					line(4, content)
				}
			default:
				line(2, content)
			}
		case !volumes && item && key == "name" && state != inList && base == 2:
			line(0, "- "+content)
			state = inItem
		case !volumes && item && state == inList:
			// An item of a container's list, or the next container: a name with no list that
			// takes names open would be one, and cannot be told apart.
			line(base, "- "+content)
		case !volumes && !item && mapping && containerLists[key] && value == "":
			line(base, content)
			state = inList
		case !volumes && !item && mapping && isMountField(key) && state == inList:
			line(base+2, content)
		case !volumes && !item && mapping && isContainerField(key) && value != "":
			line(base, content)
			state = inItem
		default:
			return "", false
		}
	}
	return out.String(), true
}

func isMountField(key string) bool {
	switch key {
	case "mountPath", "subPath", "readOnly", "containerPort", "protocol", "hostPort", "value", "devicePath":
		return true
	}
	return false
}

func isContainerField(key string) bool {
	switch key {
	case "name", "image", "imagePullPolicy", "workingDir", "tty", "stdin", "command", "args", "restartPolicy",
		"terminationMessagePath", "terminationMessagePolicy":
		return true
	}
	return false
}
