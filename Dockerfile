# Only the binary, on Debian. The image contains no PostgreSQL: set DATABASE_URL.

FROM rust:1-slim-bookworm AS build
RUN apt-get update && apt-get install -y --no-install-recommends make && rm -rf /var/lib/apt/lists/*
WORKDIR /build
# as in .cargo/config.toml
ENV SQLX_OFFLINE=true JEMALLOC_SYS_WITH_MALLOC_CONF=dirty_decay_ms:1000,muzzy_decay_ms:0

# Dependencies change seldom. Compiled with empty sources, they are a layer that stays cached. The tests stay empty, and the
# benchmark harness is left out.
COPY Cargo.toml Cargo.lock ./
RUN mkdir -p src tests/it \
    && echo 'fn main() {}' > src/main.rs \
    && touch src/lib.rs tests/it/main.rs \
    && cargo build --release --locked --bin webhook-processor \
    && rm -r src

COPY . .
# Cargo compares modification times, and those of a checkout may be older than those of the empty sources.
RUN touch src/lib.rs src/main.rs \
    && cargo build --release --locked --bin webhook-processor

FROM debian:bookworm-slim
# TLS to receivers needs the certificates of the authorities.
RUN apt-get update \
    && apt-get install -y --no-install-recommends ca-certificates \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --system --uid 10001 --no-create-home --home-dir /nonexistent --shell /usr/sbin/nologin webhook
COPY --from=build /build/target/release/webhook-processor /usr/local/bin/webhook-processor

USER 10001:10001
ENV LISTEN_ADDR=0.0.0.0:8080
EXPOSE 8080
HEALTHCHECK --interval=10s --timeout=5s --start-period=30s --retries=3 CMD ["webhook-processor", "health"]
ENTRYPOINT ["webhook-processor"]
CMD ["serve"]
