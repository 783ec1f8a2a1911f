//! Checks the promises: the answers that callers got, the requests that the receiver saw, and the audit must agree.

use std::collections::{BTreeMap, HashMap};
use std::fmt;
use std::ops::AddAssign;
use std::time::Duration;

use anyhow::{bail, ensure};
use sqlx::postgres::PgConnectOptions;
use sqlx::{ConnectOptions as _, FromRow};
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use super::faults::Plan;
use super::load::Sent;
use super::rig::Rig;

/// What the audit says if nobody knows how an attempt ended.
const UNKNOWN: &str = "lease expired, outcome unknown";
/// The statement behind all looks at the audit.
const ATTEMPTS: &str = "select queue_id, attempt, probe, http_status, error from webhook_attempts";

/// What came of runs.
#[derive(Debug, Default)]
pub struct Figures {
    events: usize,
    repeated_calls: u64,
    attempts: usize,
    requests: usize,
    unknown: usize,
    duplicates: usize,
}

impl AddAssign for Figures {
    fn add_assign(&mut self, other: Self) {
        self.events += other.events;
        self.repeated_calls += other.repeated_calls;
        self.attempts += other.attempts;
        self.requests += other.requests;
        self.unknown += other.unknown;
        self.duplicates += other.duplicates;
    }
}

impl fmt::Display for Figures {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{} events acknowledged and delivered ({} calls repeated), {} attempts in the audit, {} requests answered, \
             {} of unknown outcome, {} sent again although answered 200",
            self.events, self.repeated_calls, self.attempts, self.requests, self.unknown, self.duplicates
        )
    }
}

#[derive(Debug, Clone, PartialEq, Eq, FromRow)]
struct AuditedAttempt {
    queue_id: Uuid,
    attempt: i32,
    probe: bool,
    http_status: Option<i16>,
    error: Option<String>,
}

impl AuditedAttempt {
    fn is_unknown(&self) -> bool {
        self.error.as_deref() == Some(UNKNOWN)
    }
}

/// What was seen in the audit while the faults went on.
#[derive(Debug, Default)]
pub struct Seen {
    attempts: HashMap<(Uuid, i32), AuditedAttempt>,
    overwritten: Vec<String>,
}

impl Seen {
    fn look(&mut self, attempts: Vec<AuditedAttempt>) {
        for attempt in attempts.into_iter().filter(|attempt| !attempt.probe) {
            let key = (attempt.queue_id, attempt.attempt);
            // a known outcome may take the place of an unknown one, and of nothing else
            if let Some(before) = self.attempts.get(&key)
                && *before != attempt
                && !before.is_unknown()
            {
                self.overwritten.push(format!("{before:?} became {attempt:?}"));
            }
            self.attempts.insert(key, attempt);
        }
    }
}

/// Looks at the audit beside a run.
pub struct Sampling {
    stop: CancellationToken,
    task: JoinHandle<Seen>,
}

impl Sampling {
    /// Looks about once a second, if the database answers.
    pub fn start(options: PgConnectOptions) -> Self {
        let stop = CancellationToken::new();
        let stopped = stop.clone();
        let task = tokio::spawn(async move {
            let mut seen = Seen::default();
            while !stopped.is_cancelled() {
                // a look that fails is a look less: faults are meant to do that
                if let Ok(Ok(attempts)) =
                    tokio::time::timeout(Duration::from_secs(5), attempts(&options)).await
                {
                    seen.look(attempts);
                }
                tokio::select! {
                    () = stopped.cancelled() => {}
                    () = tokio::time::sleep(Duration::from_millis(700)) => {}
                }
            }
            seen
        });
        Self { stop, task }
    }

    /// What was seen.
    pub async fn finish(self) -> anyhow::Result<Seen> {
        self.stop.cancel();
        Ok(self.task.await?)
    }
}

async fn attempts(options: &PgConnectOptions) -> sqlx::Result<Vec<AuditedAttempt>> {
    let mut connection = options.connect().await?;
    sqlx::query_as(ATTEMPTS).fetch_all(&mut connection).await
}

impl Rig {
    /// Fails with the first promise that was broken.
    pub async fn check(&self, plan: &Plan, sent: &Sent, mut seen: Seen) -> anyhow::Result<Figures> {
        let attempts = attempts(&self.connect_options()).await?;
        ensure!(sent.contradictions.is_empty(), "an event became two deliveries: {:?}", sent.contradictions);
        self.check_acknowledged(sent).await?;
        seen.look(attempts.clone());
        ensure!(seen.overwritten.is_empty(), "attempts were overwritten: {:?}", seen.overwritten);
        self.check_statistics(&attempts).await?;

        let requests = self.receiver.log();
        let mut figures = Figures {
            events: sent.acknowledged.len(),
            repeated_calls: sent.repeated,
            attempts: attempts.len(),
            requests: requests.values().map(Vec::len).sum(),
            ..Figures::default()
        };
        let mut by_delivery: HashMap<Uuid, Vec<&AuditedAttempt>> = HashMap::new();
        for attempt in &attempts {
            by_delivery.entry(attempt.queue_id).or_default().push(attempt);
        }
        for (id, statuses) in &requests {
            let audited = by_delivery.get(id).map_or(&[][..], Vec::as_slice);
            let (unknown, duplicates) = compare(*id, statuses, audited)?;
            figures.unknown += unknown;
            figures.duplicates += duplicates;
        }
        for id in sent.acknowledged.values() {
            let arrived = requests.get(id).is_some_and(|statuses| statuses.contains(&200));
            ensure!(
                arrived,
                "{id} was acknowledged and is completed, but the receiver never answered it 200"
            );
        }
        if !plan.may_lose_answers() {
            ensure!(
                figures.duplicates == 0,
                "{} were sent again although no answer was lost",
                figures.duplicates
            );
        }
        Ok(figures)
    }

    /// Nothing acknowledged is lost: each event is one completed delivery, with the id that the caller got.
    async fn check_acknowledged(&self, sent: &Sent) -> anyhow::Result<()> {
        let rows: Vec<(Uuid, String, String)> =
            sqlx::query_as("select queue_id, event_id, status from webhook_queue")
                .fetch_all(&mut self.connect().await?)
                .await?;
        let mut by_event: HashMap<&str, Vec<(Uuid, &str)>> = HashMap::new();
        for (id, event, status) in &rows {
            by_event.entry(event).or_default().push((*id, status));
        }
        for (event, id) in &sent.acknowledged {
            match by_event.get(event.as_str()).map(Vec::as_slice) {
                None => bail!("{event} was acknowledged as {id}, and is gone"),
                Some([(stored, "completed")]) => {
                    ensure!(stored == id, "{event} is stored as {stored}, but the caller got {id}")
                }
                Some(other) => bail!("{event} was acknowledged as {id}, and is {other:?}"),
            }
        }
        ensure!(
            rows.len() == sent.acknowledged.len(),
            "{} deliveries of {} events",
            rows.len(),
            sent.acknowledged.len()
        );
        Ok(())
    }

    /// The statistics equal the table.
    async fn check_statistics(&self, attempts: &[AuditedAttempt]) -> anyhow::Result<()> {
        let statistics = self.statistics().await?;
        let rows: Vec<(String, i64)> =
            sqlx::query_as("select status, count(*) from webhook_queue group by status")
                .fetch_all(&mut self.connect().await?)
                .await?;
        for (status, count) in rows {
            ensure!(
                statistics[&status] == count,
                "statistics say {} {status}, the table {count}",
                statistics[&status]
            );
        }
        let made = attempts.iter().filter(|attempt| !attempt.probe).count();
        ensure!(
            statistics["attempts"] == made,
            "statistics say {} attempts, the audit {made}",
            statistics["attempts"]
        );
        Ok(())
    }
}

/// Each answer of the receiver stands in the audit, or is one whose outcome nobody knows. Answers how many of those there are,
/// and how many requests were made after one that was answered 200.
fn compare(id: Uuid, statuses: &[u16], audited: &[&AuditedAttempt]) -> anyhow::Result<(usize, usize)> {
    let story = || format!("{id}: the receiver answered {statuses:?}, the audit says {audited:?}");
    ensure!(statuses.len() <= audited.len(), "the audit has no attempt for some requests. {}", story());
    let unanswered = audited.iter().filter(|attempt| attempt.http_status.is_none()).count();
    let count = |statuses: &mut dyn Iterator<Item = u16>| {
        let mut counts: BTreeMap<u16, usize> = BTreeMap::new();
        statuses.for_each(|status| *counts.entry(status).or_default() += 1);
        counts
    };
    let answered = count(&mut statuses.iter().copied());
    let known = count(&mut audited.iter().filter_map(|attempt| u16::try_from(attempt.http_status?).ok()));
    let mut lost = 0;
    for (status, times) in &answered {
        lost += times.saturating_sub(known.get(status).copied().unwrap_or_default());
    }
    ensure!(lost <= unanswered, "the audit lacks answers that were given. {}", story());
    for (status, times) in &known {
        let seen = answered.get(status).copied().unwrap_or_default();
        ensure!(*times <= seen, "the audit has answers that were not given. {}", story());
    }
    let duplicates = answered.get(&200).copied().unwrap_or_default().saturating_sub(1);
    ensure!(duplicates <= unanswered, "sent again although the answer was known. {}", story());
    let unknown = audited.iter().filter(|attempt| attempt.is_unknown()).count();
    Ok((unknown, duplicates))
}
