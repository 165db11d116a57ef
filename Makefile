# The commands of this project. CI runs `.ci/run`, which uses these.

TARGET := $(or $(CARGO_TARGET_DIR),target)
FERRY := $(abspath $(TARGET))/release/ferry
SKIPS := $(abspath $(TARGET))/skipped-tests

.PHONY: build demo test test-kvm test-linux bench lint fmt clean

build: ## the ferry program
	@tests/install-deps.sh build
	cargo build --release --package vmm

demo: build ## a guest moves while it writes its memory, then checks itself
	@cargo build --quiet --package ferry-tests --bin demo
	@FERRY_BIN=$(FERRY) $(TARGET)/debug/demo

test: build ## every test; skips what this host cannot run, and says so
	tests/install-deps.sh test
	@rm -f $(SKIPS)
	@FERRY_BIN=$(FERRY) FERRY_SKIP_FILE=$(SKIPS) cargo test --workspace --no-fail-fast; \
	result=$$?; \
	if [ -s $(SKIPS) ]; then \
		echo; echo "$$(wc -l < $(SKIPS)) TESTS WERE SKIPPED:"; cat $(SKIPS); \
	else echo; echo "no test was skipped"; fi; \
	exit $$result

test-kvm: export FERRY_REQUIRE_KVM = 1
test-kvm: test ## the same, but a test that cannot run fails

test-linux: build ## those of them in which stock Linux is the guest, with what they say
	tests/install-deps.sh linux
	FERRY_BIN=$(FERRY) FERRY_REQUIRE_KVM=1 cargo test --package ferry-tests --test linux -- --nocapture

bench: build ## Ferry and QEMU side by side; BENCH="--row gap --runs 3" for a part
	tests/install-deps.sh bench
	cargo build --release --package migration --example codec
	cargo build --release --package devices --example bitmaps
	cargo build --package ferry-tests --bin bench
	FERRY_BIN=$(FERRY) QEMU_NEWER=$${QEMU_NEWER:-target/qemu-newer} $(TARGET)/debug/bench $(BENCH)

lint:
	cargo fmt --all --check
	cargo clippy --workspace --all-targets -- -D warnings

fmt:
	cargo fmt --all

clean:
	cargo clean
