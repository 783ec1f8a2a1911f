//! The contract with the outside: the shapes that go out and come in as JSON, made from domain values and turned into them. The
//! API and the command line share them; how a shape travels is not known here.

pub mod configs;
pub mod deliveries;
pub mod events;
pub mod json;
pub mod keys;
pub(crate) mod schemas;
pub mod statistics;

use serde::Serialize;
use utoipa::ToSchema;

/// A page of a list.
#[derive(Debug, Serialize, ToSchema)]
pub struct Page<T> {
    /// The items.
    pub items: Vec<T>,
    /// Hand this in as `cursor` for the next page; `null`: this was the last.
    pub next_cursor: Option<String>,
}

impl<T> Page<T> {
    /// A page of at most `limit` items; if it is full, the last of them names the next one.
    pub fn new<Item: Into<T>>(items: Vec<Item>, limit: usize, cursor: impl FnOnce(&Item) -> String) -> Self {
        let next_cursor = items.get(limit - 1).map(cursor);
        Self { items: items.into_iter().map(Into::into).collect(), next_cursor }
    }
}
