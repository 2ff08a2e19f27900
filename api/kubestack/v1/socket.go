package kubestack

// Socket is where the node daemon serves the CNI plugin.
const Socket = "/run/kubestack/kubestack.sock"
