//! The time limit of an attempt. It does not mistake a pause of this process for a slow receiver.

use std::future::Future;
use std::sync::OnceLock;
use std::task::Poll;
use std::time::Duration;

use tokio::time::{Instant, timeout_at};

/// A timer that fires later than this is a sign of a pause: the process was stopped, or the machine was busy.
const LATE: Duration = Duration::from_millis(10);
/// How much longer work may take after a pause, to read what arrived meanwhile. A lease term includes it.
const GRACE_AFTER_PAUSE: Duration = Duration::from_secs(1);
/// The same if no pause is visible: one may have ended at the very moment when the timer was due.
const GRACE: Duration = Duration::from_millis(20);

/// The time limit of one attempt.
#[derive(Debug)]
pub struct TimeLimit {
    length: Duration,
    deadline: Instant,
    /// Set when the deadline has passed: the final deadline, shared by all work that is left.
    last_moment: OnceLock<Instant>,
}

impl TimeLimit {
    /// Starts the clock.
    pub fn new(length: Duration) -> Self {
        Self { length, deadline: Instant::now() + length, last_moment: OnceLock::new() }
    }

    /// The result of `work`, or `None` if it took too long. When the timer fires, an answer may have arrived that no task has
    /// read yet. So the work gets a little more time, and more after a pause.
    pub async fn of<T>(&self, work: impl Future<Output = T>) -> Option<T> {
        let mut work = std::pin::pin!(work);
        if Instant::now() < self.deadline
            && let Ok(done) = timeout_at(self.deadline, work.as_mut()).await
        {
            return Some(done);
        }
        let now = Instant::now();
        let last_moment = *self
            .last_moment
            .get_or_init(|| now + if now - self.deadline > LATE { GRACE_AFTER_PAUSE } else { GRACE });
        // work that is always ready must end, too
        if now >= last_moment {
            return None;
        }
        timeout_at(last_moment, work).await.ok()
    }

    /// The same for work that must not begin after the deadline: nothing is sent when the lease may be over, because another
    /// worker may have sent it. A timer is not enough: the work is polled before the timer is, and after a pause a
    /// connection may be ready. `is_under_way` is called only after the deadline has passed; once it returns false, the work
    /// must not begin any more, on any thread.
    pub async fn of_what_may_begin<T>(
        &self,
        work: impl Future<Output = T>,
        is_under_way: impl Fn() -> bool,
    ) -> Result<T, Over> {
        let mut work = std::pin::pin!(work);
        let guarded = std::future::poll_fn(|context| {
            if Instant::now() >= self.deadline && !is_under_way() {
                return Poll::Ready(None);
            }
            work.as_mut().poll(context).map(Some)
        });
        let late_by = || Instant::now().saturating_duration_since(self.deadline);
        match self.of(guarded).await.flatten() {
            Some(done) => Ok(done),
            None if !is_under_way() && late_by() > LATE => Err(Over::Before),
            None => Err(Over::Within),
        }
    }

    /// When the limit is reached, without the extra time for pauses.
    pub fn deadline(&self) -> Instant {
        self.deadline
    }

    pub fn millis(&self) -> u128 {
        self.length.as_millis()
    }
}

/// When the time limit was reached.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Over {
    /// Before the work was under way, because of a pause.
    Before,
    /// While the work was under way, or because it took too long to begin.
    Within,
}

#[cfg(test)]
mod tests {
    use tokio::sync::oneshot;

    use super::*;

    #[tokio::test]
    async fn what_arrived_during_a_pause_is_read_although_the_time_is_over() {
        let limit = TimeLimit::new(Duration::from_millis(50));
        let (send, answer) = oneshot::channel();
        // the task that hands the answer on has not run when the timer is found due
        let handed_on = tokio::spawn(async move { send.send("200") });
        std::thread::sleep(Duration::from_millis(200));
        assert_eq!(limit.of(answer).await.unwrap(), Ok("200"));
        handed_on.await.unwrap().unwrap();
    }

    #[tokio::test]
    async fn all_work_that_is_left_shares_one_grace() {
        let limit = TimeLimit::new(Duration::from_millis(1));
        std::thread::sleep(Duration::from_millis(100));
        let begun = Instant::now();
        while limit.of(tokio::time::sleep(Duration::from_millis(5))).await.is_some() {
            assert!(begun.elapsed() < GRACE_AFTER_PAUSE * 30, "it never ends");
        }
        assert!(begun.elapsed() >= GRACE_AFTER_PAUSE);
    }

    #[tokio::test]
    async fn after_a_pause_nothing_begins_that_was_not_under_way() {
        for (is_under_way, expected) in [(true, Ok(())), (false, Err(Over::Before))] {
            let limit = TimeLimit::new(Duration::from_millis(20));
            std::thread::sleep(Duration::from_millis(60));
            let connection_is_ready = std::future::ready(());
            assert_eq!(limit.of_what_may_begin(connection_is_ready, || is_under_way).await, expected);
        }
        let limit = TimeLimit::new(Duration::from_millis(20));
        assert_eq!(limit.of_what_may_begin(std::future::pending::<()>(), || true).await, Err(Over::Within));
    }

    #[tokio::test]
    async fn work_that_is_always_ready_comes_to_an_end() {
        let limit = TimeLimit::new(Duration::from_millis(30));
        while limit.of(std::future::ready(())).await.is_some() {}
        assert!(Instant::now() >= limit.deadline);
    }

    #[tokio::test]
    async fn an_answer_that_does_not_arrive_is_given_up_after_the_limit() {
        let (limit, begun) = (TimeLimit::new(Duration::from_millis(30)), Instant::now());
        assert_eq!(limit.of(std::future::pending::<()>()).await, None);
        assert!(begun.elapsed() >= Duration::from_millis(30));
    }
}
