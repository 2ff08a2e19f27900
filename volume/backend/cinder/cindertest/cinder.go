package cindertest

import (
	"encoding/json"
	"fmt"
	"net/http"
	"regexp"
	"slices"
	"strings"
	"time"
)

var uuidPattern = regexp.MustCompile(`^[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}$`)

func text(o object, key string) string { v, _ := o[key].(string); return v }

func texts(v any) map[string]string {
	out := map[string]string{}
	in, _ := v.(object)
	for k, x := range in {
		out[k] = fmt.Sprint(x)
	}
	return out
}

func (s *Server) cinder(r *http.Request, who identity, parts []string, body object) (int, any, *refusal) {
	one := len(parts) > 1 && parts[1] != "detail"
	switch parts[0] {
	case "volumes":
		if one {
			return s.volume(r, who, parts, body)
		}
		if r.Method == http.MethodPost {
			in, _ := body["volume"].(object)
			return s.newVolume(who, in)
		}
		all := []any{}
		for _, v := range sorted(s.volumes) {
			if q := r.URL.Query().Get("name"); s.visible(who, v.Project, r) && (q == "" || q == v.Name) && s.look(v) {
				all = append(all, s.shown(v))
			}
		}
		return http.StatusOK, object{"volumes": all}, nil
	case "snapshots":
		if one {
			return s.snapshot(r, who, parts[1])
		}
		if r.Method == http.MethodPost {
			in, _ := body["snapshot"].(object)
			return s.newSnapshot(who, in)
		}
		all := []any{}
		for _, x := range sortedSnapshots(s.snapshots) {
			q := r.URL.Query()
			if s.visible(who, x.Project, r) && (q.Get("name") == "" || q.Get("name") == x.Name) && (q.Get("volume_id") == "" || q.Get("volume_id") == x.Volume) && s.lookAt(x) {
				all = append(all, shownSnapshot(x))
			}
		}
		return http.StatusOK, object{"snapshots": all}, nil
	case "attachments":
		if r.Header.Get("OpenStack-API-Version") != "volume 3.54" {
			return 0, nil, missing("Resource", "attachments")
		}
		return s.attachment(r, who, parts, body)
	case "types":
		all := []any{}
		for _, name := range []string{Plain, Quick, Multi, Broken} {
			spec := object{"volume_backend_name": Plain}
			if name == Multi {
				spec["multiattach"] = "<is> True"
			}
			all = append(all, object{"id": "type-" + name, "name": name, "extra_specs": spec})
		}
		return http.StatusOK, object{"volume_types": all}, nil
	case "scheduler-stats":
		if !s.admin(who) {
			return 0, nil, forbidden("scheduler_extension:scheduler_stats:get_pools")
		}
		return http.StatusOK, object{"pools": []any{
			object{"name": "a", "capabilities": object{"volume_backend_name": Plain, "free_capacity_gb": 100.5}},
			object{"name": "b", "capabilities": object{"volume_backend_name": "other", "free_capacity_gb": "infinite"}},
		}}, nil
	case "messages":
		return http.StatusOK, object{"messages": []any{
			object{"user_message": "schedule allocate volume:Could not find any available weighted backend.", "created_at": "2026-01-01T00:00:00.000000"},
		}}, nil
	}
	return 0, nil, missing("Resource", parts[0])
}

func sorted(m map[string]*Volume) []*Volume {
	var all []*Volume
	for _, v := range m {
		all = append(all, v)
	}
	slices.SortFunc(all, func(a, b *Volume) int { return b.Created.Compare(a.Created) })
	return all
}

func sortedSnapshots(m map[string]*Snapshot) []*Snapshot {
	var all []*Snapshot
	for _, v := range m {
		all = append(all, v)
	}
	slices.SortFunc(all, func(a, b *Snapshot) int { return b.Created.Compare(a.Created) })
	return all
}

// visible says whether a list has what a project has.
func (s *Server) visible(who identity, project string, r *http.Request) bool {
	return who.project == project || s.admin(who) && r.URL.Query().Get("all_tenants") == "1"
}

// look passes time for a volume; false if it is gone with that.
func (s *Server) look(v *Volume) bool {
	if v.next == "" {
		return true
	}
	if v.looks--; v.looks >= 0 {
		return true
	}
	v.Status, v.next = v.next, ""
	if v.grow > 0 {
		v.Size, v.grow = v.grow, 0
	}
	if v.kind != "" {
		v.Type, v.kind = v.kind, ""
	}
	if v.Status == "deleted" {
		delete(s.volumes, v.ID)
		return false
	}
	return true
}

func (s *Server) lookAt(x *Snapshot) bool {
	if x.next == "" {
		return true
	}
	if x.looks--; x.looks >= 0 {
		return true
	}
	x.Status, x.next = x.next, ""
	if x.Status == "deleted" {
		delete(s.snapshots, x.ID)
		return false
	}
	return true
}

func (s *Server) find(who identity, id string) *Volume {
	v := s.volumes[id]
	if v == nil || v.Project != who.project && !s.admin(who) || !s.look(v) {
		return nil
	}
	return v
}

func stamp(t time.Time) string { return t.UTC().Format("2006-01-02T15:04:05.000000") }

func orNull(v string) any {
	if v == "" {
		return nil
	}
	return v
}

func (s *Server) shown(v *Volume) object {
	attached := []any{}
	for _, a := range s.attachments {
		if a.Volume == v.ID && a.Status == "attached" {
			attached = append(attached, object{
				"id": v.ID, "attachment_id": a.ID, "volume_id": v.ID, "server_id": orNull(a.Server), "host_name": nil, "device": a.Connector["mountpoint"],
			})
		}
	}
	return object{
		"id": v.ID, "name": v.Name, "status": v.Status, "size": v.Size, "volume_type": v.Type, "availability_zone": "nova", "created_at": stamp(v.Created),
		"snapshot_id": orNull(v.Snapshot), "source_volid": orNull(v.Parent), "metadata": v.Metadata, "bootable": fmt.Sprint(v.Bootable), "encrypted": v.Encrypted,
		"multiattach": v.Multi, "os-vol-tenant-attr:tenant_id": v.Project, "attachments": attached,
	}
}

func (s *Server) over(project string, more int64) *refusal {
	limit, ok := s.quota[project]
	if !ok {
		return nil
	}
	var used int64
	for _, v := range s.volumes {
		if v.Project == project {
			used += v.Size
		}
	}
	if used+more > limit {
		return &refusal{http.StatusRequestEntityTooLarge, "overLimit", fmt.Sprintf("VolumeSizeExceedsAvailableQuota: Requested volume or snapshot exceeds allowed gigabytes quota. Requested %dG, quota is %dG and %dG has been consumed.", more, limit, used)}
	}
	return nil
}

// most is how large a volume may be, in GiB: what the pool has.
const most = 100

func (s *Server) newVolume(who identity, in object) (int, any, *refusal) {
	size, _ := in["size"].(float64)
	v := &Volume{
		ID: uuid(), Name: text(in, "name"), Status: "creating", next: "available", looks: s.Looks, Project: who.project, Created: time.Now(),
		Size: int64(size), Type: text(in, "volume_type"), Metadata: texts(in["metadata"]), Snapshot: text(in, "snapshot_id"), Parent: text(in, "source_volid"),
	}
	if v.Type == "" {
		v.Type = Plain
	}
	if !slices.Contains([]string{Plain, Quick, Multi, Broken}, v.Type) {
		return 0, nil, missing("Volume type with name", v.Type)
	}
	for k, x := range v.Metadata {
		if len(k) > 255 || len(x) > 255 {
			return 0, nil, invalid("Invalid input for field/attribute metadata.")
		}
	}
	if len(v.Name) > 255 || v.Size < 1 {
		return 0, nil, invalid("Invalid input for field/attribute name or size.")
	}
	v.Multi = v.Type == Multi
	if v.Snapshot != "" {
		x := s.snapshots[v.Snapshot]
		switch {
		case x == nil || x.Project != who.project && !s.admin(who):
			return 0, nil, missing("Snapshot", v.Snapshot)
		case x.Status != "available":
			return 0, nil, invalid("Invalid snapshot: Originating snapshot status must be one of 'available' values")
		case v.Size < x.Size:
			return 0, nil, invalid("Invalid input received: Volume size '%dGB' cannot be smaller than the snapshot size %dGB.", v.Size, x.Size)
		}
	}
	if v.Parent != "" {
		p := s.find(who, v.Parent)
		switch {
		case p == nil:
			return 0, nil, missing("Volume", v.Parent)
		case p.Status != "available" && p.Status != "in-use":
			return 0, nil, invalid("Invalid volume: unable to clone volumes that are in the status %s", p.Status)
		case v.Size < p.Size:
			return 0, nil, invalid("Invalid input received: Clones currently must be >= original volume size.")
		}
	}
	if bad := s.over(who.project, v.Size); bad != nil {
		return 0, nil, bad
	}
	if v.Type == Broken || v.Size > most {
		v.next = "error"
	}
	s.volumes[v.ID] = v
	return http.StatusAccepted, object{"volume": s.shown(v)}, nil
}

func (s *Server) volume(r *http.Request, who identity, parts []string, body object) (int, any, *refusal) {
	v := s.find(who, parts[1])
	if v == nil {
		return 0, nil, missing("Volume", parts[1])
	}
	switch {
	case len(parts) == 2 && r.Method == http.MethodGet:
		return http.StatusOK, object{"volume": s.shown(v)}, nil
	case len(parts) == 2 && r.Method == http.MethodDelete:
		if !slices.Contains([]string{"available", "error", "error_restoring", "error_extending"}, v.Status) || s.has(v.ID) {
			return 0, nil, invalid("Invalid volume: Volume status must be available or error or error_restoring or error_extending or error_managing and must not be migrating, attached, belong to a group, have snapshots, awaiting a transfer, or be disassociated from snapshots after volume transfer.")
		}
		v.Status, v.next, v.looks = "deleting", "deleted", s.Looks
		return http.StatusAccepted, nil, nil
	case len(parts) == 3 && parts[2] == "metadata" && r.Method == http.MethodPost:
		for k, x := range texts(body["metadata"]) {
			if len(x) > 255 {
				return 0, nil, invalid("Invalid input for field/attribute metadata.")
			}
			v.Metadata[k] = x
		}
		return http.StatusOK, object{"metadata": v.Metadata}, nil
	case len(parts) == 4 && parts[2] == "metadata" && r.Method == http.MethodDelete:
		if _, ok := v.Metadata[parts[3]]; !ok {
			return 0, nil, missing("Metadata item", parts[3])
		}
		delete(v.Metadata, parts[3])
		return http.StatusOK, nil, nil
	case len(parts) == 3 && parts[2] == "action":
		return s.act(who, v, body)
	}
	return 0, nil, missing("Resource", strings.Join(parts, "/"))
}

func (s *Server) has(volume string) bool {
	for _, x := range s.snapshots {
		if x.Volume == volume {
			return true
		}
	}
	return false
}

func (s *Server) act(who identity, v *Volume, body object) (int, any, *refusal) {
	if in, ok := body["os-extend"].(object); ok {
		size, _ := in["new_size"].(float64)
		switch {
		case v.Status != "available" && v.Status != "in-use":
			return 0, nil, invalid("Invalid volume: Volume %s status must be '('available', 'in-use')' to extend, currently %s.", v.ID, v.Status)
		case int64(size) <= v.Size:
			return 0, nil, invalid("Invalid input received: New size for extend must be greater than current size. (current: %d, extended: %d).", v.Size, int64(size))
		}
		if bad := s.over(v.Project, int64(size)-v.Size); bad != nil {
			return 0, nil, bad
		}
		v.next, v.looks, v.grow = v.Status, s.Looks, int64(size)
		if int64(size) > most || s.Kind == "nfs" && v.Status == "in-use" {
			v.next, v.grow = "error_extending", 0
		}
		v.Status = "extending"
		return http.StatusAccepted, nil, nil
	}
	if in, ok := body["os-retype"].(object); ok {
		kind := text(in, "new_type")
		switch {
		case !slices.Contains([]string{Plain, Quick, Multi}, kind):
			return 0, nil, missing("Volume type with name", kind)
		case v.Status != "available" && v.Status != "in-use":
			return 0, nil, invalid("Invalid volume: Unable to retype")
		}
		v.next, v.looks, v.kind, v.Status = v.Status, s.Looks, kind, "retyping"
		return http.StatusAccepted, nil, nil
	}
	if in, ok := body["os-reset_status"].(object); ok {
		if !s.admin(who) {
			return 0, nil, forbidden("volume_extension:volume_admin_actions:reset_status")
		}
		v.Status = text(in, "status")
		return http.StatusAccepted, nil, nil
	}
	if _, ok := body["os-force_delete"]; ok {
		if !s.admin(who) {
			return 0, nil, forbidden("volume_extension:volume_admin_actions:force_delete")
		}
		v.Status, v.next, v.looks = "deleting", "deleted", s.Looks
		return http.StatusAccepted, nil, nil
	}
	return 0, nil, invalid("There is no such action")
}

func (s *Server) newSnapshot(who identity, in object) (int, any, *refusal) {
	v := s.find(who, text(in, "volume_id"))
	force, _ := in["force"].(bool)
	switch {
	case v == nil:
		return 0, nil, missing("Volume", text(in, "volume_id"))
	case v.Status != "available" && (v.Status != "in-use" || !force):
		return 0, nil, invalid("Invalid volume: Volume %s status must be available, but current status is: %s.", v.ID, v.Status)
	}
	x := &Snapshot{
		ID: uuid(), Name: text(in, "name"), Status: "creating", next: "available", looks: s.Looks, Volume: v.ID, Project: who.project,
		Size: v.Size, Created: time.Now(), Metadata: texts(in["metadata"]),
	}
	s.snapshots[x.ID] = x
	return http.StatusAccepted, object{"snapshot": shownSnapshot(x)}, nil
}

func shownSnapshot(x *Snapshot) object {
	return object{
		"id": x.ID, "name": x.Name, "status": x.Status, "volume_id": x.Volume, "size": x.Size, "created_at": stamp(x.Created), "metadata": x.Metadata,
		"os-extended-snapshot-attributes:project_id": x.Project,
	}
}

func (s *Server) snapshot(r *http.Request, who identity, id string) (int, any, *refusal) {
	x := s.snapshots[id]
	if x == nil || x.Project != who.project && !s.admin(who) || !s.lookAt(x) {
		return 0, nil, missing("Snapshot", id)
	}
	if r.Method == http.MethodDelete {
		if x.Status != "available" && x.Status != "error" {
			return 0, nil, invalid("Invalid snapshot: Snapshot status must be available or error, and not be part of a group.")
		}
		x.Status, x.next, x.looks = "deleting", "deleted", s.Looks
		return http.StatusAccepted, nil, nil
	}
	return http.StatusOK, object{"snapshot": shownSnapshot(x)}, nil
}

func (s *Server) shownAttachment(a *Attachment, detail bool) object {
	out := object{"id": a.ID, "status": a.Status, "instance": orNull(a.Server), "volume_id": a.Volume}
	if detail {
		out["attach_mode"], out["connection_info"] = a.Mode, a.Info
	}
	return out
}

func (s *Server) attachment(r *http.Request, who identity, parts []string, body object) (int, any, *refusal) {
	if len(parts) == 1 && r.Method == http.MethodPost {
		return s.newAttachment(who, body)
	}
	if len(parts) == 1 {
		all := []any{}
		for _, a := range s.attachments {
			if q := r.URL.Query().Get("volume_id"); s.visible(who, a.Project, r) && (q == "" || q == a.Volume) {
				all = append(all, s.shownAttachment(a, false))
			}
		}
		return http.StatusOK, object{"attachments": all}, nil
	}
	a := s.attachments[parts[1]]
	if a == nil || a.Project != who.project && !s.admin(who) {
		return 0, nil, missing("Volume attachment", parts[1])
	}
	v := s.volumes[a.Volume]
	switch {
	case len(parts) == 2 && r.Method == http.MethodGet:
		return http.StatusOK, object{"attachment": s.shownAttachment(a, true)}, nil
	case len(parts) == 2 && r.Method == http.MethodDelete:
		if a.Server != "" && a.Info != nil {
			return 0, nil, &refusal{http.StatusConflict, "conflictingRequest", "Detach volume from instance " + a.Server + " using the Compute API"}
		}
		delete(s.attachments, a.ID)
		s.settle(v)
		return http.StatusOK, object{"attachments": []any{}}, nil
	case len(parts) == 3 && parts[2] == "action" && r.Method == http.MethodPost:
		if _, ok := body["os-complete"]; !ok {
			return 0, nil, invalid("There is no such action")
		}
		a.Status = "attached"
		v.Status = "in-use"
		return http.StatusNoContent, nil, nil
	}
	return 0, nil, missing("Resource", strings.Join(parts, "/"))
}

// settle gives a volume the status that its attachments make.
func (s *Server) settle(v *Volume) {
	v.Status = "available"
	for _, a := range s.attachments {
		if a.Volume == v.ID {
			if v.Status = "in-use"; a.Status != "attached" {
				v.Status = "reserved"
				return
			}
		}
	}
}

func (s *Server) newAttachment(who identity, body object) (int, any, *refusal) {
	in, _ := body["attachment"].(object)
	for k, x := range in {
		var ok bool
		switch k {
		case "volume_uuid", "instance_uuid":
			t, _ := x.(string)
			ok = uuidPattern.MatchString(t)
		case "connector":
			_, ok = x.(object)
			ok = ok || x == nil
		case "mode":
			ok = x == "rw" || x == "ro"
		}
		if !ok {
			return 0, nil, invalid("Invalid input for field/attribute %s. Value: %v.", k, x)
		}
	}
	v := s.find(who, text(in, "volume_uuid"))
	if v == nil {
		return 0, nil, missing("Volume", text(in, "volume_uuid"))
	}
	server := text(in, "instance_uuid")
	if v.Status != "available" && (v.Status != "in-use" || !v.Multi) {
		return 0, nil, invalid("Invalid volume: Volume %s status must be available or downloading to reserve, but the current status is %s.", v.ID, v.Status)
	}
	a := &Attachment{ID: uuid(), Volume: v.ID, Status: "reserved", Server: server, Mode: text(in, "mode"), Project: v.Project}
	v.Status = "reserved"
	s.attachments[a.ID] = a
	if connector, ok := in["connector"].(object); ok {
		if text(connector, "host") == "" {
			return 0, nil, &refusal{http.StatusInternalServerError, "computeFault", "Unable to create attachment for volume."}
		}
		a.Connector, a.Info, a.Status = connector, s.info(v, a.ID), "attaching"
	}
	return http.StatusOK, object{"attachment": s.shownAttachment(a, true)}, nil
}

// info is what a driver says of a connection.
func (s *Server) info(v *Volume, id string) object {
	out := object{"driver_volume_type": s.Kind, "attachment_id": id, "access_mode": "rw", "encrypted": v.Encrypted, "cacheable": false, "qos_specs": nil}
	switch s.Kind {
	case "rbd":
		for k, x := range (object{
			"name": "volumes/volume-" + v.ID, "hosts": []any{"10.0.0.1", "[fd00::1]"}, "ports": []any{"6789", "3300"}, "cluster_name": "ceph", "auth_enabled": true,
			"auth_username": "cinder", "secret_type": "ceph", "secret_uuid": nil, "volume_id": v.ID, "discard": true,
		}) {
			out[k] = x
		}
	case "iscsi":
		for k, x := range (object{
			"target_discovered": false, "target_portal": "10.0.0.2:3260", "target_iqn": "iqn.2010-10.org.openstack:volume-" + v.ID, "target_lun": 1,
			"volume_id": v.ID, "auth_method": "CHAP", "auth_username": "user-" + id[:8], "auth_password": "pass-" + id[9:13],
		}) {
			out[k] = x
		}
	case "nfs":
		for k, x := range (object{"export": "10.0.0.3:/srv/cinder", "name": "volume-" + v.ID, "format": "raw", "options": nil, "mount_point_base": "/var/lib/cinder/mnt"}) {
			out[k] = x
		}
	}
	for k, x := range s.Extra {
		out[k] = x
	}
	// As JSON has it.
	b, _ := json.Marshal(out)
	again := object{}
	_ = json.Unmarshal(b, &again)
	return again
}
