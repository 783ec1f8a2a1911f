//! A recent count of the backlog, shared by all who ask: to count it costs more the larger it is.

use std::sync::{Arc, PoisonError};
use std::time::{Duration, Instant};

use tokio::sync::Mutex;

use crate::application::ports::{Backlog, DeliveryRecords, StoreError};

/// The shortest time between two reads of the backlog.
const BACKLOG_AGE_MAX: Duration = Duration::from_secs(5);
/// A large backlog takes long to read, so the next read waits this many times as long as the last one took.
const BACKLOG_REST: u32 = 20;
/// How long a health check waits for the backlog.
const HEALTH_PATIENCE: Duration = Duration::from_secs(1);

/// The backlog, read at most every few seconds.
pub struct BacklogSample {
    records: Arc<dyn DeliveryRecords>,
    last: std::sync::Mutex<Option<Sample>>,
    /// Held during a read, so that only one is under way.
    reading: Mutex<()>,
}

#[derive(Clone, Copy)]
struct Sample {
    backlog: Backlog,
    good_until: Instant,
}

impl BacklogSample {
    pub fn new(records: Arc<dyn DeliveryRecords>) -> Self {
        Self { records, last: std::sync::Mutex::default(), reading: Mutex::default() }
    }

    fn last(&self) -> Option<Sample> {
        // a panic cannot leave half a sample behind: it is replaced as a whole
        *self.last.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn fresh(&self) -> Option<Backlog> {
        self.last().filter(|sample| Instant::now() < sample.good_until).map(|sample| sample.backlog)
    }

    pub async fn recent(&self) -> Result<Backlog, StoreError> {
        if let Some(backlog) = self.fresh() {
            return Ok(backlog);
        }
        let _reading = self.reading.lock().await;
        if let Some(backlog) = self.fresh() {
            return Ok(backlog);
        }
        let begun = Instant::now();
        let backlog = self.records.backlog().await?;
        let rest = BACKLOG_AGE_MAX.max(begun.elapsed() * BACKLOG_REST);
        let sample = Sample { backlog, good_until: Instant::now() + rest };
        *self.last.lock().unwrap_or_else(PoisonError::into_inner) = Some(sample);
        Ok(backlog)
    }

    /// As recent as can be had soon, for callers who cannot wait; the reading goes on without them. `None`: nothing could be
    /// read yet.
    pub async fn recent_soon(self: &Arc<Self>) -> Option<Backlog> {
        let sample = self.clone();
        let reading = tokio::spawn(async move { sample.recent().await });
        match tokio::time::timeout(HEALTH_PATIENCE, reading).await {
            Ok(Ok(Ok(backlog))) => Some(backlog),
            Ok(Ok(Err(_)) | Err(_)) | Err(_) => self.last().map(|sample| sample.backlog),
        }
    }
}
