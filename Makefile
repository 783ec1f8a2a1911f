# `make help` lists what there is to do. RELEASE=1 builds with optimisations: slower to build, several times faster.

BASE_URL ?= http://127.0.0.1:8080
N ?= 20

export BASE_URL

ifdef RELEASE
profile := --release
endif

# What is deployed; `cargo build` alone builds the benchmark harness, too.
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

# Receivers on this machine are allowed for local trials, unless EGRESS_ALLOW says otherwise, here or in .env.
.PHONY: run
run: prerequisites ## run the API and the workers (RELEASE=1 for speed); without DATABASE_URL on a private PostgreSQL
	@if [ -z "$${EGRESS_ALLOW+set}" ] && ! grep -Eqs '^[[:space:]]*(export[[:space:]]+)?EGRESS_ALLOW=' .env; then \
		export EGRESS_ALLOW=127.0.0.0/8,::1/128; \
	fi; \
	exec cargo run --locked $(profile) -- serve

.PHONY: test
test: prerequisites ## run all tests, on a private PostgreSQL of their own (PG=15, 16, 17 or 18 chooses its version)
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
openapi: prerequisites ## write docs/openapi.json anew after a change of the API
	WRITE_OPENAPI=1 cargo test --locked --quiet --test it the_openapi_document_is_committed

.PHONY: check-scripts
check-scripts: ## check the shell scripts
	scripts/check-scripts

.PHONY: check-dependencies
check-dependencies: prerequisites ## check licences, banned crates and sources of all dependencies
	scripts/check-dependencies

.PHONY: chaos
chaos: prerequisites ## cut, kill, stall and restart everything while events come in (SEEDS="1 2", or MINUTES=60 of random ones)
	$(if $(SEEDS),SEEDS="$(SEEDS)") $(if $(MINUTES),MINUTES=$(MINUTES)) cargo test --locked $(profile) --test chaos

# The harness is a program of its own, which starts the one that it measures from beside itself.
bench := $(or $(CARGO_TARGET_DIR),target)/release/webhook-processor-bench

.PHONY: bench-build
bench-build: prerequisites
	cargo build --locked --release --bins

.PHONY: bench
bench: bench-build ## measure this machine and write docs/benchmarks.md (20 minutes)
	$(bench) --write .

.PHONY: bench-peers
bench-peers: bench-build ## the same for other queues, side by side with ours
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

# Connects without a request, which the receiver would count.
receiver_listens := { curl -s --max-time 1 telnet://127.0.0.1:9000 </dev/null >/dev/null; [ $$? -ne 7 ]; }

.PHONY: create-sample-webhooks
create-sample-webhooks: prerequisites ## send N=20 webhooks to a running server, with a receiver for their duration
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
docker-down: ## stop the containers; the data stays in its volume
	docker compose down

.PHONY: docker-logs
docker-logs: ## follow the logs of the containers
	docker compose logs --follow
