//! Attempts: the single HTTP requests of a delivery, each with its outcome.

use std::net::SocketAddr;
use std::time::Duration;

use chrono::{DateTime, Utc};

use super::error_kind::ErrorKind;
use super::evidence::Evidence;

/// The error text of an attempt whose outcome nobody can know.
pub const OUTCOME_UNKNOWN: &str = "lease expired, outcome unknown";

/// How an attempt ended. A failed request is news about the receiver, not an error of ours.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum AttemptOutcome {
    /// The receiver answered.
    Answered(Answer),
    /// No answer came: the connection was refused, the receiver unreachable or too slow.
    Unanswered {
        /// The reason in words, without the query of the URL.
        error: String,
        /// The reason in a word.
        kind: ErrorKind,
        /// The address that was called, if it is known.
        address: Option<SocketAddr>,
    },
    /// The worker that made the attempt never reported how it ended.
    Unknown,
    /// Nothing was sent, for a reason on this side: an address that no setting allows, no name server, or no authorities to
    /// check certificates with. This says nothing about the receiver and uses up no attempt.
    NotSent {
        /// The reason in words, without the query of the URL.
        error: String,
        /// The reason in a word.
        kind: ErrorKind,
    },
}

/// What an attempt says about its receiver.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ReceiverSign {
    /// The receiver is up and accepted the event.
    Well,
    /// The receiver is up but refuses this event. It may accept others.
    RefusesEvent,
    /// The receiver does not answer, fails, or refuses all requests.
    Failing,
}

/// A receiver's answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Answer {
    /// The HTTP status.
    pub status: u16,
    /// The first bytes of the body, as text that can be stored.
    pub body: String,
    /// How long the receiver asks to be left alone, from `Retry-After`.
    pub retry_after: Option<Duration>,
    /// Why the body could not be read to its end; `None` if it was. The status counts in both cases.
    pub broken_off: Option<BrokenOff>,
    /// Where it came from, and what came with it.
    pub evidence: Evidence,
}

/// Why a body could not be read to its end.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BrokenOff {
    /// In words.
    pub error: String,
    /// In a word.
    pub kind: ErrorKind,
}

impl AttemptOutcome {
    /// The HTTP status, if an answer came.
    pub fn status(&self) -> Option<u16> {
        match self {
            Self::Answered(answer) => Some(answer.status),
            Self::Unanswered { .. } | Self::Unknown | Self::NotSent { .. } => None,
        }
    }

    /// What the outcome says about the receiver; `None` if nothing.
    pub fn sign(&self) -> Option<ReceiverSign> {
        match self {
            Self::Answered(Answer { status: 200..=299, .. }) => Some(ReceiverSign::Well),
            // credentials, a missing URL and rate limits concern all events, not this one
            Self::Answered(Answer {
                status: 401 | 403 | 404 | 407 | 408 | 410 | 421 | 423 | 425 | 426 | 429,
                ..
            }) => Some(ReceiverSign::Failing),
            Self::Answered(Answer { status: 400..=499, .. }) => Some(ReceiverSign::RefusesEvent),
            Self::Answered(_) | Self::Unanswered { .. } => Some(ReceiverSign::Failing),
            Self::Unknown | Self::NotSent { .. } => None,
        }
    }

    /// This outcome without the texts that came from outside, which the store may have refused.
    #[must_use]
    pub fn without_text(self) -> Self {
        match self {
            Self::Answered(answer) => Self::Answered(Answer {
                body: String::new(),
                broken_off: answer
                    .broken_off
                    .map(|cause| BrokenOff { error: "the response broke off".into(), ..cause }),
                evidence: answer.evidence.without_text(),
                ..answer
            }),
            Self::Unanswered { kind, address, .. } => {
                Self::Unanswered { error: "no answer".into(), kind, address }
            }
            Self::NotSent { kind, .. } => Self::NotSent { error: "nothing was sent".into(), kind },
            Self::Unknown => Self::Unknown,
        }
    }

    /// The start of the response's body, if an answer came.
    pub fn body(&self) -> Option<&str> {
        match self {
            Self::Answered(answer) => Some(&answer.body),
            Self::Unanswered { .. } | Self::Unknown | Self::NotSent { .. } => None,
        }
    }

    /// What went wrong, in words; `None` if nothing did.
    pub fn error(&self) -> Option<String> {
        match self {
            Self::Answered(Answer { broken_off: Some(BrokenOff { error, .. }), .. })
            | Self::Unanswered { error, .. }
            | Self::NotSent { error, .. } => Some(error.clone()),
            Self::Answered(Answer { status: 200..=299, .. }) => None,
            Self::Answered(Answer { status: 300..=399, .. }) => Some("redirects are not followed".into()),
            Self::Answered(answer) => Some(format!("the receiver answered {}", answer.status)),
            Self::Unknown => Some(OUTCOME_UNKNOWN.into()),
        }
    }

    /// What went wrong, in a word to count by; `None` if nothing did.
    pub fn error_kind(&self) -> Option<ErrorKind> {
        match self {
            Self::Answered(Answer { broken_off: Some(BrokenOff { kind, .. }), .. })
            | Self::Unanswered { kind, .. }
            | Self::NotSent { kind, .. } => Some(*kind),
            Self::Answered(Answer { status: 200..=299, .. }) => None,
            Self::Answered(_) => Some(ErrorKind::HttpStatus),
            Self::Unknown => Some(ErrorKind::OutcomeUnknown),
        }
    }

    /// What settles a dispute; `None` if nothing is known.
    pub fn evidence(&self) -> Option<Evidence> {
        let evidence = match self {
            Self::Answered(answer) => answer.evidence.clone(),
            Self::Unanswered { address, .. } => Evidence::of_address(*address),
            Self::Unknown | Self::NotSent { .. } => return None,
        };
        (!evidence.is_empty()).then_some(evidence)
    }

    /// About how many bytes of text it holds.
    pub fn text_bytes(&self) -> usize {
        match self {
            Self::Answered(Answer { body, evidence, .. }) => {
                body.len() + evidence.headers.as_ref().map_or(0, super::evidence::ResponseHeaders::bytes)
            }
            Self::Unanswered { error, .. } | Self::NotSent { error, .. } => error.len(),
            Self::Unknown => 0,
        }
    }
}

/// An attempt as the audit shows it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Attempt {
    /// 0 for the first attempt, 1 to 6 for retries.
    pub number: u8,
    /// Whether it was a failed probe of an open circuit. A probe uses up no attempt, so another attempt has this number too.
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
    /// The same, in a word.
    pub error_kind: Option<ErrorKind>,
    /// What settles a dispute.
    pub evidence: Evidence,
}
