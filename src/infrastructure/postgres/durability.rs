//! Whether the database keeps what it acknowledges. Some of its settings trade that for speed.
//!
//! They are reported, not overruled: the strictness of a commit (`on`, `remote_apply`, …) is the operator's choice, a session
//! behind a pooler is not ours to set, and `fsync` belongs to the whole server.

use std::time::Duration;

use sqlx::FromRow;
use tokio::time::timeout;

use super::within::within;
use super::{Database, REQUEST_LIMIT};
use crate::application::ports::StoreError;

/// How long a start waits for the settings that it warns of.
const START_LIMIT: Duration = Duration::from_secs(5);

/// The settings of our sessions that decide it.
#[derive(Debug, FromRow)]
struct Durability {
    fsync: String,
    synchronous_commit: String,
    full_page_writes: String,
    standbys: String,
}

impl Durability {
    /// A sentence per setting by which something acknowledged may be lost.
    fn faults(&self) -> Vec<String> {
        let mut faults = Vec::new();
        if self.fsync == "off" {
            faults.push(
                "fsync is off: if the machine of the database crashes, the whole database may be damaged; \
                 set fsync = on in its configuration and reload it"
                    .to_owned(),
            );
        }
        if self.full_page_writes == "off" {
            faults.push(
                "full_page_writes is off: a page that was half written in a crash stays damaged, with the deliveries in it; \
                 set full_page_writes = on in the database's configuration and reload it"
                    .to_owned(),
            );
        }
        match self.synchronous_commit.as_str() {
            "off" => faults.push(
                "synchronous_commit is off: if the database crashes, it forgets events and outcomes that it acknowledged just \
                 before, and what was sent is sent again; set it on, for the server or by ALTER ROLE … SET synchronous_commit = on"
                    .to_owned(),
            ),
            "local" if !self.standbys.is_empty() => faults.push(
                "synchronous_commit is local although synchronous_standby_names is set: after a failover the standby may lack \
                 events and outcomes that were acknowledged; set it on, for the server or by ALTER ROLE … SET synchronous_commit = on"
                    .to_owned(),
            ),
            _ => {}
        }
        faults
    }
}

impl Database {
    /// A sentence for each setting by which the database may forget what it has acknowledged.
    pub async fn durability_faults(&self) -> Result<Vec<String>, StoreError> {
        let settings: Durability = within!(self.engine, REQUEST_LIMIT, |connection| {
            sqlx::query_as(
            "-- durability.settings
            select current_setting('fsync') as fsync, current_setting('synchronous_commit') as synchronous_commit,
                   current_setting('full_page_writes') as full_page_writes,
                   current_setting('synchronous_standby_names') as standbys"
        )
        .fetch_one(&mut *connection)
        })?;
        Ok(settings.faults())
    }

    /// Logs a warning for each of these settings, at start.
    pub async fn warn_of_durability_faults(&self) {
        match timeout(START_LIMIT, self.durability_faults()).await {
            Ok(Ok(faults)) => {
                for fault in faults {
                    tracing::warn!("the database does not keep all that it acknowledges: {fault}");
                }
            }
            Ok(Err(error)) => {
                tracing::warn!(%error, "the settings by which the database keeps what it acknowledges cannot be read");
            }
            Err(_) => {
                tracing::warn!(
                    "the settings by which the database keeps what it acknowledges cannot be read in time"
                );
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_setting_that_risks_something_acknowledged_has_a_sentence_and_no_other_has() {
        for (fsync, commit, pages, standbys, said) in [
            ("on", "on", "on", "", vec![]),
            ("on", "remote_apply", "on", "one", vec![]),
            ("on", "remote_write", "on", "one", vec![]),
            ("on", "local", "on", "", vec![]),
            ("on", "local", "on", "one", vec!["synchronous_commit is local"]),
            (
                "off",
                "off",
                "off",
                "",
                vec!["fsync is off", "full_page_writes is off", "synchronous_commit is off"],
            ),
        ] {
            let [fsync, synchronous_commit, full_page_writes, standbys] =
                [fsync, commit, pages, standbys].map(str::to_owned);
            let faults = Durability { fsync, synchronous_commit, full_page_writes, standbys }.faults();
            assert_eq!(faults.len(), said.len(), "{faults:?}");
            assert!(faults.iter().zip(said).all(|(fault, said)| fault.starts_with(said)), "{faults:?}");
        }
    }
}
