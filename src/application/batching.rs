//! One batching rule for everything that goes to the store: items that arrive during a batch form the next batch.
//!
//! On an idle process, a single item is processed at once. Under load, hundreds share one transaction. Items that nobody
//! waits for may [`Linger`] until more arrive.

use std::panic::AssertUnwindSafe;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use futures_util::FutureExt as _;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc, oneshot};
use tokio::task::yield_now;
use tokio::time::{Instant, timeout_at};
use tracing::error;

use super::ports::StoreError;

/// Upper bound of a batch in KiB; its last item may exceed it. A bound is needed because the database driver copies a batch.
const BATCH_KIB_MAX: usize = 1024;

#[async_trait]
pub trait ProcessBatch<T, R>: Send + Sync + 'static {
    /// Processes all items in one transaction. Returns one result per item, in order, after the commit. An error means that
    /// nothing was done for any item, except for [`StoreError::InDoubt`], after which nobody knows.
    async fn process(&self, items: &[T]) -> Result<Vec<R>, StoreError>;
}

/// Why an item was not processed.
#[derive(Debug, Clone, thiserror::Error)]
pub enum BatchError {
    /// There is no room; try again later.
    #[error("the buffer is full")]
    Full,
    #[error(transparent)]
    Store(#[from] StoreError),
    #[error("the service is stopping")]
    Stopped,
}

/// How long items wait for more. Every statement has a fixed cost, so larger batches leave more CPU to other work.
#[derive(Debug, Clone, Copy)]
pub struct Linger {
    /// How many times the batcher yields to all other tasks. Items that they add join the batch; if no task can run, no time
    /// is lost.
    pub turns: usize,
    /// A batch of this many items does not wait.
    pub enough: usize,
    /// The longest that a smaller batch waits.
    pub time_max: Duration,
}

impl Linger {
    const NONE: Self = Self { turns: 0, enough: 1, time_max: Duration::ZERO };
}

/// Collects items and processes them in batches, one batch at a time.
pub struct Batcher<T, R> {
    entries: mpsc::UnboundedSender<Entry<T, R>>,
    /// Bounds the memory of waiting items, and with it the length of the channel. One permit is 1 KiB.
    room: Arc<Semaphore>,
}

struct Entry<T, R> {
    item: T,
    /// An urgent entry ends the wait for more.
    urgent: bool,
    reply: oneshot::Sender<Result<R, StoreError>>,
    room: OwnedSemaphorePermit,
}

impl<T: Send + Sync + 'static, R: Send + 'static> Batcher<T, R> {
    /// Starts the task that processes. It ends when the batcher is dropped and everything is done.
    pub fn start(processor: impl ProcessBatch<T, R>, items_max: usize, kib_max: usize) -> Self {
        Self::start_lingering(processor, items_max, kib_max, Linger::NONE)
    }

    /// Like [`Batcher::start`], but items linger.
    pub fn start_lingering(
        processor: impl ProcessBatch<T, R>,
        items_max: usize,
        kib_max: usize,
        linger: Linger,
    ) -> Self {
        let (entries, arriving) = mpsc::unbounded_channel();
        tokio::spawn(process_all(processor, arriving, items_max, linger));
        Self { entries, room: Arc::new(Semaphore::new(kib_max)) }
    }

    /// Processes one item of `bytes` and returns after the commit. Refuses at once if there is no room.
    pub async fn process(&self, item: T, bytes: usize) -> Result<R, BatchError> {
        let permit = self.room.clone().try_acquire_many_owned(kib(bytes)).map_err(|_| BatchError::Full)?;
        self.enter(item, permit, true).await
    }

    /// Like [`Batcher::process`], but waits for room.
    pub async fn process_when_room(&self, item: T, bytes: usize) -> Result<R, BatchError> {
        let permit = self.room_for(bytes).await?;
        self.enter(item, permit, true).await
    }

    /// Like [`Batcher::process_when_room`], but the item may linger.
    pub async fn process_unhurried(&self, item: T, bytes: usize) -> Result<R, BatchError> {
        let permit = self.room_for(bytes).await?;
        self.enter(item, permit, false).await
    }

    async fn room_for(&self, bytes: usize) -> Result<OwnedSemaphorePermit, BatchError> {
        self.room.clone().acquire_many_owned(kib(bytes)).await.map_err(|_| BatchError::Stopped)
    }

    async fn enter(&self, item: T, room: OwnedSemaphorePermit, urgent: bool) -> Result<R, BatchError> {
        let (reply, answer) = oneshot::channel();
        self.entries.send(Entry { item, urgent, reply, room }).map_err(|_| BatchError::Stopped)?;
        Ok(answer.await.map_err(|_| BatchError::Stopped)??)
    }
}

/// Bytes in KiB, rounded up: the number of permits that they need.
pub(super) fn kib(bytes: usize) -> u32 {
    u32::try_from(bytes.div_ceil(1024)).unwrap_or(u32::MAX)
}

async fn process_all<T: Send + Sync, R: Send>(
    processor: impl ProcessBatch<T, R>,
    mut arriving: mpsc::UnboundedReceiver<Entry<T, R>>,
    items_max: usize,
    linger: Linger,
) {
    let mut entries = Vec::with_capacity(items_max);
    while let Some(first) = arriving.recv().await {
        let (mut kib, mut urgent) = (first.room.num_permits(), first.urgent);
        entries.push(first);
        for _ in 0..linger.turns {
            yield_now().await;
        }
        let until = Instant::now() + linger.time_max;
        while entries.len() < items_max && kib < BATCH_KIB_MAX {
            let next = if entries.len() < linger.enough && !urgent {
                timeout_at(until, arriving.recv()).await.ok().flatten()
            } else {
                arriving.try_recv().ok()
            };
            let Some(entry) = next else { break };
            kib += entry.room.num_permits();
            urgent |= entry.urgent;
            entries.push(entry);
        }
        // a caller that stopped waiting has already answered that nothing was done, or is gone
        entries.retain(|entry| !entry.reply.is_closed());
        let mut items = Vec::with_capacity(entries.len());
        let mut replies = Vec::with_capacity(entries.len());
        for Entry { item, urgent: _, reply, room } in entries.drain(..) {
            items.push(item);
            replies.push((reply, room));
        }
        if items.is_empty() {
            continue;
        }
        let results = process_apart_if_refused(&processor, &items).await;
        // their owners may unwrap them, so this copy goes before the answers do
        drop(items);
        for ((reply, _room), result) in replies.into_iter().zip(results) {
            // a caller that has gone meanwhile needs no answer
            let _ = reply.send(result);
        }
    }
}

/// Processes a batch. If the store refuses it, processes each item alone, so that one bad item spoils no other.
async fn process_apart_if_refused<T: Sync, R>(
    processor: &impl ProcessBatch<T, R>,
    items: &[T],
) -> Vec<Result<R, StoreError>> {
    match process_or_catch(processor, items).await {
        Ok(results) => results.into_iter().map(Ok).collect(),
        Err(StoreError::Unexpected(_) | StoreError::Refused(_)) if items.len() > 1 => {
            let mut results = Vec::with_capacity(items.len());
            for item in items {
                let result = process_or_catch(processor, std::slice::from_ref(item)).await;
                results.push(result.map(|mut one| one.pop().expect("one answer for one item")));
            }
            results
        }
        Err(error) => items.iter().map(|_| Err(error.clone())).collect(),
    }
}

/// Processes a batch and survives a panic. Otherwise the batcher would end, and nothing that comes later would be processed.
async fn process_or_catch<T: Sync, R>(
    processor: &impl ProcessBatch<T, R>,
    items: &[T],
) -> Result<Vec<R>, StoreError> {
    AssertUnwindSafe(processor.process(items)).catch_unwind().await.unwrap_or_else(|_| {
        error!(items = items.len(), "a batch panicked");
        let cause = Arc::new(anyhow::anyhow!("a panic in this process"));
        // each item of a larger batch is tried alone
        Err(if items.len() > 1 { StoreError::Unexpected(cause) } else { StoreError::InDoubt(cause) })
    })
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use super::*;

    type Batches = Arc<Mutex<Vec<Vec<u32>>>>;

    /// Records each batch; waits for a permit before each; refuses batches with a 13 in them, and panics at a 17.
    struct Recorder {
        batches: Batches,
        gate: Arc<Semaphore>,
    }

    #[async_trait]
    impl ProcessBatch<u32, u32> for Recorder {
        async fn process(&self, items: &[u32]) -> Result<Vec<u32>, StoreError> {
            self.gate.acquire().await.unwrap().forget();
            self.batches.lock().unwrap().push(items.to_vec());
            assert!(!items.contains(&17), "on purpose");
            if items.contains(&13) {
                return Err(StoreError::Unexpected(Arc::new(anyhow::anyhow!("13"))));
            }
            Ok(items.iter().map(|item| item * 2).collect())
        }
    }

    fn recorder(permits: usize) -> (Recorder, Batches, Arc<Semaphore>) {
        let batches = Arc::new(Mutex::new(vec![]));
        let gate = Arc::new(Semaphore::new(permits));
        (Recorder { batches: batches.clone(), gate: gate.clone() }, batches, gate)
    }

    #[tokio::test]
    async fn what_arrives_during_a_batch_shares_the_next_one() {
        let (recorder, processed, gate) = recorder(0);
        let batcher = Batcher::start(recorder, 100, 100);
        let first = batcher.process(1, 1);
        tokio::pin!(first);
        // the first batch is under way once the recorder waits at the gate
        tokio::select! { biased; _ = &mut first => unreachable!("the gate is shut"), () = tokio::task::yield_now() => {} }
        let others = futures_util::future::join_all([2, 3, 4].map(|item| batcher.process(item, 1)));
        tokio::pin!(others);
        tokio::select! { biased; _ = &mut others => unreachable!("the gate is shut"), () = tokio::task::yield_now() => {} }
        gate.add_permits(2);
        assert_eq!(first.await.unwrap(), 2);
        let doubled: Vec<u32> = others.await.into_iter().map(Result::unwrap).collect();
        assert_eq!(doubled, [4, 6, 8]);
        assert_eq!(*processed.lock().unwrap(), [vec![1], vec![2, 3, 4]]);
    }

    #[tokio::test]
    async fn few_items_linger_until_there_are_enough_or_one_is_urgent() {
        let (recorder, processed, _) = recorder(100);
        let linger = Linger { turns: 0, enough: 3, time_max: Duration::from_hours(1) };
        let batcher = Batcher::start_lingering(recorder, 100, 100, linger);
        let urgent = async |first: u32| {
            for_a_while().await;
            assert!(!processed.lock().unwrap().iter().flatten().any(|item| *item == first), "it waits");
            batcher.process_when_room(first + 1, 1).await.unwrap();
        };
        let _ = tokio::join!(batcher.process_unhurried(1, 1), urgent(1));
        let enough = async {
            for_a_while().await;
            assert_eq!(processed.lock().unwrap().len(), 1, "they wait");
            batcher.process_unhurried(5, 1).await
        };
        let _ = tokio::join!(batcher.process_unhurried(3, 1), batcher.process_unhurried(4, 1), enough);
        assert_eq!(*processed.lock().unwrap(), [vec![1, 2], vec![3, 4, 5]]);
    }

    /// Long enough for everything that can be done to be done, on the one thread of a test.
    async fn for_a_while() {
        for _ in 0..100 {
            yield_now().await;
        }
    }

    #[tokio::test]
    async fn what_other_tasks_are_about_to_bring_joins_the_batch() {
        let (recorder, processed, _) = recorder(100);
        let linger = Linger { turns: 3, ..Linger::NONE };
        let batcher = Batcher::start_lingering(recorder, 100, 100, linger);
        let a_turn_later = async {
            yield_now().await;
            batcher.process(2, 1).await
        };
        let _ = tokio::join!(batcher.process(1, 1), a_turn_later);
        assert_eq!(*processed.lock().unwrap(), [vec![1, 2]]);
    }

    #[tokio::test]
    async fn a_lone_item_does_not_linger_for_ever() {
        let (recorder, _, _) = recorder(100);
        let linger = Linger { turns: 0, enough: 3, time_max: Duration::from_millis(1) };
        let batcher = Batcher::start_lingering(recorder, 100, 100, linger);
        assert_eq!(batcher.process_unhurried(1, 1).await.unwrap(), 2);
    }

    #[tokio::test]
    async fn one_bad_item_spoils_no_other() {
        let (recorder, _, _) = recorder(100);
        let batcher = Batcher::start(recorder, 100, 100);
        let results = futures_util::future::join_all([1, 13, 2].map(|item| batcher.process(item, 1))).await;
        assert_eq!(results[0].as_ref().unwrap(), &2);
        assert!(matches!(results[1], Err(BatchError::Store(StoreError::Unexpected(_)))));
        assert_eq!(results[2].as_ref().unwrap(), &4);
    }

    #[tokio::test]
    async fn after_a_panic_the_others_of_the_batch_and_later_ones_are_processed() {
        let (recorder, _, _) = recorder(100);
        let batcher = Batcher::start(recorder, 100, 100);
        let results = futures_util::future::join_all([1, 17, 2].map(|item| batcher.process(item, 1))).await;
        assert_eq!(results[0].as_ref().unwrap(), &2);
        assert!(matches!(results[1], Err(BatchError::Store(StoreError::InDoubt(_)))), "{:?}", results[1]);
        assert_eq!(results[2].as_ref().unwrap(), &4);
        assert_eq!(batcher.process(3, 1).await.unwrap(), 6);
    }

    #[tokio::test]
    async fn a_full_buffer_refuses_and_frees_itself() {
        let (recorder, _, gate) = recorder(0);
        let batcher = Arc::new(Batcher::start(recorder, 100, 2));
        let filler = tokio::spawn({
            let batcher = batcher.clone();
            async move { batcher.process(1, 2048).await }
        });
        while batcher.room.available_permits() > 0 {
            yield_now().await;
        }
        assert!(matches!(batcher.process(2, 1).await, Err(BatchError::Full)));
        gate.add_permits(10);
        filler.await.unwrap().unwrap();
        assert_eq!(batcher.process_when_room(2, 1).await.unwrap(), 4);
    }
}
