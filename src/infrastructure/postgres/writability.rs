//! Finds out whether the database accepts writes, by a small write. Reads would not show it: a full disk, a standby, and a
//! primary whose commits wait for a replica all answer them as usual.

use std::sync::atomic::{AtomicI32, Ordering};
use std::sync::{Arc, PoisonError};
use std::time::Duration;

use sqlx::Connection as _;
use tokio::sync::Mutex;
use tokio::task::JoinHandle;
use tokio::time::{Instant, timeout};

use super::access::Access;
use super::pool::Pool;
use super::within::Guarded;

/// How old the last result may be.
const HOLDS: Duration = Duration::from_secs(5);
/// How long a small commit may take.
const COMMIT_LIMIT: Duration = Duration::from_secs(2);
/// How long a write may hang before it is given up and another one begins.
const GIVE_UP_AFTER: Duration = Duration::from_secs(30);

#[derive(Debug)]
pub(super) struct Writability {
    engine: Pool,
    access: Access,
    /// When a write of the engine was last committed: then no check is needed.
    written_at: std::sync::Mutex<Option<Instant>>,
    checks: Mutex<Checks>,
}

#[derive(Debug, Default)]
struct Checks {
    last: Option<(Instant, Result<(), String>)>,
    /// At most one check at a time, because a check that hangs occupies a connection.
    under_way: Option<Check>,
}

#[derive(Debug)]
struct Check {
    begun: Instant,
    /// The process id of the session that writes; 0 until it is known.
    session: Arc<AtomicI32>,
    outcome: JoinHandle<Result<(), String>>,
}

impl Writability {
    pub(super) fn new(engine: Pool, access: Access) -> Arc<Self> {
        Arc::new(Self { engine, access, written_at: std::sync::Mutex::default(), checks: Mutex::default() })
    }

    /// Notes that the engine committed a write.
    pub(super) fn note_write(&self) {
        *self.written_at.lock().unwrap_or_else(PoisonError::into_inner) = Some(Instant::now());
    }

    /// The result of a check that is at most a few seconds old, or that the engine has written since. The error is a sentence.
    pub(super) async fn recent(&self) -> Result<(), String> {
        let written_at = *self.written_at.lock().unwrap_or_else(PoisonError::into_inner);
        if written_at.is_some_and(|at| at.elapsed() < HOLDS) {
            return Ok(());
        }
        self.checked().await
    }

    /// The same, but a write of the engine is not enough: it may have found room where others find none.
    pub(super) async fn checked(&self) -> Result<(), String> {
        let mut checks = self.checks.lock().await;
        let Checks { under_way, last } = &mut *checks;
        if let (None, Some((at, outcome))) = (&under_way, &last)
            && at.elapsed() < HOLDS
        {
            return outcome.clone();
        }
        // the check stays in its place while a caller waits for it, so it goes on if the caller leaves
        let check = under_way.get_or_insert_with(|| self.begin());
        let rest = COMMIT_LIMIT.saturating_sub(check.begun.elapsed());
        if let Ok(outcome) = timeout(rest, &mut check.outcome).await {
            let outcome = outcome.unwrap_or_else(|_| Err("the check was interrupted".to_owned()));
            *under_way = None;
            *last = Some((Instant::now(), outcome.clone()));
            return outcome;
        }
        // of several hosts, one may have been promoted in place of this one
        self.engine.heed(Some(&sqlx::Error::PoolTimedOut));
        let waited = check.begun.elapsed();
        if waited >= GIVE_UP_AFTER {
            // this closes the connection; the session may still wait in the server, so it is ended there
            check.outcome.abort();
            tokio::spawn(end_session(self.access.clone(), check.session.load(Ordering::Relaxed)));
            *under_way = None;
        }
        Err(format!(
            "a small commit has had no answer for {} s: the disk stalls, or a synchronous replica is away",
            waited.as_secs()
        ))
    }

    fn begin(&self) -> Check {
        let session = Arc::new(AtomicI32::new(0));
        let outcome = tokio::spawn(write(self.engine.clone(), self.access.clone(), session.clone()));
        Check { begun: Instant::now(), session, outcome }
    }
}

async fn write(engine: Pool, access: Access, session: Arc<AtomicI32>) -> Result<(), String> {
    let written = async {
        let mut connection = Guarded { connection: engine.acquire().await?, finished: false };
        let mut transaction = connection.begin().await?;
        let pid = sqlx::query_scalar!(
            r#"-- writability.write
            select webhook_check_writes() as "pid!""#
        )
        .fetch_one(&mut *transaction)
        .await?;
        session.store(pid, Ordering::Relaxed);
        transaction.commit().await?;
        connection.finished = true;
        Ok(())
    };
    written.await.map_err(|error| access.trouble(&error).to_string())
}

/// Ends a session whose commit waits for a replica. The session does not notice that its client is gone.
async fn end_session(access: Access, pid: i32) {
    if pid == 0 {
        return;
    }
    let end = sqlx::query(
        "-- writability.end_session
        select pg_terminate_backend(pid) from pg_stat_activity where pid = $1 and wait_event = 'SyncRep'",
    );
    let ended = access.run(move |connection| Box::pin(end.bind(pid).execute(connection))).await;
    if let Err(trouble) = ended {
        tracing::debug!(pid, "could not end the session of a commit that hangs: {trouble}");
    }
}
