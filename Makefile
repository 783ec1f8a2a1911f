# `make help` lists the targets. RELEASE=1 builds with optimisations: the build is slower, the program several times faster.

BASE_URL ?= http://127.0.0.1:8080
N ?= 20

export BASE_URL

ifdef RELEASE
profile := --release
endif

# The program that is deployed. `cargo build` alone also builds the benchmark harness.
program := --bin webhook-processor

.DEFAULT_GOAL := help

.PHONY: help
help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  %-24s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

.PHONY: prerequisites
prerequisites:
	@scripts/install-prerequisites

.PHONY: deps
deps: prerequisites ## fetch all dependencies
	cargo fetch --locked

.PHONY: build
build: prerequisites ## build the program (RELEASE=1 for speed)
	cargo build --locked $(program) $(profile)

.PHONY: dev-setup
dev-setup: prerequisites deps ## prepare a clone: .env, dependencies, a migrated database
	[ -e .env ] || cp .env.example .env
	cargo run --locked $(profile) -- migrate

# For local trials, receivers on this machine are allowed, unless EGRESS_ALLOW is set, in the environment or in .env.
.PHONY: run
run: prerequisites ## run the API and the workers (RELEASE=1 for speed); if DATABASE_URL is unset, with a private PostgreSQL
	@if [ -z "$${EGRESS_ALLOW+set}" ] && ! grep -Eqs '^[[:space:]]*(export[[:space:]]+)?EGRESS_ALLOW=' .env; then \
		export EGRESS_ALLOW=127.0.0.0/8,::1/128; \
	fi; \
	exec cargo run --locked $(profile) -- serve

.PHONY: test
test: prerequisites ## run all tests, with a private PostgreSQL of their own (PG=15, 16, 17 or 18 chooses its version)
	@bin=$(if $(PG),$$(scripts/install-postgres $(PG)),$${PG_BINDIR:-}) || exit 1; \
	[ -z "$$bin" ] || export PG_BINDIR="$$bin"; \
	exec cargo test --locked $(profile)

.PHONY: test-coverage
test-coverage: prerequisites ## run all tests, and report the lines that they reach as HTML (TESTS=--lib for the unit tests)
	scripts/test-coverage $(TESTS)

.PHONY: check
check: prerequisites check-scripts check-dependencies ## check formatting, lints, documentation, scripts, dependencies, .sqlx and schema/
	cargo fmt --check
	cargo clippy --locked --all-targets -- -D warnings
	RUSTDOCFLAGS=-Dwarnings cargo doc --locked --no-deps
	scripts/prepare-queries --check

.PHONY: check-documents
check-documents: prerequisites ## check /openapi.json and /metrics of a running program
	scripts/check-documents

.PHONY: openapi
openapi: prerequisites ## regenerate docs/openapi.json after a change of the API
	WRITE_OPENAPI=1 cargo test --locked --quiet --test it the_openapi_document_is_committed

.PHONY: check-scripts
check-scripts: ## check the shell scripts
	scripts/check-scripts

.PHONY: check-dependencies
check-dependencies: prerequisites ## check licences, banned crates and sources of all dependencies
	scripts/check-dependencies

.PHONY: chaos
chaos: prerequisites ## cut, kill, stall and restart everything while events arrive (SEEDS="1 2", or MINUTES=60 of random ones)
	$(if $(SEEDS),SEEDS="$(SEEDS)") $(if $(MINUTES),MINUTES=$(MINUTES)) cargo test --locked $(profile) --test chaos

# The harness is a separate program. It starts the program that it measures, which lies in the same directory.
bench := $(or $(CARGO_TARGET_DIR),target)/release/webhook-processor-bench

.PHONY: bench-build
bench-build: prerequisites
	cargo build --locked --release --bins

.PHONY: bench
bench: bench-build ## measure this machine and write docs/benchmarks.md (20 minutes)
	$(bench) --write .

.PHONY: bench-peers
bench-peers: bench-build ## measure other queues side by side with ours
	scripts/install-bench-prerequisites
	$(bench) --only peers --write . \
		--peer 'graphile-worker=bench/peers/run graphile-worker' \
		--peer 'bullmq=bench/peers/run bullmq' \
		--peer 'pg-boss=bench/peers/run pg-boss'

.PHONY: migrate
migrate: prerequisites ## bring the database up to date
	cargo run --locked $(profile) -- migrate

.PHONY: prepare
prepare: prerequisites ## regenerate .sqlx and schema/ after a change of a query or a migration
	scripts/prepare-queries

# Connects without sending a request, because the receiver counts requests.
receiver_listens := { curl -s --max-time 1 telnet://127.0.0.1:9000 </dev/null >/dev/null; [ $$? -ne 7 ]; }

.PHONY: create-sample-webhooks
create-sample-webhooks: prerequisites ## enqueue N=20 events at a running server, and start a receiver for them if none runs
	@receiver=; \
	if ! $(receiver_listens); then \
		cargo build --locked --quiet $(program) $(profile) || exit 1; \
		cargo run --locked --quiet $(profile) -- receiver --port 9000 & receiver=$$!; \
		trap 'kill $$receiver 2>/dev/null' EXIT; \
		trap 'exit 130' INT; \
		trap 'exit 143' TERM; \
		until $(receiver_listens); do kill -0 $$receiver || exit 1; sleep 0.1; done; \
	fi; \
	scripts/create-sample-webhooks $(N)

.PHONY: get-stats
get-stats: ## show the statistics of a running server
	@stats=$$(curl -fsS $(BASE_URL)/webhooks/stats) || exit 1; \
	printf '%s\n' "$$stats" | \
		if command -v jq >/dev/null; then jq .; \
		elif command -v python3 >/dev/null; then python3 -m json.tool; \
		else cat; fi

.PHONY: docker-build
docker-build: ## build the image
	docker compose build

.PHONY: docker-up
docker-up: ## start PostgreSQL, the API on port 8080 and a worker in containers
	docker compose up --build --detach

.PHONY: docker-down
docker-down: ## stop the containers; the data is kept in its volume
	docker compose down

.PHONY: docker-logs
docker-logs: ## follow the logs of the containers
	docker compose logs --follow
