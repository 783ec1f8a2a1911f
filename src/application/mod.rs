//! What the service does: one file per use case, the [workers] that deliver, and the ports that they need.
//!
//! This layer uses only the channels, clocks and tasks of tokio. Databases and networks are behind [`ports`].

pub mod access;
pub mod backoff;
pub mod batching;
pub mod circuits;
pub mod deliver;
pub mod directory;
pub mod duties;
pub mod enqueue;
pub mod manage_deliveries;
pub mod manage_endpoints;
pub mod ports;
mod settling;
mod storing;
pub mod wakeup;
pub mod workers;
