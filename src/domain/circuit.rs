//! Circuits: an endpoint that keeps failing is left alone, except for a probe now and then, until one succeeds.

use std::fmt;
use std::str::FromStr;
use std::time::{Duration, Instant};

use chrono::{DateTime, Utc};
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::attempt::ReceiverSign;
use super::invalid::{Faults, Invalid};
use super::{millis, present, serialize_millis};

/// How far back attempts may count.
const WINDOW_MS: (i64, i64) = (1_000, 3_600_000);
/// How many attempts may be asked for.
const ATTEMPTS_MIN: (i64, i64) = (1, 10_000);
/// How long a circuit may cool down.
const COOLDOWN_MS: (i64, i64) = (100, 86_400_000);

/// When an endpoint's circuit opens, and when it is probed.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, ToSchema)]
pub struct CircuitPolicy {
    /// It opens when this share of attempts has failed; `null`: never by itself.
    failure_rate: Option<f64>,
    /// How far back attempts count for that.
    #[serde(rename = "window_ms", serialize_with = "serialize_millis")]
    #[schema(value_type = u64)]
    window: Duration,
    /// How many attempts it takes at least.
    attempts_min: u32,
    /// With fewer than that, it opens when so many in a row have failed; `null`: never.
    failures_in_row: Option<u32>,
    /// From the opening to the first probe; doubled after each failed probe.
    #[serde(rename = "cooldown_ms", serialize_with = "serialize_millis")]
    #[schema(value_type = u64)]
    cooldown: Duration,
    /// Upper bound of that.
    #[serde(rename = "cooldown_cap_ms", serialize_with = "serialize_millis")]
    #[schema(value_type = u64)]
    cooldown_cap: Duration,
}

impl Default for CircuitPolicy {
    /// Opens when 4 of 5 attempts of the last minute have failed, of at least 20; with fewer, when the last 5 have all failed.
    /// The first probe is due 5 s later.
    fn default() -> Self {
        Self {
            failure_rate: Some(0.8),
            window: Duration::from_mins(1),
            attempts_min: 20,
            failures_in_row: Some(5),
            cooldown: Duration::from_secs(5),
            cooldown_cap: Duration::from_mins(5),
        }
    }
}

/// The parts of a policy as they come in, unchecked, and the state that someone wants. Only what is there is changed.
#[derive(Debug, Clone, Default, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
#[schema(as = CircuitBody)]
pub struct CircuitParts {
    /// `open` or `closed`.
    pub state: Option<String>,
    /// It opens when this share of attempts has failed; `null`: never by itself.
    #[serde(default, deserialize_with = "present")]
    #[schema(value_type = Option<f64>, exclusive_minimum = 0, maximum = 1, default = 0.8, example = 0.8)]
    pub failure_rate: Option<Option<f64>>,
    /// How far back attempts count for that.
    #[schema(minimum = 1_000, maximum = 3_600_000, default = 60_000, example = 60_000)]
    pub window_ms: Option<i64>,
    /// How many attempts it takes at least.
    #[schema(minimum = 1, maximum = 10_000, default = 20, example = 20)]
    pub attempts_min: Option<i64>,
    /// With fewer attempts than that, it opens when so many in a row have failed; `null`: never.
    #[serde(default, deserialize_with = "present")]
    #[schema(value_type = Option<i64>, minimum = 1, maximum = 10_000, default = 5, example = 5)]
    pub failures_in_row: Option<Option<i64>>,
    /// From the opening to the first probe, doubled after each failed probe. It must not be above `cooldown_cap_ms`.
    #[schema(minimum = 100, maximum = 86_400_000, default = 5_000, example = 5_000)]
    pub cooldown_ms: Option<i64>,
    /// Upper bound of that.
    #[schema(minimum = 100, maximum = 86_400_000, default = 300_000, example = 300_000)]
    pub cooldown_cap_ms: Option<i64>,
}

impl CircuitPolicy {
    /// This policy with `parts` in place of what they name.
    pub fn changed(self, parts: &CircuitParts) -> Result<Self, Invalid> {
        let mut faults = Faults::default();
        let mut number = |field: &str, given: Option<i64>, (min, max): (i64, i64), kept: u64| match given {
            None => kept,
            Some(number) if (min..=max).contains(&number) => number.unsigned_abs(),
            Some(_) => {
                faults.push(format!("circuit.{field}"), format!("must be from {min} to {max}"));
                kept
            }
        };
        let window = number("window_ms", parts.window_ms, WINDOW_MS, millis(self.window));
        let attempts_min = number("attempts_min", parts.attempts_min, ATTEMPTS_MIN, self.attempts_min.into());
        let failures_in_row = match parts.failures_in_row {
            None => self.failures_in_row.map(u64::from),
            Some(None) => None,
            Some(given) => Some(number("failures_in_row", given, ATTEMPTS_MIN, 1)),
        };
        let cooldown = number("cooldown_ms", parts.cooldown_ms, COOLDOWN_MS, millis(self.cooldown));
        let cooldown_cap =
            number("cooldown_cap_ms", parts.cooldown_cap_ms, COOLDOWN_MS, millis(self.cooldown_cap));
        if cooldown_cap < cooldown {
            faults.push("circuit.cooldown_cap_ms", "must not be below circuit.cooldown_ms");
        }
        let failure_rate = parts.failure_rate.unwrap_or(self.failure_rate);
        if failure_rate.is_some_and(|rate| !(rate > 0.0 && rate <= 1.0)) {
            faults.push("circuit.failure_rate", "must be above 0, to 1, or null");
        }
        faults.into_result()?;
        Ok(Self {
            failure_rate,
            window: Duration::from_millis(window),
            attempts_min: u32::try_from(attempts_min).expect("it is checked"),
            failures_in_row: failures_in_row.map(|count| u32::try_from(count).expect("it is checked")),
            cooldown: Duration::from_millis(cooldown),
            cooldown_cap: Duration::from_millis(cooldown_cap),
        })
    }

    /// Share of failed attempts from which on it opens; `None`: only by hand.
    pub fn failure_rate(&self) -> Option<f64> {
        self.failure_rate
    }

    /// How far back attempts count.
    pub fn window(&self) -> Duration {
        self.window
    }

    /// How many attempts it takes at least.
    pub fn attempts_min(&self) -> u32 {
        self.attempts_min
    }

    /// How many failures in a row open it where there are fewer attempts than that; `None`: none do.
    pub fn failures_in_row(&self) -> Option<u32> {
        self.failures_in_row
    }

    /// From the opening to the first probe; doubled after each failed probe.
    pub fn cooldown(&self) -> Duration {
        self.cooldown
    }

    /// Upper bound of that.
    pub fn cooldown_cap(&self) -> Duration {
        self.cooldown_cap
    }
}

/// Whether deliveries are let through.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum CircuitState {
    /// All are.
    #[default]
    Closed,
    /// None is.
    Open,
    /// One is: a probe is under way.
    HalfOpen,
}

impl CircuitState {
    /// As it is spelled in the API and stored.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Closed => "closed",
            Self::Open => "open",
            Self::HalfOpen => "half_open",
        }
    }
}

impl fmt::Display for CircuitState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl FromStr for CircuitState {
    type Err = Invalid;

    fn from_str(text: &str) -> Result<Self, Invalid> {
        [Self::Closed, Self::Open, Self::HalfOpen]
            .into_iter()
            .find(|state| state.as_str() == text)
            .ok_or_else(|| Invalid::field("circuit.state", "must be closed, open or half_open"))
    }
}

/// What someone does to a circuit by hand.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum CircuitCommand {
    /// Lets everything through.
    Close,
    /// Lets nothing through, and no probe, until it is closed.
    Open,
}

impl CircuitCommand {
    /// Accepts the state that it leads to.
    pub fn parse(state: &str) -> Result<Self, Invalid> {
        match state {
            "closed" => Ok(Self::Close),
            "open" => Ok(Self::Open),
            _ => Err(Invalid::field("circuit.state", "must be open or closed")),
        }
    }
}

/// Why a circuit is open that someone opened.
pub const OPENED_BY_HAND: &str = "opened by hand";

/// An endpoint's circuit as it is; by default one that has never opened.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Circuit {
    /// Whether deliveries are let through.
    pub state: CircuitState,
    /// Why it opened; `None` while it is closed.
    pub reason: Option<String>,
    /// How the last probe failed; `None` if none has since it opened.
    pub probe_error: Option<String>,
    /// When it last opened or closed.
    pub changed_at: Option<DateTime<Utc>>,
    /// When the next probe is due, or when the one under way counts as lost.
    pub probe_at: Option<DateTime<Utc>>,
}

/// How long failures in a row last before they are no hiccup, such as a restart of the receiver.
const OUTAGE_MIN: Duration = Duration::from_secs(1);

/// How a window is divided: what falls out of it does so in this many steps.
const SLICES: u32 = 10;

/// An attempt that ended, as a window counts it.
#[derive(Debug, Clone, Copy)]
pub struct CountedAttempt {
    /// When it began.
    pub started: Instant,
    /// 0 is the first of its delivery.
    pub number: u8,
    /// What it says about the receiver.
    pub sign: ReceiverSign,
}

/// Why a circuit should open.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Opening {
    /// In words.
    pub reason: String,
    /// The earliest beginning of an attempt that was counted for it. If the circuit has closed since, it counts for nothing.
    pub counted_since: Instant,
}

/// The attempts of an endpoint in the last while, counted.
#[derive(Debug)]
pub struct AttemptWindow {
    begun: Instant,
    /// Number of the slice that is being filled, since `begun`.
    current: u128,
    slices: [Slice; SLICES as usize],
    failures_in_row: u32,
    /// When the first of them began.
    row_began: Option<Instant>,
    /// When the receiver last showed that it is up.
    up_at: Option<Instant>,
}

#[derive(Debug, Clone, Copy, Default)]
struct Slice {
    failed: u32,
    all: u32,
    earliest: Option<Instant>,
}

impl AttemptWindow {
    /// An empty one.
    pub fn new(now: Instant) -> Self {
        Self {
            begun: now,
            current: 0,
            slices: [Slice::default(); SLICES as usize],
            failures_in_row: 0,
            row_began: None,
            up_at: None,
        }
    }

    /// An empty one of a receiver that has just shown that it is up again.
    pub fn recovered(now: Instant) -> Self {
        Self { up_at: Some(now), ..Self::new(now) }
    }

    /// Counts an attempt that ended `now`. Answers why the circuit should open, if it should: with enough attempts, because
    /// too many of them failed; with few, because the last ones all did.
    pub fn count(
        &mut self,
        now: Instant,
        attempt: CountedAttempt,
        policy: &CircuitPolicy,
    ) -> Option<Opening> {
        self.forget_what_is_old(now, policy.window);
        let slice = self.slice(self.current);
        slice.all += 1;
        slice.failed += u32::from(attempt.sign != ReceiverSign::Well);
        slice.earliest = earlier(slice.earliest, Some(attempt.started));
        self.count_in_row(now, attempt, policy.window);
        let Slice { failed, all, earliest: mut counted_since } = self.sum();
        let reason = if all >= policy.attempts_min {
            let opens = policy.failure_rate.is_some_and(|rate| f64::from(failed) >= rate * f64::from(all));
            // an outage shows in a row of failures long before the successes of the window before it are outweighed
            let row = self.failures_in_row >= policy.attempts_min
                && self.row_began.is_some_and(|began| now.saturating_duration_since(began) >= OUTAGE_MIN);
            if opens {
                Some(format!("{failed} of {all} attempts failed within {} s", policy.window.as_secs()))
            } else if policy.failure_rate.is_some() && row {
                counted_since = self.row_began;
                Some(format!("{} attempts in a row failed", self.failures_in_row))
            } else {
                None
            }
        } else {
            // an endpoint that never opens by itself does not open by this either
            let enough = policy.failure_rate.and(policy.failures_in_row);
            let opens = enough.is_some_and(|enough| self.failures_in_row >= enough);
            opens.then(|| format!("{} attempts in a row failed", self.failures_in_row))
        };
        Some(Opening { reason: reason?, counted_since: counted_since.unwrap_or(now) })
    }

    /// Whether nothing of it counts any more.
    pub fn is_over(&self, now: Instant, policy: &CircuitPolicy) -> bool {
        let length = policy.window * 2;
        now.saturating_duration_since(self.begun) > length
            && self.number_of(now, policy.window) > self.current + u128::from(SLICES)
    }

    /// Failures in a row of a quiet endpoint include those of the attempt's own delivery, which other processes may have
    /// made: each of them sees too few.
    fn count_in_row(&mut self, now: Instant, attempt: CountedAttempt, window: Duration) {
        match attempt.sign {
            ReceiverSign::Well | ReceiverSign::RefusesEvent => {
                self.failures_in_row = 0;
                self.row_began = None;
                self.up_at = Some(now);
            }
            ReceiverSign::Failing => {
                self.failures_in_row = self.failures_in_row.saturating_add(1);
                self.row_began = self.row_began.or(Some(attempt.started));
                let was_up = self.up_at.is_some_and(|at| now.saturating_duration_since(at) <= window);
                if !was_up {
                    self.failures_in_row = self.failures_in_row.max(u32::from(attempt.number) + 1);
                }
            }
        }
    }

    fn sum(&self) -> Slice {
        self.slices.iter().fold(Slice::default(), |sum, slice| Slice {
            failed: sum.failed + slice.failed,
            all: sum.all + slice.all,
            earliest: earlier(sum.earliest, slice.earliest),
        })
    }

    fn forget_what_is_old(&mut self, now: Instant, window: Duration) {
        let current = self.number_of(now, window).max(self.current);
        for reused in (self.current + 1..=current).take(SLICES as usize) {
            *self.slice(reused) = Slice::default();
        }
        self.current = current;
    }

    fn number_of(&self, now: Instant, window: Duration) -> u128 {
        let length = (window / SLICES).max(Duration::from_millis(1));
        now.saturating_duration_since(self.begun).as_nanos() / length.as_nanos()
    }

    fn slice(&mut self, number: u128) -> &mut Slice {
        let index = usize::try_from(number % u128::from(SLICES)).expect("it is below SLICES");
        &mut self.slices[index]
    }
}

fn earlier(one: Option<Instant>, other: Option<Instant>) -> Option<Instant> {
    one.into_iter().chain(other).min()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn policy(parts: &CircuitParts) -> CircuitPolicy {
        CircuitPolicy::default().changed(parts).unwrap()
    }

    fn first(started: Instant, sign: ReceiverSign) -> CountedAttempt {
        CountedAttempt { started, number: 0, sign }
    }

    /// Counts a first attempt that begins and ends now.
    fn count(
        window: &mut AttemptWindow,
        now: Instant,
        failed: bool,
        policy: &CircuitPolicy,
    ) -> Option<String> {
        let sign = if failed { ReceiverSign::Failing } else { ReceiverSign::Well };
        window.count(now, first(now, sign), policy).map(|opening| opening.reason)
    }

    #[test]
    fn it_opens_at_the_rate_but_not_before_there_are_enough_attempts() {
        let policy = policy(&CircuitParts {
            failure_rate: Some(Some(0.5)),
            attempts_min: Some(10),
            ..CircuitParts::default()
        });
        let now = Instant::now();
        let mut window = AttemptWindow::new(now);
        for n in 1..10 {
            assert_eq!(count(&mut window, now, n % 2 == 0, &policy), None, "attempt {n}");
        }
        assert_eq!(count(&mut window, now, true, &policy).unwrap(), "5 of 10 attempts failed within 60 s");

        let mut healthy = AttemptWindow::new(now);
        assert!((0..100).all(|n| count(&mut healthy, now, n % 3 == 0, &policy).is_none()));
    }

    #[test]
    fn a_burst_of_failures_after_many_successes_opens_nothing() {
        let (now, policy) = (Instant::now(), CircuitPolicy::default());
        let mut window = AttemptWindow::new(now);
        assert!((0..3_000).all(|_| count(&mut window, now, false, &policy).is_none()));
        assert!((0..25).all(|_| count(&mut window, now, true, &policy).is_none()));
    }

    #[test]
    fn an_outage_after_many_successes_opens_it_once_it_is_no_hiccup() {
        let (now, policy) = (Instant::now(), CircuitPolicy::default());
        let mut window = AttemptWindow::new(now);
        assert!((0..3_000).all(|_| count(&mut window, now, false, &policy).is_none()));
        let at = |n: u32| now + Duration::from_millis(200) * n;
        assert!((0..19).all(|n| count(&mut window, at(n), true, &policy).is_none()));
        assert_eq!(count(&mut window, at(19), true, &policy).unwrap(), "20 attempts in a row failed");
    }

    #[test]
    fn with_little_traffic_a_few_failures_in_a_row_open_it_and_a_success_in_between_does_not_let_them() {
        let (now, policy) = (Instant::now(), CircuitPolicy::default());
        let mut window = AttemptWindow::new(now);
        assert!((0..4).all(|_| count(&mut window, now, true, &policy).is_none()));
        assert_eq!(count(&mut window, now, false, &policy), None);
        assert!((0..4).all(|_| count(&mut window, now, true, &policy).is_none()));
        assert_eq!(count(&mut window, now, true, &policy).unwrap(), "5 attempts in a row failed");
    }

    #[test]
    fn a_receiver_that_refuses_single_events_is_up() {
        let (now, policy) = (Instant::now(), CircuitPolicy::default());
        let mut window = AttemptWindow::new(now);
        assert!(
            (0..15).all(|_| window.count(now, first(now, ReceiverSign::RefusesEvent), &policy).is_none())
        );
    }

    #[test]
    fn what_a_delivery_failed_in_other_processes_counts_where_nothing_succeeds_here() {
        let (now, policy) = (Instant::now(), CircuitPolicy::default());
        let fifth = CountedAttempt { started: now, number: 4, sign: ReceiverSign::Failing };
        assert!(AttemptWindow::new(now).count(now, fifth, &policy).is_some());

        assert_eq!(AttemptWindow::recovered(now).count(now, fifth, &policy), None);
    }

    #[test]
    fn an_opening_says_since_when_it_counted() {
        let (now, policy) = (
            Instant::now(),
            policy(&CircuitParts { failures_in_row: Some(Some(2)), ..CircuitParts::default() }),
        );
        let mut window = AttemptWindow::new(now);
        let (earlier, now) = (now, now + Duration::from_secs(9));
        assert_eq!(window.count(now, first(earlier, ReceiverSign::Failing), &policy), None);
        let opening = window.count(now, first(now, ReceiverSign::Failing), &policy).unwrap();
        assert_eq!(opening.counted_since, earlier);
    }

    #[test]
    fn what_is_older_than_the_window_does_not_count() {
        let policy = policy(&CircuitParts {
            attempts_min: Some(2),
            failures_in_row: Some(None),
            ..CircuitParts::default()
        });
        let begun = Instant::now();
        let mut window = AttemptWindow::new(begun);
        assert_eq!(count(&mut window, begun, true, &policy), None);
        assert_eq!(count(&mut window, begun + Duration::from_secs(61), true, &policy), None);
        assert!(count(&mut window, begun + Duration::from_secs(70), true, &policy).is_some());
        let much_later = begun + Duration::from_hours(24);
        assert!(window.is_over(much_later, &policy));
        assert_eq!(count(&mut window, much_later, false, &policy), None);
        assert!(!window.is_over(much_later, &policy));
    }

    #[test]
    fn without_a_rate_it_never_opens_by_itself() {
        let policy = policy(&CircuitParts { failure_rate: Some(None), ..CircuitParts::default() });
        let now = Instant::now();
        let mut window = AttemptWindow::new(now);
        assert!((0..1_000).all(|_| count(&mut window, now, true, &policy).is_none()));
    }

    #[test]
    fn a_policy_out_of_bounds_is_refused_field_by_field() {
        let parts = CircuitParts {
            failure_rate: Some(Some(0.0)),
            window_ms: Some(1),
            attempts_min: Some(0),
            failures_in_row: Some(Some(0)),
            cooldown_ms: Some(2_000),
            cooldown_cap_ms: Some(1_000),
            ..CircuitParts::default()
        };
        let invalid = CircuitPolicy::default().changed(&parts).unwrap_err();
        let mut fields: Vec<_> = invalid.errors().iter().map(|error| error.field.as_str()).collect();
        fields.sort_unstable();
        let all = ["attempts_min", "cooldown_cap_ms", "failure_rate", "failures_in_row", "window_ms"];
        assert_eq!(fields, all.map(|field| format!("circuit.{field}")));
        for rate in [f64::NAN, -0.1, 1.1] {
            let parts = CircuitParts { failure_rate: Some(Some(rate)), ..CircuitParts::default() };
            assert!(CircuitPolicy::default().changed(&parts).is_err());
        }
    }

    #[test]
    fn nobody_half_opens_a_circuit_by_hand() {
        assert_eq!(CircuitCommand::parse("open"), Ok(CircuitCommand::Open));
        assert_eq!(CircuitCommand::parse("closed"), Ok(CircuitCommand::Close));
        assert!(CircuitCommand::parse("half_open").is_err());
    }
}
