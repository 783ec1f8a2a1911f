//! Behaviour, tested through the front door: a real PostgreSQL, a database a test, and real receivers.

mod access;
mod audit;
mod cli;
mod database_tls;
mod delivery;
mod documents;
mod durability;
mod embedded_postgres;
mod enqueue;
mod failover;
mod faults;
mod hostile;
mod isolation;
mod lease_machine;
mod leases;
mod least_privilege;
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
