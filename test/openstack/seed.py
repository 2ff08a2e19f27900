#!/usr/bin/python3
"""What the tests' OpenStack holds once it runs: domains, projects, users, the catalogue,
the external network. Every step may be repeated. Run by openstack.sh, in its namespace.

    seed.py clouds PASSWORD        print clouds.yaml
    seed.py accounts PASSWORD      domains, projects, roles, users, groups, the catalogue
    seed.py catalogue PASSWORD TYPE...   exactly the services that run
    seed.py network PASSWORD       the external network
    seed.py volume-type PASSWORD NAME
"""
import sys

UNDERLAY = "10.250.0.1"  # an address that nodes reach, too; 127.0.0.1 is as good in here
KEYSTONE = f"http://{UNDERLAY}:5000/v3"
NEUTRON = f"http://{UNDERLAY}:9696"
CINDER = f"http://{UNDERLAY}:8776/v3"
OCTAVIA = f"http://{UNDERLAY}:9876"

CATALOGUE = [
    ("network", "neutron", NEUTRON),
    ("volumev3", "cinderv3", CINDER + "/%(project_id)s"),
    ("block-storage", "cinder", CINDER + "/%(project_id)s"),
    ("load-balancer", "octavia", OCTAVIA),
]

# Roles that keystone-manage bootstrap does not make, and what implies them: manager is
# as later releases of Keystone have it.
ROLES = ["manager", "service", "h8s-network", "system:masters"]
IMPLIED = [("admin", "manager"), ("manager", "member")]

DOMAINS = ["Default", "other"]
PROJECTS = [("Default", p) for p in ("service", "alpha", "beta")] + [("other", p) for p in ("alpha", "beta")]

# (domain, user): [(project, role)], projects of the user's own domain.
USERS = {
    # The services' own.
    ("Default", "neutron"): [("service", "admin"), ("service", "service")],
    ("Default", "cinder"): [("service", "admin"), ("service", "service")],
    ("Default", "octavia"): [("service", "admin"), ("service", "service")],
    # h8s-controller: the full profile, the least one, and who may only check tokens.
    ("Default", "service"): [("service", "admin"), ("service", "service")],
    ("Default", "h8s-network"): [("alpha", "h8s-network"), ("beta", "h8s-network")],
    ("Default", "h8s-webhook"): [("service", "service")],
    # People.
    ("Default", "alice"): [("alpha", "member")],
    ("Default", "bob"): [("beta", "member")],
    ("Default", "carol"): [("alpha", "member"), ("beta", "reader")],
    ("Default", "alpha-reader"): [("alpha", "reader")],
    ("Default", "alpha-manager"): [("alpha", "manager")],
    ("Default", "alpha-admin"): [("alpha", "admin")],
    ("Default", "beta-reader"): [("beta", "reader")],
    ("Default", "beta-manager"): [("beta", "manager")],
    ("Default", "beta-admin"): [("beta", "admin")],
    # The same names, in another domain, with the same passwords.
    ("other", "alice"): [("alpha", "member")],
    ("other", "bob"): [("beta", "member")],
    # Names that mean something to Kubernetes and must mean nothing here.
    ("Default", "mallory"): [("beta", "member"), ("beta", "system:masters")],
    ("Default", "system:admin"): [("beta", "member")],
}
GROUPS = {
    "system:masters": ["mallory"],
    "h8s:tenant:alpha:admin": ["mallory"],
}

# name in clouds.yaml: (domain, user, project); without a project the token is unscoped.
CLOUDS = {
    "admin": ("Default", "admin", "admin"),
    "service": ("Default", "service", "service"),
    "webhook": ("Default", "h8s-webhook", "service"),
    "least": ("Default", "h8s-network", None),
    "least-alpha": ("Default", "h8s-network", "alpha"),
    "least-beta": ("Default", "h8s-network", "beta"),
    "alpha": ("Default", "alice", "alpha"),
    "beta": ("Default", "bob", "beta"),
    "carol-alpha": ("Default", "carol", "alpha"),
    "carol-beta": ("Default", "carol", "beta"),
    "mallory": ("Default", "mallory", "beta"),
    "system-admin": ("Default", "system:admin", "beta"),
    "other-alpha": ("other", "alice", "alpha"),
    "other-beta": ("other", "bob", "beta"),
}
for _project in ("alpha", "beta"):
    for _role in ("reader", "manager", "admin"):
        CLOUDS[f"{_project}-{_role}"] = ("Default", f"{_project}-{_role}", _project)


def clouds(password):
    print("clouds:")
    for name, (domain, user, project) in CLOUDS.items():
        print(f"  {name}:\n    region_name: RegionOne\n    identity_api_version: 3\n    auth:")
        print(f"      auth_url: {KEYSTONE}\n      username: \"{user}\"\n      password: \"{password}\"")
        print(f"      user_domain_name: {domain}")
        if project:
            print(f"      project_name: {project}\n      project_domain_name: {domain}")


class Admin:
    """The APIs, as the administrator that bootstrap made."""

    def __init__(self, password):
        import requests

        self.http = requests.Session()
        default = {"id": "default"}
        answer = self.call("POST", KEYSTONE + "/auth/tokens", {"auth": {
            "identity": {"methods": ["password"], "password": {
                "user": {"name": "admin", "domain": default, "password": password}}},
            "scope": {"project": {"name": "admin", "domain": default}}}})
        self.http.headers["X-Auth-Token"] = answer.headers["X-Subject-Token"]
        self.project = answer.json()["token"]["project"]["id"]

    def call(self, method, url, body=None, **query):
        answer = self.http.request(method, url, json=body, params=query, timeout=120)
        if not answer.ok:
            raise SystemExit(f"{method} {answer.url}: {answer.status_code}: {answer.text}")
        return answer

    def find(self, url, kind, **query):
        found = self.call("GET", f"{url}/{kind}s", **query).json()[kind + "s"]
        return found[0]["id"] if found else None

    def ensure(self, url, kind, body, *by):
        """The id of the object of that kind that has body's values of the keys in by."""
        return self.find(url, kind, **{k: body[k] for k in by or ["name"]}) or \
            self.call("POST", f"{url}/{kind}s", {kind: body}).json()[kind]["id"]


def accounts(password):
    admin = Admin(password)
    for name in ROLES:
        admin.ensure(KEYSTONE, "role", {"name": name})
    roles = {r["name"]: r["id"] for r in admin.call("GET", KEYSTONE + "/roles").json()["roles"]}
    for prior, implied in IMPLIED:
        admin.call("PUT", f"{KEYSTONE}/roles/{roles[prior]}/implies/{roles[implied]}")
    domains = {name: admin.ensure(KEYSTONE, "domain", {"name": name}) for name in DOMAINS}
    projects = {
        (domain, name): admin.ensure(KEYSTONE, "project", {"name": name, "domain_id": domains[domain]}, "name", "domain_id")
        for domain, name in PROJECTS
    }
    users = {}
    for (domain, name), grants in USERS.items():
        user = admin.ensure(KEYSTONE, "user", {"name": name, "domain_id": domains[domain], "password": password}, "name", "domain_id")
        users[domain, name] = user
        for project, role in grants:
            admin.call("PUT", f"{KEYSTONE}/projects/{projects[domain, project]}/users/{user}/roles/{roles[role]}")
    for name, members in GROUPS.items():
        group = admin.ensure(KEYSTONE, "group", {"name": name, "domain_id": domains["Default"]}, "name", "domain_id")
        for member in members:
            admin.call("PUT", f"{KEYSTONE}/groups/{group}/users/{users['Default', member]}")


def catalogue(password, *types):
    """The catalogue names exactly the services that run."""
    admin = Admin(password)
    for kind, name, url in CATALOGUE:
        if kind not in types:
            service = admin.find(KEYSTONE, "service", name=name, type=kind)
            if service:
                admin.call("DELETE", f"{KEYSTONE}/services/{service}")
            continue
        service = admin.ensure(KEYSTONE, "service", {"name": name, "type": kind}, "name", "type")
        for interface in ("public", "internal", "admin"):
            admin.ensure(KEYSTONE, "endpoint", {
                "service_id": service, "interface": interface, "region_id": "RegionOne", "url": url,
            }, "service_id", "interface")


def network(password):
    admin = Admin(password)
    public = admin.ensure(NEUTRON + "/v2.0", "network", {
        "name": "public", "router:external": True,
        "provider:network_type": "flat", "provider:physical_network": "public"})
    admin.ensure(NEUTRON + "/v2.0", "subnet", {
        "network_id": public, "name": "public", "ip_version": 4, "enable_dhcp": False,
        "cidr": "172.24.4.0/24", "gateway_ip": "172.24.4.1",
        "allocation_pools": [{"start": "172.24.4.10", "end": "172.24.4.200"}]}, "network_id", "name")


def volume_type(password, name):
    admin = Admin(password)
    types = f"{CINDER}/{admin.project}/types"
    if name not in [t["name"] for t in admin.call("GET", types).json()["volume_types"]]:
        admin.call("POST", types, {"volume_type": {"name": name, "extra_specs": {"volume_backend_name": name}}})


if __name__ == "__main__":
    steps = {"clouds": clouds, "accounts": accounts, "catalogue": catalogue, "network": network, "volume-type": volume_type}
    if len(sys.argv) < 3 or sys.argv[1] not in steps:
        sys.exit(__doc__)
    steps[sys.argv[1]](*sys.argv[2:])
