# Everything a developer runs. `make up` and `make test` need only Debian 12, the Go
# toolchain, git and make; the rest is installed, built and checked from here.

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
MAKEFLAGS += --no-print-directory

OUT := out
export H8S_OUT := $(CURDIR)/$(OUT)
GO ?= go
# The same flags for builds, tests and linters: nothing is compiled twice.
export GOFLAGS := -buildvcs=false -trimpath
export CGO_ENABLED := 0
BUILD := $(GO) build
VERSION := $(shell git describe --tags --always --dirty 2>/dev/null || echo unknown)
STRIP := -s -w
LDFLAGS := $(STRIP) -X github.com/hypernetes/hypernetes/cli.version=$(VERSION) \
	-X github.com/hypernetes/hypernetes/cli/hyperctl.stamped=$(VERSION) \
	-X main.version=$(VERSION)

# A module build of Kubernetes would call itself v0.0.0 and break API discovery.
KUBERNETES_VERSION := $(shell sed -n 's/^\tk8s.io\/kubernetes v\(.*\)/\1/p' dist/kubernetes/go.mod)
COREDNS_VERSION := $(shell sed -n 's/.*github.com\/coredns\/coredns v\(.*\)/\1/p' dist/coredns/go.mod | head -n1)
CONTAINERD_VERSION := $(shell sed -n 's/.*github.com\/containerd\/containerd\/v2 v\([^ ]*\).*/\1/p' dist/containerd/go.mod | head -n1)
KUBE_MAJOR := $(word 1,$(subst ., ,$(KUBERNETES_VERSION)))
KUBE_MINOR := $(word 2,$(subst ., ,$(KUBERNETES_VERSION)))
KUBE_X := $(foreach p,k8s.io/component-base/version k8s.io/client-go/pkg/version,\
	-X $(p).gitVersion=v$(KUBERNETES_VERSION)+h8s -X $(p).gitMajor=$(KUBE_MAJOR) \
	-X $(p).gitMinor=$(KUBE_MINOR) -X $(p).gitTreeState=clean -X $(p).gitCommit=unmodified)

# The Go toolchain names every module it downloads; one line a build is enough.
QUIET := 2> >(grep -v '^go: downloading' >&2 || true)

# The runtime's Debian packages.
PACKAGES := qemu-system-x86 crun runc erofs-utils e2fsprogs xfsprogs nftables iproute2 conntrack \
	kmod cpio xz-utils zstd binutils ca-certificates procps mount util-linux
TEST_PACKAGES := busybox cpio lz4
KERNEL_PACKAGES := gcc flex bison bc lz4 libelf-dev libc6-dev
CNI := ptp host-local portmap loopback bridge
OWN := h8s hyperctl containerd-shim-hyper-v2 h8s-controller kubestack h8s-csi
CSI := csi-provisioner csi-attacher csi-resizer csi-snapshotter snapshot-controller

.PHONY: help
help: ## Show this text
	@echo "Hypernetes: every Pod its own virtual machine. Two commands do everything:"
	@echo
	@echo "  make up      install what is needed, build, start a cluster, run the demo Pod"
	@echo "  make test    the same from scratch, checked: linters, unit tests, end-to-end tests"
	@echo
	@grep -hE '^[a-z0-9-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z0-9-]+):.*## /\1|/' | awk -F'|' '{ printf "  make %-14s %s\n", $$1, $$2 }'

.PHONY: up
up: build ## Install, build, start the cluster and run the demo Pod
	@scripts/up.sh

.PHONY: down
down: ## Stop the cluster, keeping its state
	@$(OUT)/bin/h8s down

.PHONY: reset
reset: ## Stop the cluster and remove everything it made
	@$(OUT)/bin/h8s reset --yes

.PHONY: deps
deps: ## Install the Debian packages that are missing
	@scripts/deps.sh $(PACKAGES)

.PHONY: build
build: deps upstream own guest images ## Build everything into out/

.PHONY: own
own: $(addprefix $(OUT)/bin/,$(OWN)) $(OUT)/cni/hypernetes ## Build this project's own programs

# Go decides what is up to date; the shim and the agent stay free of cgo, and the shim of
# the gRPC that containerd's API brings: one such process lives per Pod.
.PHONY: $(addprefix $(OUT)/bin/,$(OWN) hyperstart) $(OUT)/cni/hypernetes
$(addprefix $(OUT)/bin/,$(OWN)): $(OUT)/bin/%:
	@$(BUILD) $(if $(filter containerd-shim-%,$*),-tags no_grpc) -ldflags "$(LDFLAGS)" -o $@ ./cmd/$* $(QUIET)
$(OUT)/cni/hypernetes: # started twice per Pod
	@$(BUILD) -ldflags "$(LDFLAGS)" -o $@ ./cmd/hypernetes-cni $(QUIET)
$(OUT)/bin/hyperstart: $(OUT)/bin/%:
	@$(BUILD) -ldflags "$(STRIP) -X main.version=$(VERSION)" -o $@ ./cmd/$* $(QUIET)

.PHONY: upstream
upstream: $(OUT)/bin/kubernetes $(OUT)/bin/containerd $(OUT)/bin/containerd-shim-runc-v2 \
	$(OUT)/bin/coredns $(OUT)/libexec/mkfs.erofs $(addprefix $(OUT)/cni/,$(CNI)) \
	$(addprefix $(OUT)/bin/,$(CSI)) ## Build Kubernetes, etcd, containerd, CoreDNS, CNI plugins, CSI sidecars

$(OUT)/bin/kubernetes: dist/kubernetes/main.go dist/kubernetes/go.mod dist/kubernetes/go.sum
	@echo "building Kubernetes v$(KUBERNETES_VERSION) and etcd (about 5 minutes on 2 cores the first time)"
	@cd dist/kubernetes && $(BUILD) -ldflags "$(STRIP) $(KUBE_X)" -o $(CURDIR)/$@ . $(QUIET)

$(OUT)/bin/containerd: dist/containerd/main.go dist/containerd/go.mod dist/containerd/go.sum
	@echo "building containerd v$(CONTAINERD_VERSION)"
	@cd dist/containerd && $(BUILD) -tags no_zfs,no_btrfs,no_devmapper \
		-ldflags "$(STRIP) -X github.com/containerd/containerd/v2/version.Version=v$(CONTAINERD_VERSION)" -o $(CURDIR)/$@ . $(QUIET)

$(OUT)/bin/containerd-shim-runc-v2: dist/containerd/go.mod dist/containerd/go.sum
	@cd dist/containerd && $(BUILD) -ldflags "$(STRIP)" -o $(CURDIR)/$@ github.com/containerd/containerd/v2/cmd/containerd-shim-runc-v2 $(QUIET)

$(OUT)/libexec/mkfs.erofs: dist/containerd/mkfs.erofs/main.go dist/containerd/go.mod dist/containerd/go.sum
	@cd dist/containerd && $(BUILD) -ldflags "$(STRIP)" -o $(CURDIR)/$@ ./mkfs.erofs $(QUIET)

$(OUT)/bin/coredns: dist/coredns/main.go dist/coredns/go.mod dist/coredns/go.sum
	@echo "building CoreDNS v$(COREDNS_VERSION)"
	@cd dist/coredns && $(BUILD) -ldflags "$(STRIP)" -o $(CURDIR)/$@ . $(QUIET)

# After Kubernetes, whose packages they share, and all in one run of the compiler.
$(addprefix $(OUT)/bin/,$(CSI)) &: dist/csi/go.mod dist/csi/go.sum | $(OUT)/bin/kubernetes
	@echo "building the CSI sidecars"
	@cd dist/csi && $(BUILD) -ldflags "$(STRIP)" -o $(CURDIR)/$(OUT)/bin/ tool $(QUIET)

$(addprefix $(OUT)/cni/,$(CNI)): dist/containerd/go.mod dist/containerd/go.sum
	@cd dist/containerd && $(BUILD) -ldflags "$(STRIP)" -o $(CURDIR)/$(OUT)/cni/ \
		$$($(GO) list -f '{{.ImportPath}}' tool | grep '/$(@F)$$') $(QUIET)

.PHONY: guest
guest: $(OUT)/bin/hyperstart ## Build the guest's kernel, initramfs and scratch disk (H8S_KERNEL=stock|hyper|auto)
	@$(GO) run ./cmd/h8s-guest-image -out $(OUT)/share -init $(OUT)/bin/hyperstart

.PHONY: kernel
kernel: ## Compile HyperKernel (about 15 minutes on 2 cores) and make it the guest's kernel
	@scripts/deps.sh $(KERNEL_PACKAGES)
	@H8S_KERNEL=hyper $(MAKE) guest

.PHONY: images
images: own $(OUT)/bin/coredns ## Build the demo and test images from Debian packages
	@$(OUT)/bin/h8s image build all

.PHONY: generate
generate: ## Write generated code anew (needs protoc: protobuf-compiler, libprotobuf-dev)
	@scripts/generate.sh

.PHONY: test
test: check openstack-core ## check, and a tour of a real OpenStack, which is installed for it

.PHONY: check
check: build test-deps lint unit e2e ## Linters, unit tests, end-to-end tests on a cluster without a cloud

.PHONY: test-deps
test-deps:
	@scripts/deps.sh $(TEST_PACKAGES)

.PHONY: lint
lint: ## gofmt, go vet, staticcheck
	@scripts/lint.sh

.PHONY: unit
unit: ## Unit and integration tests of every package
	@scripts/gotest.sh standard-quiet -timeout 20m $$($(GO) list ./... | grep -v /test/e2e)
	@cd dist/containerd && $(GO) test ./mkfs.erofs ./pulls

.PHONY: e2e
e2e: ## End-to-end tests against a real cluster
	@scripts/e2e.sh

.PHONY: openstack-up
openstack-up: ## Start the OpenStack that tests run against (settings: run test/openstack/openstack.sh)
	@test/openstack/openstack.sh up

.PHONY: openstack-down
openstack-down: ## Stop it, keeping its data (all of it: test/openstack/openstack.sh purge)
	@test/openstack/openstack.sh down

.PHONY: openstack-core
openstack-core: ## Each kind of contact with an OpenStack once
	@scripts/openstack-test.sh core

.PHONY: openstack-test
openstack-test: ## All tests that need an OpenStack, on it (long)
	@scripts/openstack-test.sh

.PHONY: bench
bench: build test-deps ## Benchmarks; figures go to docs/performance.md
	@$(GO) test -count=1 -run '^$$' -bench . -timeout 60m ./test/bench/...
	@scripts/e2e.sh -run '^$$' -bench Attach -benchtime 5x ./test/e2e/volumes

.PHONY: clean
clean: ## Remove what was built (not the caches)
	@rm -rf $(OUT)
