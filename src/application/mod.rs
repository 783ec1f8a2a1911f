//! What the service does, one file a use case, and the ports that it needs for it.
//!
//! Of tokio only its channels, clocks and tasks are used here; databases and networks are behind [`ports`].

pub mod batching;
pub mod circuits;
pub mod deliver;
pub mod directory;
pub mod enqueue;
pub mod floors;
pub mod manage_deliveries;
pub mod manage_endpoints;
pub mod ports;
pub mod reservations;
pub mod shares;
pub mod slots;
pub mod upkeep;
pub mod wakeup;
pub mod worker_pool;
