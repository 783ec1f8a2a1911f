//! `webhook-processor`: a webhook engine on PostgreSQL.
//!
//! The cast: an [event](domain::event) is a fact. An [endpoint](domain::endpoint), called *config* in the API, is where
//! facts go. A [delivery](domain::delivery) is one event owed to one endpoint, a row of `webhook_queue`. An
//! [attempt](domain::attempt) is one HTTP request of a delivery. Workers take [leases](domain::delivery::Lease) on
//! deliveries in batches, make the attempts, and settle them in batches.
//!
//! There are three layers, and dependencies point inward: [`infrastructure`] knows [`application`], which knows [`domain`]. The
//! API and the command line share the [`contract`].
//! To read the code, begin with [`domain::delivery`], [`domain::retry`], [`application::enqueue`],
//! [`application::deliver`] and [`application::workers`], then `schema/functions/webhook_claim.sql`.

pub mod application;
pub mod cli;
pub mod contract;
pub mod domain;
pub mod infrastructure;
