//! Attempts: single HTTP requests of a delivery, and how they end.

use std::time::Duration;

use chrono::{DateTime, Utc};

/// What is written where nobody can know how an attempt ended.
pub const OUTCOME_UNKNOWN: &str = "lease expired, outcome unknown";

/// How an attempt ended. A failed request is news about the receiver, not an error of ours.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum AttemptOutcome {
    /// The receiver answered.
    Answered(Answer),
    /// It did not: refused, unreachable, too slow, forbidden.
    Unanswered {
        /// Why, in words; without the query of the URL.
        error: String,
    },
    /// The worker that made the attempt never told how it ended.
    Unknown,
}

/// A receiver's answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Answer {
    /// The HTTP status.
    pub status: u16,
    /// The first bytes of the body, as text that can be stored.
    pub body: String,
    /// How long the receiver asks to be left alone.
    pub retry_after: Option<Duration>,
    /// Why the body could not be read to its end, if so. The status counts all the same.
    pub broken_off: Option<String>,
}

impl AttemptOutcome {
    /// The HTTP status, if an answer came.
    pub fn status(&self) -> Option<u16> {
        match self {
            Self::Answered(answer) => Some(answer.status),
            Self::Unanswered { .. } | Self::Unknown => None,
        }
    }

    /// The start of the response's body, if an answer came.
    pub fn body(&self) -> Option<&str> {
        match self {
            Self::Answered(answer) => Some(&answer.body),
            Self::Unanswered { .. } | Self::Unknown => None,
        }
    }

    /// What went wrong, in words; `None` if nothing did.
    pub fn error(&self) -> Option<String> {
        match self {
            Self::Answered(Answer { broken_off: Some(error), .. }) | Self::Unanswered { error } => {
                Some(error.clone())
            }
            Self::Answered(Answer { status: 200..=299, .. }) => None,
            Self::Answered(Answer { status: 300..=399, .. }) => Some("redirects are not followed".into()),
            Self::Answered(answer) => Some(format!("the receiver answered {}", answer.status)),
            Self::Unknown => Some(OUTCOME_UNKNOWN.into()),
        }
    }
}

/// An attempt as the audit shows it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Attempt {
    /// 0 is the first, 1 to 6 are retries.
    pub number: u8,
    /// Whether it was a probe of an open circuit that failed, and so used up no attempt: another has this number too.
    pub probe: bool,
    /// When it began.
    pub started_at: DateTime<Utc>,
    /// When it ended.
    pub completed_at: Option<DateTime<Utc>>,
    /// From connect to the end of the body, in milliseconds; unknown if the worker was lost.
    pub duration_ms: Option<i32>,
    /// The HTTP status, if an answer came.
    pub http_status: Option<i16>,
    /// The start of the response's body.
    pub response_body: Option<String>,
    /// What went wrong, in words.
    pub error: Option<String>,
}
