//! Direct connections to a database, beside the pools.

use std::time::Duration;

use futures_util::future::BoxFuture;
use sqlx::postgres::PgConnectOptions;
use sqlx::{ConnectOptions as _, Connection as _, PgConnection};
use tokio::time::timeout;

use super::trouble::{Place, Trouble};

/// How long it may take to connect, or to read the version of the schema.
const ANSWER_LIMIT: Duration = Duration::from_secs(5);

/// A direct connection to a database, made when it is needed.
#[derive(Debug, Clone)]
pub(super) struct Access {
    options: PgConnectOptions,
    pub(super) place: Place,
}

impl Access {
    /// `options` is the value of the setting with the name `setting`.
    pub(super) fn new(options: PgConnectOptions, setting: &'static str) -> Self {
        let place = Place::of(&options, setting);
        Self { options, place }
    }

    /// Connects and closes the connection again, to find out whether that works.
    pub(super) async fn try_to_connect(&self) -> Result<(), Trouble> {
        self.run(|_| Box::pin(async { Ok(()) })).await
    }

    /// Explains an error from this connection.
    pub(super) fn trouble(&self, error: &sqlx::Error) -> Trouble {
        Trouble::of(error, &self.place)
    }

    /// Does something short on a new connection.
    pub(super) async fn run<T>(
        &self,
        work: impl for<'c> FnOnce(&'c mut PgConnection) -> BoxFuture<'c, sqlx::Result<T>>,
    ) -> Result<T, Trouble> {
        let mut connection = self.connect().await?;
        let done = self.answer(work(&mut connection)).await;
        let _ = connection.close().await;
        done
    }

    /// A new connection.
    pub(super) async fn connect(&self) -> Result<PgConnection, Trouble> {
        self.answer(self.options.connect()).await
    }

    async fn answer<T>(&self, work: impl Future<Output = sqlx::Result<T>>) -> Result<T, Trouble> {
        match timeout(ANSWER_LIMIT, work).await {
            Ok(result) => result.map_err(|error| Trouble::of(&error, &self.place)),
            Err(_) => Err(Trouble::silence(&self.place)),
        }
    }
}
