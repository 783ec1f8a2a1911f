//! Whether the database takes writes. It is found out by writing, since a full disk, a standby, and commits that wait for
//! a replica answer every question as ever.

use std::sync::atomic::{AtomicI32, Ordering};
use std::sync::{Arc, PoisonError};
use std::time::Duration;

use sqlx::Connection as _;
use tokio::sync::Mutex;
use tokio::task::JoinHandle;
use tokio::time::{Instant, timeout};

use super::Guarded;
use super::pool::Pool;
use super::schema::Access;

/// How old the answer may be.
const HOLDS: Duration = Duration::from_secs(5);
/// How long a small commit may take.
const COMMIT_LIMIT: Duration = Duration::from_secs(2);
/// How long a write that does not end is waited for before another one is begun.
const GIVE_UP_AFTER: Duration = Duration::from_secs(30);

/// Writes a little now and then, and remembers what came of it.
#[derive(Debug)]
pub(super) struct Writability {
    engine: Pool,
    access: Access,
    /// When something that was to be stored anyway was committed.
    written_at: std::sync::Mutex<Option<Instant>>,
    checks: Mutex<Checks>,
}

#[derive(Debug, Default)]
struct Checks {
    last: Option<(Instant, Result<(), String>)>,
    /// At most one, since each that hangs occupies a connection.
    under_way: Option<Check>,
}

#[derive(Debug)]
struct Check {
    begun: Instant,
    /// The session that writes; 0 until it is known.
    session: Arc<AtomicI32>,
    outcome: JoinHandle<Result<(), String>>,
}

impl Writability {
    pub(super) fn new(engine: Pool, access: Access) -> Arc<Self> {
        Arc::new(Self { engine, access, written_at: std::sync::Mutex::default(), checks: Mutex::default() })
    }

    /// Something was committed: there is no need to try it.
    pub(super) fn note_write(&self) {
        *self.written_at.lock().unwrap_or_else(PoisonError::into_inner) = Some(Instant::now());
    }

    /// What was found at most a few seconds ago, or is found now.
    pub(super) async fn recent(&self) -> Result<(), String> {
        let written_at = *self.written_at.lock().unwrap_or_else(PoisonError::into_inner);
        if written_at.is_some_and(|at| at.elapsed() < HOLDS) {
            return Ok(());
        }
        let mut checks = self.checks.lock().await;
        let Checks { under_way, last } = &mut *checks;
        if let (None, Some((at, outcome))) = (&under_way, &last)
            && at.elapsed() < HOLDS
        {
            return outcome.clone();
        }
        // it stays where it is while it is waited for: whoever asks may leave, and the check goes on
        let check = under_way.get_or_insert_with(|| self.begin());
        let rest = COMMIT_LIMIT.saturating_sub(check.begun.elapsed());
        if let Ok(outcome) = timeout(rest, &mut check.outcome).await {
            let outcome = outcome.unwrap_or_else(|_| Err("the check was broken off".to_owned()));
            *under_way = None;
            *last = Some((Instant::now(), outcome.clone()));
            return outcome;
        }
        let waited = check.begun.elapsed();
        if waited >= GIVE_UP_AFTER {
            // its connection is closed, and what still waits at the other end is ended there
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

/// Ends a session whose commit waits for a replica: it does not notice that nobody waits for it any more.
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
        tracing::debug!(pid, "the session of a commit that hangs could not be ended: {trouble}");
    }
}
