//! Behaviour, tested through the front door: a real PostgreSQL, a database a test, and real receivers.

mod access;
mod attempts;
mod audit;
mod cli;
mod delivery;
mod documents;
mod egress;
mod embedded_postgres;
mod enqueue;
mod faults;
mod hostile;
mod hostile_http2;
mod isolation;
mod lease_machine;
mod leases;
mod manage;
mod outage;
mod plans;
mod pooler;
mod processes;
mod reaching;
mod readiness;
mod schema;
mod support;
mod upkeep;
