# kiln. `make help` lists the targets.
SHELL := /bin/bash
.DELETE_ON_ERROR:

TARGET ?= $(CURDIR)/target
KILN   := $(TARGET)/release/kiln
GUEST  := $(TARGET)/guest/x86_64-unknown-linux-gnu/guest/kiln-guest

.PHONY: help
help: ## Show this help
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 16

.PHONY: setup
setup: ## Install system packages and build kiln and its guest
	@scripts/bootstrap.sh
	@$(MAKE) --no-print-directory build

.PHONY: build
build: guest ## Build kiln and its guest
	cargo build --release --locked -p kiln-cli

.PHONY: guest
guest: ## Build the static guest
	RUSTFLAGS="-C target-feature=+crt-static" cargo build --locked --profile guest -p kiln-guest \
	  --target x86_64-unknown-linux-gnu --target-dir $(TARGET)/guest

.PHONY: demo
demo: setup ## Do everything: set up, build two apps in microVMs, run them, change one line, rebuild; learn and enforce a policy
	cargo xtask demo --kiln $(KILN) --guest $(GUEST)

.PHONY: test
test: ## Set up, then run every check and test
	@scripts/bootstrap.sh --test
	@$(MAKE) --no-print-directory guest
	cargo xtask test --guest $(GUEST)

.PHONY: test-hostile
test-hostile: ## Tests with a hostile guest, user or file, in their long form
	@scripts/bootstrap.sh --test
	@$(MAKE) --no-print-directory guest
	cargo xtask hostile --guest $(GUEST)

.PHONY: soak
soak: build ## The long versions of the fault tests: more schedules, seeds, followers and killed builds, about an hour
	KILN_SIM_SCHEDULES=200000 cargo test --locked -p kiln-controller --test it fleet_lease_sim -- --nocapture
	set -e; for seed in $$(seq 1 20); do \
	  KILN_FAULT_SEED=$$seed cargo test --locked -p kiln-controller --test it fleet_faults -- --nocapture; done
	KILN_RACES=10000 cargo test --locked -p kiln-db --test it races -- --nocapture
	KILN_FOLLOWERS=5000 cargo test --locked -p kiln-controller --test it fleet_followers -- --nocapture
	KILN_HOME=$(TARGET)/test-home $(KILN) setup --recipe machine-image --guest $(GUEST)
	KILN_TEST_BIN=$(KILN) KILN_TEST_HOME=$(TARGET)/test-home KILN_KILL_BUILDS=10 KILN_TEST_LONG=1 \
	  cargo test --locked -p kiln-cli --test it -- fleet_kill flood_of_log signals_from_outside runs_that_are_stopped --nocapture
	KILN_HOME=$(TARGET)/test-home $(KILN) bench soak --soak 600

.PHONY: bench
bench: setup ## Measure what PROMISES.md promises
	$(KILN) setup --recipe machine-image --guest $(GUEST)
	$(KILN) bench --recipe machine-image --guest $(GUEST)

.PHONY: uninstall
uninstall: ## Remove what kiln keeps on this machine and the build output (system packages stay)
	@if [ -x $(KILN) ]; then $(KILN) uninstall --yes; fi
	@if [ -s $(TARGET)/installed-packages ]; then \
	  echo "Packages that set-up installed stay. To remove them too (as root):"; \
	  echo "  apt-get purge --autoremove $$(sort -u $(TARGET)/installed-packages | tr '\n' ' ')"; fi
	rm -rf $(TARGET)
