//! The adapters: PostgreSQL, HTTP in both directions, settings, logs. Every import of sqlx, axum and hyper is here.

pub mod embedded_postgres;
// its texts become the OpenAPI document
#[warn(missing_docs)]
pub mod http;
pub mod logs;
pub mod metrics;
pub mod postgres;
pub(crate) mod process;
pub mod ready_database;
pub mod sender;
pub mod service;
pub mod settings;
pub mod shutdown;
