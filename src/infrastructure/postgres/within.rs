//! Statements within a time limit, on connections that are never given back busy.

use std::ops::{Deref, DerefMut};
use std::time::Duration;

use sqlx::pool::PoolConnection;
use sqlx::{PgConnection, Postgres};

use super::REQUEST_LIMIT;

/// How long a list, a count, or upkeep may take.
pub(super) const SCAN_LIMIT: Duration = Duration::from_secs(30);

/// Begins the transaction of a list or a count. The server ends it if its caller has gone. The limit is set only for the
/// transaction, because a pooler gives the session to others afterwards.
pub(super) const BEGIN_SCAN: &str = "begin; set local statement_timeout = '35s'";

/// Runs statements on a connection of a pool within a time limit. If they did not end, because time ran out or the caller has
/// gone, the connection is still busy. It is then closed instead of given back.
macro_rules! within {
    ($pool:expr, $limit:expr, |$connection:ident| $work:expr) => {
        match $pool.acquire().await {
            Err(error) => Err($crate::infrastructure::postgres::errors::not_asked(error)),
            Ok(connection) => {
                let mut $connection =
                    $crate::infrastructure::postgres::within::Guarded { connection, finished: false };
                match tokio::time::timeout($limit, $work).await {
                    Ok(result) => {
                        // a session that may not write is of no use to anybody: a new one may
                        $connection.finished = !$pool.heed(result.as_ref().err());
                        result.map_err($crate::infrastructure::postgres::errors::store_error)
                    }
                    Err(_) => {
                        $pool.heed(Some(&sqlx::Error::PoolTimedOut));
                        Err($crate::infrastructure::postgres::errors::no_answer())
                    }
                }
            }
        }
    };
}
pub(super) use within;

/// Like [`within!`], for a list or a count: on the connections for requests, in a transaction that the server ends if the caller
/// has gone.
macro_rules! scan {
    ($database:expr, |$connection:ident| $work:expr) => {
        $crate::infrastructure::postgres::within::within!(
            $database.requests,
            $crate::infrastructure::postgres::within::SCAN_LIMIT,
            |connection| async {
                use sqlx::Connection as _;
                let mut transaction =
                    connection.begin_with($crate::infrastructure::postgres::within::BEGIN_SCAN).await?;
                let $connection = &mut *transaction;
                let result = $work.await?;
                transaction.commit().await?;
                Ok(result)
            }
        )
    };
}
pub(super) use scan;

/// A connection that goes back to its pool on drop if its statements came to their end, and is closed if not.
pub(super) struct Guarded {
    pub(super) connection: PoolConnection<Postgres>,
    pub(super) finished: bool,
}

impl Deref for Guarded {
    type Target = PgConnection;

    fn deref(&self) -> &PgConnection {
        &self.connection
    }
}

impl DerefMut for Guarded {
    fn deref_mut(&mut self) -> &mut PgConnection {
        &mut self.connection
    }
}

impl Drop for Guarded {
    fn drop(&mut self) {
        if self.finished {
            // Before the driver takes a connection back, it waits for a sign of life. If the network is gone, that takes as long
            // as the operating system tries, and the connection would count as used meanwhile.
            tokio::spawn(tokio::time::timeout(REQUEST_LIMIT, self.connection.return_to_pool()));
        } else {
            self.connection.close_on_drop();
        }
    }
}
