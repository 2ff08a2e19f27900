#!/usr/bin/env bash
# A real OpenStack for tests, from Debian 12 packages: Keystone, Neutron, Cinder and, if
# asked for, Octavia's control plane. No systemd, no kernel modules, no virtual machine.
#
#   openstack.sh up                install what is missing, start everything, wait until it works
#   openstack.sh down              stop everything, keep the data
#   openstack.sh purge             down, then forget the data
#   openstack.sh install           only install what is missing
#   openstack.sh status            a line per service and API; fails unless all is well
#   openstack.sh env [CLOUD]       shell variables of a cloud of clouds.yaml (default: admin)
#   openstack.sh exec CMD...       run CMD where the services run, with clouds.yaml
#
#   openstack.sh agent-up NAME NETNS UNDERLAY_IP
#                                  make an existing network namespace (a name or a path, such
#                                  as /proc/PID/ns/net) Neutron's host NAME: a link to the
#                                  underlay with that address, and a linuxbridge agent
#   openstack.sh agent-down NAME   undo that, and what the agent left in the namespace
#
#   openstack.sh kill SERVICE      SIGKILL, children too: a fault
#   openstack.sh start SERVICE     start it again and wait until it works
#   openstack.sh freeze SERVICE    stop scheduling it: requests time out instead of failing
#   openstack.sh thaw SERVICE
#
# Services: mariadb rabbitmq keystone neutron-server dhcp-agent l3-agent cinder-api
# cinder-scheduler cinder-volume octavia-api octavia-worker, ceph-mon ceph-mgr ceph-osd,
# and agent-NAME for the linuxbridge agent of host NAME.
#
# Nothing runs or sends in the machine's own network namespace:
#
#   h8s-os           all services, on 127.0.0.1 and 10.250.0.1; Neutron's network node
#                    (host h8s-os); the bridges "underlay" (10.250.0.0/24, between hosts)
#                    and "br-ext" (172.24.4.0/24, Neutron's external network "public")
#   h8s-os-nodeN     host of that name, at 10.250.0.1N; N from 1 to H8S_OS_NODES
#   h8s-os-outside   at 172.24.4.250: a client beyond the floating addresses
#
# Routers and DHCP servers are in namespaces that only `exec` sees.
#
# Settings (environment):
#   H8S_OPENSTACK     state directory                                  /var/tmp/h8s-openstack
#   H8S_OS_NETNS      name of the namespace, and prefix of the others  h8s-os
#   H8S_OS_NODES      compute nodes that `up` makes                    2
#   H8S_OS_VOLUME     Cinder's back end: file, rbd or none             file
#   H8S_OS_OCTAVIA    1: Octavia's API and worker, no-op drivers       0
#   H8S_OS_PASSWORD   every account's password                         h8s
# `up` keeps them in the state directory: whoever calls next need not repeat them. With
# another directory and another namespace, a second OpenStack runs beside the first.
set -euo pipefail
umask 022
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
DIR=${H8S_OPENSTACK:-/var/tmp/h8s-openstack}
settings=(H8S_OS_NETNS H8S_OS_NODES H8S_OS_VOLUME H8S_OS_OCTAVIA H8S_OS_PASSWORD)
if [ -r "$DIR/settings" ]; then # as they were at the last "up", unless said otherwise
	while IFS='=' read -r name value; do
		[[ " ${settings[*]} " != *" $name "* || -v $name ]] || declare "$name=$value"
	done <"$DIR/settings"
fi
NODES=${H8S_OS_NODES:-2}
VOLUME=${H8S_OS_VOLUME:-file}
OCTAVIA=${H8S_OS_OCTAVIA:-0}
PASSWORD=${H8S_OS_PASSWORD:-h8s}
NS=${H8S_OS_NETNS:-h8s-os}
UNDERLAY=10.250.0.1 EXTERNAL=172.24.4.1 OUTSIDE=172.24.4.250
KEYSTONE=http://$UNDERLAY:5000/v3 NEUTRON=http://$UNDERLAY:9696 CINDER=http://$UNDERLAY:8776 OCTAVIA_URL=http://$UNDERLAY:9876
CONF=$DIR/etc LOG=$DIR/log CEPH=$DIR/ceph
caller_path=$PATH
if [ "${1:-}" != exec ]; then # which hands the caller's environment on
	export PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin LC_ALL=C.UTF-8
	unset PYTHONPATH PYTHONHOME PYTHONDONTWRITEBYTECODE http_proxy https_proxy HTTP_PROXY HTTPS_PROXY
	for v in "${!OS_@}"; do unset "$v"; done
fi

say() { printf '[%3ds] %s\n' "$SECONDS" "$*" >&2; }
die() { say "error: $*"; exit 1; }
# once STEP: run the function STEP unless it has succeeded before.
once() {
	[ ! -e "$DIR/done/$1" ] || return 0
	local t=$SECONDS rc
	set +e; (set -e; "$1") >>"$LOG/$1.log" 2>&1; rc=$?; set -e # "||" would switch -e off in there
	[ $rc = 0 ] || die "$1 failed; see $LOG/$1.log"
	touch "$DIR/done/$1"
	say "first run: $1 took $((SECONDS - t)) s"
}
# wait_for SECONDS WHAT CMD...: poll until CMD succeeds.
wait_for() {
	local end=$((SECONDS + $1)) what=$2; shift 2
	until "$@" >/dev/null 2>&1; do
		[ $SECONDS -lt "$end" ] || die "$what does not work; see $LOG"
		! dead || die "a service died; see $LOG"
		sleep 0.3
	done
	say "works: $what"
}
script() { cat >"$1" && chmod 755 "$1"; }
# lock: one change at a time. Daemons must not inherit descriptor 9.
lock() { mkdir -p "$DIR"; exec 9>"$DIR/lock"; flock -w 900 9 || die "another openstack.sh has been at work for 15 minutes (lock $DIR/lock)"; }

# --- processes -----------------------------------------------------------------
# Every service has a control group (version 2) of its own, whatever it forks stays in
# there: killing or freezing the group is killing or freezing the service.
cgroups() { # print the directory of our groups
	local root; root=$(findmnt -rno TARGET -t cgroup2 | head -n1)
	[ -n "$root" ] || die "no cgroup version 2 file system is mounted (mount -t cgroup2 none /sys/fs/cgroup)"
	echo "$root/$NS"
}
started() { sed 's/.*) //' "/proc/$1/stat" 2>/dev/null | cut -d' ' -f20; } # guards against a pid used again
# pid_of NAME: print the main process's pid; fail if it does not run.
pid_of() {
	local p s
	read -r p s 2>/dev/null <"$DIR/run/$1" && [ -n "$s" ] && [ "$(started "$p")" = "$s" ] && echo "$p"
}
running() { pid_of "$1" >/dev/null; }
# dead: name the services that were started and are gone; fail if there are none.
dead() {
	local f name found=1
	for f in "$DIR"/run/*; do
		name=${f##*/}
		running "$name" || [ ! -e "$f" ] || { say "dead: $name"; found=0; }
	done
	return $found
}
# spawn NAME CMD...: run CMD in the background, in the group NAME.
spawn() {
	local name=$1; shift
	mkdir -p "$CG/$name"
	# shellcheck disable=SC2016 # for the inner shell
	setsid bash -c 'echo 0 >"$0/cgroup.procs"; exec "$@"' "$CG/$name" "$@" </dev/null >>"$LOG/$name.log" 2>&1 9>&- &
	echo "$! $(started $!)" >"$DIR/run/.$name"
	mv "$DIR/run/.$name" "$DIR/run/$name"
}
populated() { grep -qs 'populated 1' "$CG/$1/cgroup.events"; }
# kill_group NAME...: SIGKILL, and wait for the end of the last process.
kill_group() {
	local name i
	for name; do [ ! -d "$CG/$name" ] || echo 1 >"$CG/$name/cgroup.kill"; done
	for name; do
		for ((i = 0; i < 600; i++)); do populated "$name" || break; sleep 0.05; done
		[ ! -d "$CG/$name" ] || rmdir "$CG/$name" || die "processes of $name do not end"
	done
}
# drop NAME...: end services that keep nothing of their own.
drop() {
	local name
	kill_group "$@"
	for name; do rm -f "$DIR/run/$name"; done
}
# stop NAME...: let services end well, for 30 s.
stop() {
	local name p i
	for name; do p=$(pid_of "$name") || continue; kill "$p" 2>/dev/null || true; done
	for name; do
		for ((i = 0; i < 150; i++)); do running "$name" || break; sleep 0.2; done
	done
	drop "$@"
}
# start NAME HOLDER CMD...: the daemon CMD in the holder's namespaces, unless it runs.
start() {
	local name=$1 p
	! running "$name" || return 0
	p=$(pid_of "$2") || die "$2 is not up"
	shift 2
	date -u '+%F %T' >"$DIR/tmp/started-$name"
	kill_group "$name" # children that outlived the last one
	spawn "$name" nsenter -t "$p" -n -m -r -W / -- "$@"
}

# --- namespaces ----------------------------------------------------------------
# Agents read /sys/class/net, so a network namespace alone is not enough: a holder process
# keeps a mount namespace whose /sys shows that network, and a /run/netns of its own, where
# qdhcp-* and qrouter-* come and go without anybody else seeing them.
holder() { # holder NAME NETNS-PATH
	! running "$1" || return 0
	# shellcheck disable=SC2016 # for the inner shell
	spawn "$1" nsenter --net="$2" unshare --mount --propagation slave bash -c '
		mkdir -p "$1"; mount --rbind /sys/fs/cgroup "$1"; mount -t sysfs sysfs /sys
		mount --rbind "$1" /sys/fs/cgroup; umount -l "$1"
		mkdir -p /run/netns; mount -t tmpfs -o mode=755 tmpfs /run/netns
		mount --make-shared /run/netns
		exec -a h8s-os-holder sleep infinity' _ "$DIR/tmp/cgroup-$1"
	wait_for 60 "namespace of $1" grep -qa '^h8s-os-holder' "/proc/$(pid_of "$1")/cmdline"
}
# inside HOLDER CMD...: run CMD in its namespaces, in the current directory.
inside() {
	local p; p=$(pid_of "$1") || die "$1 is not up (openstack.sh up)"
	shift
	# shellcheck disable=SC2016 # for the inner shell
	nsenter -t "$p" -n -m -r -W / -- sh -c 'cd "$0" && exec "$@"' "$PWD" "$@" 9>&-
}
api_side() { inside "hold-$NS" "$@"; }
namespace() { [ -e "/run/netns/$1" ] || ip netns add "$1"; ip -n "$1" link set lo up; }
bridge() { # bridge NAME ADDRESS, in h8s-os
	ip -n "$NS" link show "$1" >/dev/null 2>&1 || ip -n "$NS" link add "$1" type bridge
	ip -n "$NS" addr replace "$2" dev "$1"
	ip -n "$NS" link set "$1" up
}
up_namespaces() {
	namespace "$NS"
	bridge underlay $UNDERLAY/24
	bridge br-ext $EXTERNAL/24
	holder "hold-$NS" "/run/netns/$NS"
	namespace "$NS-outside"
	ip -n "$NS-outside" link show eth0 >/dev/null 2>&1 ||
		ip -n "$NS" link add outside type veth peer name eth0 netns "$NS-outside"
	ip -n "$NS" link set outside master br-ext up
	ip -n "$NS-outside" addr replace $OUTSIDE/24 dev eth0
	ip -n "$NS-outside" link set eth0 up
}

# --- packages ------------------------------------------------------------------
install() {
	local groups="base" packages missing=() p guard='' units
	[ "$VOLUME" = none ] || groups+="|cinder"
	[ "$VOLUME" != rbd ] || groups+="|rbd"
	[ "$OCTAVIA" != 1 ] || groups+="|octavia"
	packages=$(sed -nE "s/^($groups) +//p" "$here/packages")
	for p in $packages; do
		[ "$(dpkg-query -Wf '${db:Status-Abbrev}' "$p" 2>/dev/null)" = "ii " ] || missing+=("$p")
	done
	[ ${#missing[@]} -gt 0 ] || return 0
	say "installing: ${missing[*]}"
	# No package may start its service, neither now (a policy that is there already is
	# respected) nor at the next boot.
	units=$(enabled)
	if [ ! -e /usr/sbin/policy-rc.d ]; then
		guard=/usr/sbin/policy-rc.d
		trap 'rm -f /usr/sbin/policy-rc.d' EXIT
		script $guard <<<$'#!/bin/sh\nexit 101'
	fi
	for p in keystone:keystone/{configure_db,register-endpoint,create-admin-tenant} \
		neutron-common:neutron/configure_{db,rabbit,ksat} cinder-common:cinder/configure_{db,rabbit,ksat} \
		octavia-common:octavia/configure_{db,rabbit,ksat}; do
		echo "${p%%:*} ${p#*:} boolean false"
	done | DEBIAN_FRONTEND=noninteractive debconf-set-selections
	mkdir -p "$DIR/tmp" # dpkg unpacks there: /tmp is anybody's to clean
	PATH=$caller_path TMPDIR=$DIR/tmp "$here/../../scripts/deps.sh" "${missing[@]}"
	[ -z "$guard" ] || { rm -f $guard; trap - EXIT; }
	comm -13 <(echo "$units") <(enabled) | xargs -r rm -f
	say "packages installed"
}

enabled() { find /etc/systemd/system -type l 2>/dev/null | sort; } # units of systemd

# --- configuration, written anew on every "up" -----------------------------------
database() { echo "mysql+pymysql://root@localhost/$1?unix_socket=$DIR/mysql/sock&charset=utf8"; }
common_config() { # common_config SERVICE: what all but Keystone share
	cat <<-E
		[DEFAULT]
		host = $NS
		state_path = $DIR/$1
		transport_url = rabbit://guest:guest@$UNDERLAY:5672/
		[database]
		connection = $(database "$1")
		[oslo_concurrency]
		lock_path = $DIR/$1/lock
		[oslo_messaging_notifications]
		driver = noop
		[oslo_policy]
		policy_dirs = /nonexistent
		policy_file = $CONF/$1-policy.yaml
		[keystone_authtoken]
		www_authenticate_uri = $KEYSTONE
		$(account "$1")
		service_token_roles = service
		service_token_roles_required = true
	E
}
account() {
	cat <<-E
		auth_url = $KEYSTONE
		auth_type = password
		username = $1
		password = $PASSWORD
		project_name = service
		user_domain_name = Default
		project_domain_name = Default
	E
}
write_config() {
	cat >"$CONF/keystone.conf" <<-E
		[database]
		connection = $(database keystone)
		[token]
		provider = fernet
		[fernet_tokens]
		key_repository = $DIR/keystone/fernet
		[fernet_receipts]
		key_repository = $DIR/keystone/fernet
		[credential]
		key_repository = $DIR/keystone/credential
		[cache]
		enabled = true
		backend = dogpile.cache.memory
		[identity]
		password_hash_rounds = 4
	E
	cp "$here/policy.yaml" "$CONF/neutron-policy.yaml"
	cp "$here/octavia-policy.yaml" "$CONF/octavia-policy.yaml"
	: >"$CONF/cinder-policy.yaml"
	{
		common_config neutron
		cat <<-E
			[DEFAULT]
			auth_strategy = keystone
			api_paste_config = /usr/share/neutron-common/api-paste.ini
			bind_host = 0.0.0.0
			bind_port = 9696
			api_workers = 1
			rpc_workers = 1
			rpc_state_report_workers = 0
			core_plugin = ml2
			service_plugins = router
			dhcp_agents_per_network = 1
			agent_down_time = 45
			notify_nova_on_port_status_changes = false
			notify_nova_on_port_data_changes = false
			interface_driver = linuxbridge
			enable_isolated_metadata = false
			enable_metadata_proxy = false
			[quotas]
			quota_network = 100
			quota_subnet = 100
			quota_port = 1000
			quota_router = 50
			quota_floatingip = 50
			quota_security_group = 100
			quota_security_group_rule = 1000
			[agent]
			root_helper =
			report_interval = 5
			[experimental]
			linuxbridge = true
			[ml2]
			type_drivers = flat,vxlan
			tenant_network_types = vxlan
			mechanism_drivers = linuxbridge,l2population
			extension_drivers = port_security
			[ml2_type_flat]
			flat_networks = public
			[ml2_type_vxlan]
			vni_ranges = 1:1000
			[securitygroup]
			firewall_driver = iptables
			enable_ipset = true
		E
	} >"$CONF/neutron.conf"
	write_agent_config "$NS" $UNDERLAY "bridge_mappings = public:br-ext"
	{
		common_config cinder
		cat <<-E
			[DEFAULT]
			auth_strategy = keystone
			api_paste_config = /usr/share/cinder-common/api-paste.ini
			osapi_volume_workers = 1
			enabled_backends = $VOLUME
			default_volume_type = $VOLUME
			glance_api_servers = http://127.0.0.1:9292
			[privsep_osbrick]
			helper_command = privsep-helper --config-file $CONF/cinder.conf
			[cinder_sys_admin]
			helper_command = privsep-helper --config-file $CONF/cinder.conf
			[rbd]
			volume_backend_name = rbd
			volume_driver = cinder.volume.drivers.rbd.RBDDriver
			rbd_cluster_name = ceph
			rbd_ceph_conf = $CEPH/ceph.conf
			rbd_pool = volumes
			rbd_user = cinder
			[file]
			volume_backend_name = file
			volume_driver = cinder.volume.drivers.nfs.NfsDriver
			nfs_shares_config = $CONF/nfs_shares
			nfs_mount_point_base = $DIR/cinder/mnt
			nas_secure_file_operations = false
			nas_secure_file_permissions = false
			nfs_snapshot_support = true
		E
	} >"$CONF/cinder.conf"
	echo "127.0.0.1:/h8s" >"$CONF/nfs_shares"
	{
		common_config octavia
		cat <<-E
			[api_settings]
			enabled_provider_drivers = amphora:Octavia with drivers that do nothing
			default_provider_driver = amphora
			[oslo_messaging]
			topic = octavia_prov
			[service_auth]
			$(account octavia)
			[health_manager]
			heartbeat_key = insecure
			[controller_worker]
			amphora_driver = amphora_noop_driver
			compute_driver = compute_noop_driver
			network_driver = network_noop_driver
			volume_driver = volume_noop_driver
			image_driver = image_noop_driver
			loadbalancer_topology = SINGLE
			client_ca = $DIR/octavia/ca.pem
			[certificates]
			ca_certificate = $DIR/octavia/ca.pem
			ca_private_key = $DIR/octavia/ca.key
			ca_private_key_passphrase = insecure
			server_certs_key_passphrase = insecure-key-do-not-use-this-key
		E
	} >"$CONF/octavia.conf"
	cat >"$CONF/rabbitmq.conf" <<-E
		listeners.tcp.1 = 127.0.0.1:5672
		listeners.tcp.2 = $UNDERLAY:5672
		loopback_users = none
		disk_free_limit.absolute = 50MB
	E
	mkdir -p "$CEPH"
	[ "$VOLUME" != rbd ] || cat >"$CEPH/ceph.conf" <<-E
		[global]
		fsid = $(cat "$CEPH/fsid" 2>/dev/null || tee "$CEPH/fsid" </proc/sys/kernel/random/uuid)
		mon host = $UNDERLAY
		public network = ${UNDERLAY%.*}.0/24
		run dir = $CEPH/run
		admin socket = $CEPH/run/\$name.asok
		log file = $LOG/\$type.\$id.ceph.log
		mon cluster log file = $LOG/ceph.log
		keyring = $CEPH/keyring
		mon data = $CEPH/mon
		mgr data = $CEPH/mgr
		osd data = $CEPH/osd
		mon allow pool size one = true
		mon allow pool delete = true
		mon warn on pool no redundancy = false
		auth allow insecure global id reclaim = false
		mon data avail warn = 2
		mon data avail crit = 1
		osd pool default size = 1
		osd pool default min size = 1
		osd pool default pg autoscale mode = off
		osd crush chooseleaf type = 0
		osd objectstore = bluestore
		bluestore block size = $((8 << 30))
		bluestore cache autotune = false
		bluestore cache size = 67108864
		osd op num shards = 2
		ms async op threads = 2
		[client.cinder]
		keyring = $CEPH/ceph.client.cinder.keyring
	E
	# For a cluster, what Cinder does not say of its storage: h8s up --cinder-config.
	case $VOLUME in
	file) echo "exports: {\"$(cat "$CONF/nfs_shares")\": \"$(share_mount)\"}" ;;
	rbd) echo "ceph: {conf: $CEPH/ceph.conf, keyrings: [$CEPH/ceph.client.cinder.keyring]}" ;;
	none) echo "{}" ;;
	esac >"$DIR/cinder.yaml"
}
write_agent_config() { # write_agent_config HOST ADDRESS [LINE of linux_bridge]
	mkdir -p "$DIR/neutron/$1"
	cat >"$CONF/agent-$1.conf" <<-E
		[DEFAULT]
		host = $1
		state_path = $DIR/neutron/$1
		[oslo_concurrency]
		lock_path = $DIR/neutron/$1/lock
		[linux_bridge]
		${3:-}
		[vxlan]
		local_ip = $2
		l2_population = true
		vxlan_group =
		[agent]
		polling_interval = 1
		[privsep]
		helper_command = env PATH=$DIR/bin:$PATH privsep-helper --config-file $CONF/neutron.conf --config-file $CONF/agent-$1.conf
	E
}

# --- first-run steps ---------------------------------------------------------------
sql() { mariadb --no-defaults -S "$DIR/mysql/sock" -u root -NBe "$1"; }
init_mariadb() {
	mariadb-install-db --no-defaults --datadir="$DIR/mysql/data" --user=root \
		--auth-root-authentication-method=normal --skip-test-db --skip-name-resolve
}
init_databases() {
	local d
	for d in keystone neutron cinder octavia; do sql "CREATE DATABASE IF NOT EXISTS $d CHARACTER SET utf8"; done
}
init_keystone() {
	local manage=(keystone-manage --config-file "$CONF/keystone.conf") as=(--keystone-user root --keystone-group root)
	mkdir -p "$DIR"/keystone/{fernet,credential}
	"${manage[@]}" db_sync
	"${manage[@]}" fernet_setup "${as[@]}"
	"${manage[@]}" credential_setup "${as[@]}"
	"${manage[@]}" bootstrap --bootstrap-password "$PASSWORD" --bootstrap-region-id RegionOne \
		--bootstrap-{admin,internal,public}-url="$KEYSTONE"
}
init_neutron() {
	mkdir -p "$DIR/neutron/lock"
	neutron-db-manage --config-file "$CONF/neutron.conf" upgrade heads
}
init_cinder() {
	mkdir -p "$DIR/cinder/lock"
	cinder-manage --config-file "$CONF/cinder.conf" db sync
}
init_octavia() {
	mkdir -p "$DIR/octavia/lock"
	openssl req -x509 -newkey rsa:2048 -keyout "$DIR/octavia/ca.key" -out "$DIR/octavia/ca.pem" \
		-days 3650 -subj /CN=octavia -passout pass:insecure
	octavia-db-manage --config-file "$CONF/octavia.conf" upgrade head
}
seed() { local step=$1; shift; api_side /usr/bin/python3 "$here/seed.py" "$step" "$PASSWORD" "$@"; }
init_accounts() { seed accounts; }
init_network() { seed network; }
init_volume_type() { seed volume-type "$VOLUME"; }
ceph_() { api_side timeout 300 ceph -c "$CEPH/ceph.conf" "$@"; }
init_ceph_mon() { # all keys go into the monitor's first keyring: no later "ceph auth" calls
	local a=ceph-authtool m=$CEPH/mon.keyring
	rm -rf "$CEPH"/{mon,mgr,osd}; mkdir -p "$CEPH"/{mon,mgr,osd,run}
	$a -C "$m" -n mon. --gen-key --cap mon 'allow *'
	$a "$m" -n client.admin --gen-key --cap mon 'allow *' --cap osd 'allow *' --cap mds 'allow *' --cap mgr 'allow *'
	$a "$m" -n mgr.x --gen-key --cap mon 'allow profile mgr' --cap osd 'allow *' --cap mds 'allow *'
	$a "$m" -n client.cinder --gen-key --cap mon 'profile rbd' --cap osd 'profile rbd' --cap mgr 'profile rbd'
	$a -C "$CEPH/keyring" --import-keyring "$m"
	$a -C "$CEPH/ceph.client.cinder.keyring" --mode 0600 -n client.cinder -a "$($a "$m" -n client.cinder -p)"
	monmaptool --create --clobber --fsid "$(cat "$CEPH/fsid")" --addv a "[v2:$UNDERLAY:3300,v1:$UNDERLAY:6789]" "$CEPH/monmap"
	api_side ceph-mon -c "$CEPH/ceph.conf" -i a --mkfs --monmap "$CEPH/monmap" --keyring "$m"
}
init_ceph_osd() {
	local id key; id=$(cat /proc/sys/kernel/random/uuid); key=$(ceph-authtool --gen-print-key)
	echo "{\"cephx_secret\":\"$key\"}" >"$CEPH/osd.json"
	[ "$(ceph_ osd new "$id" -i "$CEPH/osd.json")" = 0 ]
	api_side ceph-osd -c "$CEPH/ceph.conf" -i 0 --mkfs --key "$key" --osd-uuid "$id"
	printf '[osd.0]\n\tkey = %s\n' "$key" >"$CEPH/osd/keyring"
}
init_ceph_pool() {
	ceph_ osd pool create volumes 8 8
	ceph_ osd pool application enable volumes rbd
}

# --- services --------------------------------------------------------------------
services() { # in the order of their start, agents of hosts apart
	echo mariadb rabbitmq
	[ "$VOLUME" != rbd ] || echo ceph-mon ceph-mgr ceph-osd
	echo keystone neutron-server "agent-$NS" dhcp-agent l3-agent
	[ "$VOLUME" = none ] || echo cinder-api cinder-scheduler cinder-volume
	[ "$OCTAVIA" != 1 ] || echo octavia-api octavia-worker
}
launch() { # launch SERVICE: start it unless it runs
	local name=$1 config=(--config-file "$CONF/neutron.conf")
	case $name in
	mariadb) # commits reach the kernel: a killed server loses nothing
		start "$name" "hold-$NS" mariadbd --no-defaults --user=root --datadir="$DIR/mysql/data" --socket="$DIR/mysql/sock" \
			--pid-file="$DIR/mysql/pid" --skip-networking --innodb-buffer-pool-size=64M --performance-schema=OFF \
			--innodb-flush-log-at-trx-commit=2 --innodb-log-file-size=16M --max-connections=400 ;;
	rabbitmq)
		start "$name" "hold-$NS" env HOME="$DIR/rabbitmq" RABBITMQ_NODENAME=h8s-os@localhost RABBITMQ_CONFIG_FILE="$CONF/rabbitmq.conf" \
			RABBITMQ_MNESIA_BASE="$DIR/rabbitmq/db" RABBITMQ_LOG_BASE="$LOG" RABBITMQ_ENABLED_PLUGINS_FILE="$DIR/rabbitmq/plugins" \
			RABBITMQ_PID_FILE="$DIR/rabbitmq/pid" ERL_EPMD_ADDRESS=127.0.0.1 \
			RABBITMQ_SERVER_START_ARGS='-kernel inet_dist_use_interface {127,0,0,1}' \
			RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS='+S 2:2 +sbwt none +sbwtdcpu none +sbwtdio none' /usr/lib/rabbitmq/bin/rabbitmq-server ;;
	keystone) wsgi keystone 5000 /usr/bin/keystone-wsgi-public ;;
	neutron-server) start "$name" "hold-$NS" neutron-server "${config[@]}" ;;
	agent-*) own_ebtables; start "$name" "hold-${name#agent-}" neutron-linuxbridge-agent "${config[@]}" --config-file "$CONF/$name.conf" ;;
	dhcp-agent | l3-agent) start "$name" "hold-$NS" "neutron-$name" "${config[@]}" --config-file "$CONF/agent-$NS.conf" ;;
	cinder-api) wsgi cinder 8776 /usr/bin/cinder-wsgi ;;
	cinder-scheduler) start "$name" "hold-$NS" cinder-scheduler --config-file "$CONF/cinder.conf" ;;
	cinder-volume) file_share; start "$name" "hold-$NS" env PATH="$DIR/bin:$PATH" cinder-volume --config-file "$CONF/cinder.conf" ;;
	octavia-api) wsgi octavia 9876 /usr/bin/octavia-wsgi ;;
	octavia-worker) start "$name" "hold-$NS" octavia-worker --config-file "$CONF/octavia.conf" ;;
	ceph-mon) start "$name" "hold-$NS" ceph-mon -f -c "$CEPH/ceph.conf" -i a ;;
	ceph-mgr) start "$name" "hold-$NS" ceph-mgr -f -c "$CEPH/ceph.conf" -i x ;;
	ceph-osd) start "$name" "hold-$NS" ceph-osd -f -c "$CEPH/ceph.conf" -i 0 --keyring "$CEPH/osd/keyring" ;;
	*) die "no service called $name (openstack.sh says which there are)" ;;
	esac
}
# Debian 12's ebtables cannot delete a rule with --among-src by what it says, and the agent,
# which does that whenever a port changes, tries again for ever: here it goes by number.
# The agent's privsep-helper finds it first.
own_ebtables() {
	mkdir -p "$DIR/bin"
	script "$DIR/bin/ebtables" <<'END'
#!/bin/sh
real=/usr/sbin/ebtables table=filter
case " $* " in *" -D "*" --among-src "*) ;; *) exec $real "$@" ;; esac
while [ $# -gt 0 ]; do
	case $1 in
	-t) table=$2; shift 2 ;;
	-D) chain=$2; shift 2; break ;;
	*) shift ;;
	esac
done
number=$($real -t "$table" --concurrent -L "$chain" --Ln | awk -v rule="$*" '
	{ n = $1; sub(/^[0-9]+[. ]+/, ""); sub(/ +$/, ""); if ($0 == rule) { print n + 0; exit } }')
[ -z "$number" ] || exec $real -t "$table" --concurrent -D "$chain" "$number"
END
}
wsgi() { # wsgi SERVICE PORT SCRIPT: an API under uwsgi
	local name=$1-api; [ "$1" != keystone ] || name=keystone
	# uwsgi closes every connection; without the header, Go's client uses one again and gets a reset.
	start "$name" "hold-$NS" env OS_KEYSTONE_CONFIG_FILES="$CONF/keystone.conf" uwsgi_python3 \
		--http-socket "127.0.0.1:$2" --http-socket "$UNDERLAY:$2" \
		--wsgi-file "$3" --pyargv "--config-file $CONF/$1.conf" --processes 1 --threads 8 --enable-threads \
		--master --lazy-apps --need-app --die-on-term --buffer-size 65535 --add-header 'Connection: close' --procname-prefix "h8s-os-$name "
}
share_mount() { echo "$DIR/cinder/mnt/$(printf %s "$(cat "$CONF/nfs_shares")" | md5sum | cut -d' ' -f1)"; } # as its driver has it
file_share() { # volumes are plain files: the NFS driver finds its share mounted already
	[ "$VOLUME" = file ] || return 0
	mkdir -p "$DIR/bin" # it insists on a mount.nfs
	script "$DIR/bin/mount.nfs" <<<$'#!/bin/sh\nexit 0'
	local m; m=$(share_mount)
	mkdir -p "$m"
	api_side mountpoint -q "$m" || api_side mount --bind "$m" "$m"
}
works() { # works SERVICE: does it do its work?
	local name=$1
	case $name in
	mariadb) sql 'SELECT 1' ;;
	rabbitmq) api_side bash -c "</dev/tcp/$UNDERLAY/5672" ;;
	keystone) TOKEN=''; api GET "$KEYSTONE/users?name=admin" ;;
	neutron-server) api GET "$NEUTRON/v2.0/networks?fields=id&limit=1" ;;
	agent-*) reports neutron-linuxbridge-agent "${name#agent-}" ;;
	dhcp-agent | l3-agent) reports "neutron-$name" "$NS" ;;
	cinder-api) api GET "$CINDER/v3/$(admin_project)/volumes?limit=1" ;;
	cinder-scheduler | cinder-volume)
		api GET "$CINDER/v3/$(admin_project)/os-services?binary=$name" |
			jq -e --arg since "$(tr ' ' T <"$DIR/tmp/started-$name")" '.services[0] | .state == "up" and (.backend_state // "up") == "up" and .updated_at > $since' ;;
	octavia-api) api GET "$OCTAVIA_URL/v2.0/lbaas/loadbalancers?limit=1" ;;
	ceph-*) ceph_ -s -f json | jq -e '.pgmap.num_pgs > 0 and ([.pgmap.pgs_by_state[] | select(.state_name != "active+clean")] | length) == 0' ;;
	*) running "$name" ;;
	esac
}
# reports BINARY HOST: has the agent reported since it was started last?
reports() {
	local since; since=$(cat "$DIR/tmp/started-agent-$2" 2>/dev/null || true)
	case $1 in neutron-dhcp-agent | neutron-l3-agent) since=$(cat "$DIR/tmp/started-${1#neutron-}") ;; esac
	api GET "$NEUTRON/v2.0/agents?binary=$1&host=$2" |
		jq -e --arg since "$since" '.agents[0] | .alive and .heartbeat_timestamp > $since'
}
api() { # api METHOD URL [JSON]: call an API as admin; the answer's body on stdout
	[ -n "${TOKEN:-}" ] || TOKEN=$(token) || return 1
	[ "$TOKEN" != none ] || return 1
	api_side curl -sS --max-time "${patience:-60}" --fail-with-body -X "$1" "$2" -H "X-Auth-Token: $TOKEN" \
		-H 'Content-Type: application/json' -H 'OpenStack-API-Version: volume 3.54' ${3:+-d "$3"}
}
token() {
	api_side curl -sS --max-time "${patience:-60}" -o /dev/null -D- "$KEYSTONE/auth/tokens" -H 'Content-Type: application/json' -d "$(jq -nc --arg w "$PASSWORD" \
		'{auth: {identity: {methods: ["password"], password: {user: {name: "admin", domain: {id: "default"}, password: $w}}}, scope: {project: {name: "admin", domain: {id: "default"}}}}}')" |
		tr -d '\r' | awk 'tolower($1) == "x-subject-token:" {print $2}' | grep .
}
admin_project() { api GET "$KEYSTONE/projects?name=admin&domain_id=default" | jq -re '.projects[0].id'; }

# --- hosts -----------------------------------------------------------------------
agent_up() { # agent_up NAME NETNS UNDERLAY_IP
	local name=$1 path=$2 ip=$3 p link
	[[ $name =~ ^[A-Za-z0-9][A-Za-z0-9.-]{0,62}$ && $name != "$NS" ]] || die "host name \"$name\": letters, digits, dots and dashes, not $NS"
	[[ $ip =~ ^${UNDERLAY%.*}\.([0-9]{1,3})$ && ${BASH_REMATCH[1]} -ge 2 && ${BASH_REMATCH[1]} -le 254 ]] ||
		die "address \"$ip\": must be ${UNDERLAY%.*}.2 to ${UNDERLAY%.*}.254"
	[[ $path == */* ]] || path=/run/netns/$path
	[ -e "$path" ] || die "network namespace \"$2\": $path does not exist"
	running "hold-$NS" || die "OpenStack is not up (openstack.sh up)"
	if grep -lx ".* $ip" "$DIR"/agents/* 2>/dev/null | grep -qvx "$DIR/agents/$name"; then
		die "address $ip is another host's: $(grep -lx ".* $ip" "$DIR"/agents/*)"
	fi
	p=$(pid_of "hold-$name") && [ "$(stat -Lc %i "/proc/$p/ns/net")" != "$(stat -Lc %i "$path")" ] &&
		{ say "$name is another namespace now"; agent_down "$name"; }
	mkdir -p "$DIR/agents"
	echo "$path $ip" >"$DIR/agents/$name"
	holder "hold-$name" "$path"
	link=ul$(printf %s "$name" | md5sum | cut -c1-8)
	in_netns "$name" ip link show h8s-os >/dev/null 2>&1 ||
		api_side ip link add "$link" type veth peer name h8s-os netns "$(pid_of "hold-$name")"
	api_side ip link set "$link" master underlay up
	in_netns "$name" ip addr replace "$ip/24" dev h8s-os
	in_netns "$name" ip link set h8s-os up
	write_agent_config "$name" "$ip"
	launch "agent-$name"
}
in_netns() { local h=hold-$1; shift; inside "$h" "$@"; }
agent_down() { # agent_down NAME
	local name=$1 id table
	[ -e "$DIR/agents/$name" ] || return 0
	drop "agent-$name"
	if running "hold-$name"; then
		for link in $(in_netns "$name" ip -o link show | sed -nE 's/^[0-9]+: (brq[^:@]*|vxlan-[0-9]+|h8s-os)[:@].*/\1/p'); do
			in_netns "$name" ip link del "$link" 2>/dev/null || true # vxlan goes with its bridge
		done
		for table in iptables ip6tables; do sweep "$name" $table raw; sweep "$name" $table filter; done
		for table in filter nat; do in_netns "$name" ebtables -t $table -L 2>/dev/null | grep -q neutron && sweep_ebtables "$name" $table; done
		for id in $(in_netns "$name" ipset list -n 2>/dev/null | grep -E '^N?IPv[46]'); do in_netns "$name" ipset destroy "$id" || true; done
		drop "hold-$name"
	fi
	rm -f "$DIR/agents/$name" "$CONF/agent-$name.conf" "$DIR/tmp/started-agent-$name"
	rm -rf "$DIR/neutron/${name:?}"
	# Without its record, Neutron refuses to bind ports there at once.
	if running neutron-server && running keystone; then
		for id in $(api GET "$NEUTRON/v2.0/agents?host=$name" 2>/dev/null | jq -r '.agents[]?.id'); do
			api DELETE "$NEUTRON/v2.0/agents/$id" >/dev/null || true
		done
	fi
	say "host $name is gone"
}
sweep() { # sweep HOST COMMAND TABLE: delete the agent's chains and the rules that lead to them
	local rules; rules=$(in_netns "$1" "$2" -t "$3" -S 2>/dev/null | grep neutron-) || return 0
	{
		echo "*$3"
		sed -nE '/^-A neutron-/!s/^-A /-D /p' <<<"$rules"
		sed -nE 's/^-N (neutron-.*)/-F \1/p' <<<"$rules"
		sed -nE 's/^-N (neutron-.*)/-X \1/p' <<<"$rules"
		echo COMMIT
	} | in_netns "$1" "$2-restore" --noflush || say "rules of Neutron stay in $1 ($2, table $3)"
}
sweep_ebtables() { # sweep_ebtables HOST TABLE: it is nobody else's in a node's namespace
	{ in_netns "$1" ebtables -t "$2" -F && in_netns "$1" ebtables -t "$2" -X; } || say "rules of Neutron stay in $1 (ebtables, table $2)"
}

# --- up, down ----------------------------------------------------------------------
up_ceph() {
	local s
	once init_ceph_mon
	launch ceph-mon
	once init_ceph_osd
	for s in ceph-mgr ceph-osd; do launch $s; done
	once init_ceph_pool
	wait_for 300 ceph works ceph-osd
}
up() {
	local n jobs=() job s types=(network) TOKEN='' f
	case $VOLUME in file | rbd | none) ;; *) die "H8S_OS_VOLUME=$VOLUME: must be file, rbd or none" ;; esac
	case $OCTAVIA in 0 | 1) ;; *) die "H8S_OS_OCTAVIA=$OCTAVIA: must be 0 or 1" ;; esac
	[[ $NODES =~ ^[0-8]$ ]] || die "H8S_OS_NODES=$NODES: must be 0 to 8"
	mkdir -p "$DIR"/{run,log,etc,done,tmp,keystone,agents} "$CEPH/run" "$DIR"/{mysql,rabbitmq}
	chmod 700 "$DIR"/{mysql,rabbitmq}
	install
	mkdir -p "$CG"
	printf '%s=%s\n' H8S_OS_NODES "$NODES" H8S_OS_VOLUME "$VOLUME" H8S_OS_OCTAVIA "$OCTAVIA" H8S_OS_PASSWORD "$PASSWORD" H8S_OS_NETNS "$NS" >"$DIR/settings"
	write_config
	for f in "$DIR"/run/*; do # what died is forgotten, and a host whose namespace went with it
		s=${f##*/}
		[ ! -e "$f" ] || running "$s" || rm -f "$f"
	done
	up_namespaces
	for s in $(hosts); do running "hold-${s#agent-}" || agent_down "${s#agent-}"; done
	once init_mariadb
	for s in mariadb rabbitmq; do launch $s; done
	[ "$VOLUME" != rbd ] || { up_ceph & jobs+=($!); }
	wait_for 180 mariadb works mariadb
	once init_databases
	once init_neutron & jobs+=($!)
	[ "$VOLUME" = none ] || { once init_cinder & jobs+=($!); }
	[ "$OCTAVIA" != 1 ] || { once init_octavia & jobs+=($!); }
	once init_keystone
	launch keystone
	wait_for 300 keystone works keystone
	once init_accounts
	[ "$VOLUME" = none ] || types+=(volumev3 block-storage)
	[ "$OCTAVIA" != 1 ] || types+=(load-balancer)
	seed catalogue "${types[@]}"
	for s in $(VOLUME=rbd OCTAVIA=1 services); do # what an earlier "up" had and this one has not
		[[ " $(services | xargs) " == *" $s "* ]] || drop "$s"
	done
	(umask 077; seed clouds >"$DIR/clouds.yaml")
	for job in "${jobs[@]}"; do wait "$job" || die "a parallel step failed"; done
	wait_for 300 rabbitmq works rabbitmq
	for s in $(services); do case $s in agent-* | *-agent) ;; *) launch "$s" ;; esac; done
	wait_for 300 neutron-server works neutron-server
	once init_network
	for s in "agent-$NS" dhcp-agent l3-agent; do launch "$s"; done
	for s in $(hosts); do launch "$s"; done
	for ((n = 1; n <= NODES; n++)); do
		namespace "$NS-node$n"
		agent_up "$NS-node$n" "$NS-node$n" "${UNDERLAY%.*}.1$n"
	done
	[ "$VOLUME" = none ] || { wait_for 300 cinder-api works cinder-api; once init_volume_type; }
	for s in $(services) $(hosts); do wait_for 300 "$s" works "$s"; done
	echo "/run/netns/$NS" >"$DIR/netns"
	say "up: clouds in $DIR/clouds.yaml, namespace $NS"
}
hosts() { local f; for f in "$DIR"/agents/*; do [ ! -e "$f" ] || echo "agent-${f##*/}"; done; }
down() {
	local f s name order=()
	[ -d "$DIR/run" ] || return 0
	rm -f "$DIR/netns"
	for f in "$DIR"/agents/*; do [ ! -e "$f" ] || agent_down "${f##*/}"; done
	for s in $(VOLUME=rbd OCTAVIA=1 services); do
		case $s in mariadb | rabbitmq | ceph-*) ;; *) order=("$s" "${order[@]}") ;; esac
	done
	drop "${order[@]}"
	stop ceph-osd ceph-mgr
	stop ceph-mon rabbitmq mariadb
	drop "hold-$NS"
	for f in "$CG"/*/; do name=$(basename "$f"); [ ! -d "$f" ] || kill_group "$name"; done
	for name in /run/netns/$NS /run/netns/$NS-outside /run/netns/"$NS"-node*; do
		[ ! -e "$name" ] || ip netns del "${name##*/}"
	done
	rm -f "$DIR"/run/*
	rmdir "$CG" 2>/dev/null || true
	say "down"
}
purge() {
	down
	rm -rf "${DIR:?}"/{run,log,etc,done,tmp,bin,agents,keystone,neutron,cinder,octavia,ceph,mysql,rabbitmq,clouds.yaml,cinder.yaml,settings,lock}
	rmdir "$DIR" 2>/dev/null || true
}
status() {
	local name p bad=0 state patience=5 TOKEN=''
	[ -e "$DIR/netns" ] || { echo "not up"; return 1; }
	for name in $(services) $(hosts); do
		state=works
		if ! p=$(pid_of "$name"); then state=dead
		elif grep -qs 'frozen 1' "$CG/$name/cgroup.events"; then state=frozen
		elif ! works "$name" >/dev/null 2>&1; then state='no answer'
		fi
		[ "$state" = works ] || bad=1
		[[ $name != keystone || $state = works ]] || TOKEN=none # let nobody else wait for one
		printf '%-22s %-9s pid %-7s rss %5d MiB\n' "$name" "$state" "${p:--}" "$(memory "$name")"
	done
	return $bad
}
memory() { # memory SERVICE: resident, of all its processes, in MiB
	local pids; pids=$(paste -sd, "$CG/$1/cgroup.procs" 2>/dev/null) || true
	{ [ -z "$pids" ] || ps -o rss= -p "$pids"; } | awk '{s += $1} END {print int(s / 1024)}'
}
env_of() { # env_of CLOUD: what the openstack client wants
	[ -e "$DIR/clouds.yaml" ] || die "OpenStack has not been up (openstack.sh up)"
	grep -qx "  $1:" "$DIR/clouds.yaml" || die "no cloud called $1; there are: $(sed -nE 's/^  ([^ ]+):$/\1/p' "$DIR/clouds.yaml" | xargs)"
	echo "export OS_CLIENT_CONFIG_FILE=$DIR/clouds.yaml OS_CLOUD=$1 H8S_OPENSTACK=$DIR"
}

cmd=${1:-}
shift || true
case $cmd in
up | down | purge | install | agent-up | agent-down | kill | start | freeze | thaw)
	[ "$(id -u)" = 0 ] || die "run this as root: it makes namespaces"
	CG=$(cgroups)
	lock ;;
status | exec) CG=$(cgroups) ;;
esac
known() { [[ -n ${1:-} && -d $CG/$1 ]] || die "no service called \"${1:-}\" runs; there are: $(cd "$CG" 2>/dev/null && echo */)"; }
case $cmd in
up | down | purge | install | status) $cmd ;;
env) env_of "${1:-admin}" ;;
exec) [ $# -gt 0 ] || die "exec what?"; OS_CLIENT_CONFIG_FILE=${OS_CLIENT_CONFIG_FILE:-$DIR/clouds.yaml} api_side "$@" ;;
agent-up)
	[ $# = 3 ] || die "agent-up NAME NETNS UNDERLAY_IP"
	agent_up "$@"
	wait_for 300 "agent-$1" works "agent-$1" ;;
agent-down) [ $# = 1 ] || die "agent-down NAME"; agent_down "$1" ;;
kill) known "${1:-}"; drop "$1"; say "killed: $1" ;;
start) [ $# = 1 ] || die "start SERVICE"; launch "$1"; wait_for 300 "$1" works "$1" ;;
freeze) known "${1:-}"; echo 1 >"$CG/$1/cgroup.freeze"; say "frozen: $1" ;;
thaw) known "${1:-}"; echo 0 >"$CG/$1/cgroup.freeze"; say "thawed: $1" ;;
*) sed -n '2,/^set /{/^set /d; s/^# \{0,1\}//p}' "${BASH_SOURCE[0]}"; exit 2 ;;
esac
