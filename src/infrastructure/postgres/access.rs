//! Direct connections to a database, beside the pools.

use std::time::Duration;

use futures_util::future::BoxFuture;
use sqlx::{Connection as _, PgConnection};
use tokio::time::timeout;

use super::primary::Way;
use super::trouble::{Place, Trouble};

/// How long it may take to read the version of the schema.
const ANSWER_LIMIT: Duration = Duration::from_secs(5);

/// A direct connection to a database, made when it is needed.
#[derive(Debug, Clone)]
pub(super) struct Access {
    way: Way,
}

impl Access {
    pub(super) fn new(way: Way) -> Self {
        Self { way }
    }

    /// The way that connections take.
    pub(super) fn way(&self) -> &Way {
        &self.way
    }

    /// Connects and closes the connection again, to find out whether that works.
    pub(super) async fn try_to_connect(&self) -> Result<(), Trouble> {
        self.run(|_| Box::pin(async { Ok(()) })).await
    }

    /// Explains an error from this connection.
    pub(super) fn trouble(&self, error: &sqlx::Error) -> Trouble {
        Trouble::of(error, self.way.place())
    }

    /// Does something short on a new connection.
    pub(super) async fn run<T>(
        &self,
        work: impl for<'c> FnOnce(&'c mut PgConnection) -> BoxFuture<'c, sqlx::Result<T>>,
    ) -> Result<T, Trouble> {
        let (mut connection, place) = self.way.connect().await?;
        let done = answer(place, work(&mut connection)).await;
        let _ = connection.close().await;
        done
    }
}

/// Waits for what a connection to `place` does, as long as something short may take.
pub(super) async fn answer<T>(
    place: &Place,
    work: impl Future<Output = sqlx::Result<T>>,
) -> Result<T, Trouble> {
    match timeout(ANSWER_LIMIT, work).await {
        Ok(result) => result.map_err(|error| Trouble::of(&error, place)),
        Err(_) => Err(Trouble::silence(place)),
    }
}
