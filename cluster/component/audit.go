package component

// auditPolicy records who did what, never bodies (they hold Secrets). Reads by the
// control plane itself and leases are noise and are left out.
const auditPolicy = `apiVersion: audit.k8s.io/v1
kind: Policy
omitStages: [RequestReceived]
rules:
  - level: None
    nonResourceURLs: ["/healthz*", "/livez*", "/readyz*", "/metrics", "/openapi/*", "/version"]
  - level: None
    resources:
      - group: coordination.k8s.io
        resources: [leases]
      - group: ""
        resources: [events]
      - group: events.k8s.io
        resources: [events]
  - level: None
    userGroups: ["system:nodes", "system:serviceaccounts:kube-system", "h8s:controllers", "h8s:kubestacks", "h8s:csi-nodes", "h8s:csi-controllers", "h8s:csi-sidecars"]
    verbs: [get, list, watch]
  - level: None
    users: ["system:kube-controller-manager", "system:kube-scheduler", "system:kube-proxy", "system:apiserver"]
    verbs: [get, list, watch]
  - level: Metadata
`

// Encryption renders the API server's encryption-at-rest configuration for a
// base64 key of 32 bytes.
func Encryption(key string) string {
	return render(doc{
		"apiVersion": "apiserver.config.k8s.io/v1",
		"kind":       "EncryptionConfiguration",
		"resources": []doc{{
			"resources": []string{"secrets"},
			"providers": []doc{
				{"secretbox": doc{"keys": []doc{{"name": "key1", "secret": key}}}},
				{"identity": doc{}},
			},
		}},
	})
}
