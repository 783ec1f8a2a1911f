//! Behaviour, tested through the front door: a real PostgreSQL, a database a test, and real receivers.

#![expect(clippy::too_many_lines, reason = "a story is told in one go")]

mod audit;
mod cli;
mod delivery;
mod documents;
mod embedded_postgres;
mod enqueue;
mod leases;
mod manage;
mod outage;
mod plans;
mod processes;
mod support;
mod upkeep;
