//! What one attempt means for the delivery that it belongs to, and when the next one is due.

use std::time::Duration;

use rand::{Rng, RngExt as _};
use serde::Serialize;
use utoipa::ToSchema;

use super::attempt::{Answer, AttemptOutcome, ReceiverSign};
use super::delivery::DeliveryStatus;
use super::invalid::{Faults, Invalid};
use super::serialize_millis;

/// The most attempts after the first that a delivery can record.
pub const RETRIES_MAX: u8 = 6;
/// The longest delay that an endpoint may choose.
pub const RETRY_CAP_MAX: Duration = Duration::from_hours(24);
/// The longest `Retry-After` that is honoured; a longer one counts as this.
pub const RETRY_AFTER_MAX: Duration = Duration::from_hours(1);

/// How often, and how long after, a failed attempt is repeated.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, ToSchema)]
pub struct RetryPolicy {
    /// Attempts after the first.
    max_retries: u8,
    /// Delay before the first retry.
    #[serde(rename = "retry_base_ms", serialize_with = "serialize_millis")]
    #[schema(value_type = u64)]
    base: Duration,
    /// Upper bound of that delay.
    #[serde(rename = "retry_cap_ms", serialize_with = "serialize_millis")]
    #[schema(value_type = u64)]
    cap: Duration,
    /// Share by which a delay may be longer or shorter.
    #[serde(rename = "retry_jitter")]
    jitter: f64,
}

impl Default for RetryPolicy {
    /// 6 retries, from 1 s doubling up to 5 min, each up to a quarter longer or shorter.
    fn default() -> Self {
        Self {
            max_retries: RETRIES_MAX,
            base: Duration::from_secs(1),
            cap: Duration::from_mins(5),
            jitter: 0.25,
        }
    }
}

/// What happens to a delivery after an attempt.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// The receiver has it.
    Completed,
    /// It is attempted again after this time.
    RetryIn(Duration),
    /// Nothing will attempt it again unless asked.
    DeadLetter(DeadLetterReason),
    /// The delivery waits on, and no attempt is used up: the request was a probe of an open circuit, and failed, or nothing
    /// could be sent at all.
    WaitsOn,
    /// No attempt is used up: the delivery goes to a URL that its endpoint no longer has, and is tried again after a while that
    /// doubles each time, up to an hour, until someone sends it to the current one or cancels it.
    Postponed,
}

impl Verdict {
    /// The status that the delivery ends in; `None` if it goes on.
    pub fn final_status(self) -> Option<DeliveryStatus> {
        match self {
            Self::Completed => Some(DeliveryStatus::Completed),
            Self::DeadLetter(_) => Some(DeliveryStatus::Failed),
            Self::RetryIn(_) | Self::WaitsOn | Self::Postponed => None,
        }
    }

    /// What the audit keeps of why the delivery ended, if there is more to say than its status.
    pub fn final_reason(self) -> Option<&'static str> {
        match self {
            Self::DeadLetter(reason) => Some(reason.as_str()),
            Self::Completed | Self::RetryIn(_) | Self::WaitsOn | Self::Postponed => None,
        }
    }
}

/// Why a delivery failed for good.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DeadLetterReason {
    /// The last retry failed too.
    RetriesExhausted,
    /// The receiver answered 410 Gone; its endpoint is disabled.
    EndpointGone,
}

impl DeadLetterReason {
    /// For the audit.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::RetriesExhausted => "retries exhausted",
            Self::EndpointGone => "the receiver answered 410 Gone",
        }
    }
}

impl RetryPolicy {
    /// This policy with the given parts changed.
    pub fn changed(
        self,
        max_retries: Option<i64>,
        base_ms: Option<i64>,
        cap_ms: Option<i64>,
        jitter: Option<f64>,
    ) -> Result<Self, Invalid> {
        let mut faults = Faults::default();
        let mut changed = self;
        match max_retries.map(u8::try_from) {
            None => {}
            Some(Ok(retries)) if retries <= RETRIES_MAX => changed.max_retries = retries,
            Some(_) => faults.push("max_retries", format!("must be from 0 to {RETRIES_MAX}")),
        }
        let cap_max_ms = RETRY_CAP_MAX.as_millis();
        for (field, given, kept) in
            [("retry_base_ms", base_ms, &mut changed.base), ("retry_cap_ms", cap_ms, &mut changed.cap)]
        {
            match given.map(|ms| u64::try_from(ms).map(Duration::from_millis)) {
                None => {}
                Some(Ok(delay)) if !delay.is_zero() && delay <= RETRY_CAP_MAX => *kept = delay,
                Some(_) => faults.push(field, format!("must be from 1 to {cap_max_ms}")),
            }
        }
        match jitter {
            None => {}
            Some(share) if (0.0..1.0).contains(&share) => changed.jitter = share,
            Some(_) => faults.push("retry_jitter", "must be from 0 to below 1"),
        }
        if changed.cap < changed.base {
            faults.push("retry_cap_ms", "must not be below retry_base_ms");
        }
        faults.into_result().map(|()| changed)
    }

    /// Attempts after the first.
    pub fn max_retries(&self) -> u8 {
        self.max_retries
    }

    /// Delay before the first retry, before jitter.
    pub fn base(&self) -> Duration {
        self.base
    }

    /// Upper bound of a delay, before jitter.
    pub fn cap(&self) -> Duration {
        self.cap
    }

    /// Share by which a delay may be longer or shorter.
    pub fn jitter(&self) -> f64 {
        self.jitter
    }

    /// Judges attempt `number` (0 is the first) of a delivery that may be retried `max_retries` times.
    pub fn judge(
        &self,
        number: u8,
        max_retries: u8,
        outcome: &AttemptOutcome,
        rng: &mut impl Rng,
    ) -> Verdict {
        let retry_after = match outcome {
            AttemptOutcome::Answered(Answer { status: 200..=299, .. }) => return Verdict::Completed,
            AttemptOutcome::Answered(Answer { status: 410, .. }) => {
                return Verdict::DeadLetter(DeadLetterReason::EndpointGone);
            }
            AttemptOutcome::NotSent { .. } => return Verdict::WaitsOn,
            AttemptOutcome::Answered(answer) => answer.retry_after,
            AttemptOutcome::Unanswered { .. } | AttemptOutcome::Unknown => None,
        };
        if number >= max_retries {
            return Verdict::DeadLetter(DeadLetterReason::RetriesExhausted);
        }
        let asked = retry_after.unwrap_or_default().min(RETRY_AFTER_MAX);
        Verdict::RetryIn(self.delay(number + 1, rng).max(asked))
    }

    /// Judges a probe of an open circuit, which uses up no attempt if the receiver is still failing. One that is up and
    /// refuses the event is an attempt like any other, or the delivery would be sent for ever.
    pub fn judge_probe(
        &self,
        number: u8,
        max_retries: u8,
        outcome: &AttemptOutcome,
        rng: &mut impl Rng,
    ) -> Verdict {
        match (outcome, outcome.sign()) {
            (AttemptOutcome::Answered(Answer { status: 410, .. }), _)
            | (_, Some(ReceiverSign::Well | ReceiverSign::RefusesEvent)) => {
                self.judge(number, max_retries, outcome, rng)
            }
            (_, Some(ReceiverSign::Failing) | None) => Verdict::WaitsOn,
        }
    }

    /// Judges an attempt at a URL that the endpoint no longer has. If the receiver there fails, no attempt is used up: nothing
    /// that waits may become a dead letter because its endpoint has moved.
    pub fn judge_elsewhere(
        &self,
        number: u8,
        max_retries: u8,
        outcome: &AttemptOutcome,
        rng: &mut impl Rng,
    ) -> Verdict {
        match (outcome, self.judge_probe(number, max_retries, outcome, rng)) {
            (AttemptOutcome::Unknown, _) => self.judge(number, max_retries, outcome, rng),
            (_, Verdict::WaitsOn) => Verdict::Postponed,
            (_, verdict) => verdict,
        }
    }

    /// `min(base × 2^(n-1), cap) × (1 ± jitter)`, the delay before retry `n` (1 is the first).
    pub fn delay(&self, n: u8, rng: &mut impl Rng) -> Duration {
        let doubled =
            self.base.saturating_mul(1_u32.checked_shl(u32::from(n.saturating_sub(1))).unwrap_or(u32::MAX));
        let factor = 1.0 + self.jitter * (rng.random::<f64>() * 2.0 - 1.0);
        doubled.min(self.cap).mul_f64(factor)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use rand::SeedableRng;
    use rand::rngs::StdRng;

    use super::*;
    use crate::domain::error_kind::ErrorKind;
    use crate::domain::evidence::Evidence;

    fn answered(status: u16, retry_after: Option<Duration>) -> AttemptOutcome {
        let (body, evidence) = (String::new(), Evidence::default());
        AttemptOutcome::Answered(Answer { status, body, retry_after, broken_off: None, evidence })
    }

    fn unanswered() -> AttemptOutcome {
        AttemptOutcome::Unanswered { error: "timeout".into(), kind: ErrorKind::Timeout, address: None }
    }

    fn judge(number: u8, outcome: &AttemptOutcome) -> Verdict {
        RetryPolicy::default().judge(number, 6, outcome, &mut StdRng::seed_from_u64(1))
    }

    #[test]
    fn success_is_2xx_and_nothing_else() {
        for status in [200, 201, 204, 299] {
            assert_eq!(judge(0, &answered(status, None)), Verdict::Completed, "{status}");
        }
        for status in [100, 199, 300, 301, 302, 304, 307, 308, 400, 404, 429, 500, 503, 599] {
            assert!(matches!(judge(0, &answered(status, None)), Verdict::RetryIn(_)), "{status}");
        }
    }

    #[test]
    fn gone_ends_the_delivery_at_once() {
        let verdict = judge(0, &answered(410, None));
        assert_eq!(verdict, Verdict::DeadLetter(DeadLetterReason::EndpointGone));
    }

    #[test]
    fn a_probe_uses_up_an_attempt_only_where_the_receiver_is_up() {
        let judge =
            |outcome| RetryPolicy::default().judge_probe(0, 6, &outcome, &mut StdRng::seed_from_u64(1));
        assert_eq!(judge(answered(204, None)), Verdict::Completed);
        assert_eq!(judge(answered(410, None)), Verdict::DeadLetter(DeadLetterReason::EndpointGone));
        for refused in [400, 409, 413, 422] {
            assert!(matches!(judge(answered(refused, None)), Verdict::RetryIn(_)), "{refused}");
        }
        for failing in [302, 401, 404, 429, 500, 503] {
            assert_eq!(judge(answered(failing, None)), Verdict::WaitsOn, "{failing}");
        }
        assert_eq!(judge(unanswered()), Verdict::WaitsOn);
    }

    #[test]
    fn what_was_never_sent_uses_up_no_attempt() {
        let not_sent =
            AttemptOutcome::NotSent { error: "no name server answers".into(), kind: ErrorKind::Dns };
        assert_eq!(judge(6, &not_sent), Verdict::WaitsOn);
    }

    #[test]
    fn the_last_retry_is_followed_by_nothing() {
        for outcome in [answered(500, None), unanswered(), AttemptOutcome::Unknown] {
            assert!(matches!(judge(5, &outcome), Verdict::RetryIn(_)));
            assert_eq!(judge(6, &outcome), Verdict::DeadLetter(DeadLetterReason::RetriesExhausted));
        }
        let never = RetryPolicy::default().judge(0, 0, &answered(500, None), &mut StdRng::seed_from_u64(1));
        assert_eq!(never, Verdict::DeadLetter(DeadLetterReason::RetriesExhausted));
    }

    #[test]
    fn retry_after_makes_the_delay_longer_but_not_endless() {
        let at_least = |after| match judge(0, &answered(503, Some(after))) {
            Verdict::RetryIn(delay) => delay,
            other => panic!("{other:?}"),
        };
        assert_eq!(at_least(Duration::from_secs(40)), Duration::from_secs(40));
        assert_eq!(at_least(Duration::from_secs(1_000_000)), RETRY_AFTER_MAX);
        assert!(at_least(Duration::ZERO) >= Duration::from_millis(750));
    }

    #[test]
    fn without_jitter_delays_double_up_to_the_cap() {
        let policy = RetryPolicy::default().changed(None, None, Some(10_000), Some(0.0)).unwrap();
        let mut rng = StdRng::seed_from_u64(1);
        let seconds: Vec<_> = (1..=6).map(|n| policy.delay(n, &mut rng).as_secs()).collect();
        assert_eq!(seconds, [1, 2, 4, 8, 10, 10]);
    }

    #[test]
    fn a_policy_out_of_bounds_is_refused() {
        let policy = RetryPolicy::default();
        assert!(policy.changed(Some(7), None, None, None).is_err());
        assert!(policy.changed(Some(-1), None, None, None).is_err());
        assert!(policy.changed(None, Some(0), None, None).is_err());
        assert!(policy.changed(None, Some(2_000), Some(1_000), None).is_err());
        assert!(policy.changed(None, None, Some(86_400_001), None).is_err());
        for jitter in [1.0, -0.1, f64::NAN] {
            assert!(policy.changed(None, None, None, Some(jitter)).is_err());
        }
    }

    proptest! {
        #[test]
        fn a_delay_is_never_under_its_floor_nor_over_its_ceiling(
            n in 1_u8..=255, base in 1_i64..=86_400_000, extra in 0_i64..=86_400_000, jitter in 0.0..0.999_f64, seed: u64,
        ) {
            let cap = (base + extra).min(86_400_000);
            let policy = RetryPolicy::default().changed(None, Some(base), Some(cap), Some(jitter)).unwrap();
            let delay = policy.delay(n, &mut StdRng::seed_from_u64(seed));
            let plain = policy.base().saturating_mul(1_u32.checked_shl(u32::from(n) - 1).unwrap_or(u32::MAX)).min(policy.cap());
            let slack = Duration::from_micros(1);
            prop_assert!(delay + slack >= plain.mul_f64(1.0 - jitter));
            prop_assert!(delay <= plain.mul_f64(1.0 + jitter) + slack);
        }
    }
}
