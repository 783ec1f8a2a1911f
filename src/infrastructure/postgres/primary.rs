//! Finds the host that accepts writes among those that a database URL lists, and leaves it when it no longer does.
//!
//! If the URL names one host, that host is used, whatever it is. Of several, all are asked at the same time. If more than one
//! accepts writes, an old primary was not stopped when its standby was promoted: the one on the newest timeline is used, and
//! never again one that is older than what was used before.

use std::sync::Arc;
use std::time::Duration;

use futures_util::future::join_all;
use sqlx::postgres::PgConnectOptions;
use sqlx::{ConnectOptions as _, Connection as _, PgConnection};
use tokio::sync::{Mutex, watch};
use tokio::time::{Instant, timeout};
use tracing::{info, warn};

use super::hosts::Hosts;
use super::trouble::{Place, Trouble};

/// How long one host may take to say whether it accepts writes.
const HOST_LIMIT: Duration = Duration::from_secs(3);
/// The shortest time between two looks at all hosts.
const LOOK_AGAIN: Duration = Duration::from_millis(500);
/// How long it may take to connect to the host that is used.
const CONNECT_LIMIT: Duration = Duration::from_secs(5);

/// The way to a database: to its only host, or to the one of several that accepts writes.
#[derive(Clone)]
pub(super) struct Way(Arc<Inner>);

struct Inner {
    setting: &'static str,
    hosts: Vec<Host>,
    /// `None`: no host is known to accept writes.
    used: watch::Sender<Option<Used>>,
    looks: Mutex<Looks>,
}

struct Host {
    options: PgConnectOptions,
    place: Place,
}

/// A time during which one host is used.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Used {
    host: usize,
    /// Counts the changes of the host.
    turn: u64,
}

/// What earlier looks have found.
#[derive(Default)]
struct Looks {
    last: Option<(Instant, Result<(), Trouble>)>,
    /// How many times the host was changed.
    turns: u64,
    /// The newest timeline of a host that was used.
    timeline: i64,
    /// Hosts that accept writes although they should not: each is named in the log once.
    told_of: Vec<(usize, i64)>,
}

/// What a host says of itself.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Finding {
    /// It accepts writes. The timeline is 0 if it does not tell.
    Primary {
        timeline: i64,
    },
    /// It refuses writes.
    ReadOnly,
    Away(Trouble),
}

impl std::fmt::Debug for Way {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        // the options hold passwords
        f.debug_tuple("Way").field(&self.place()).finish()
    }
}

impl Way {
    /// `hosts` is the value of the setting with the name `setting`. Nothing is connected yet.
    pub(super) fn new(hosts: Hosts, setting: &'static str) -> Self {
        let hosts: Vec<Host> = hosts
            .into_options()
            .into_iter()
            .map(|options| {
                let options = super::ours(options);
                Host { place: Place::of(&options, setting), options }
            })
            .collect();
        let used = (hosts.len() == 1).then_some(Used { host: 0, turn: 0 });
        Self(Arc::new(Inner { setting, hosts, used: watch::Sender::new(used), looks: Mutex::default() }))
    }

    /// The name of the setting that lists the hosts.
    pub(super) fn setting(&self) -> &'static str {
        self.0.setting
    }

    /// Whether there is a choice.
    pub(super) fn has_choice(&self) -> bool {
        self.0.hosts.len() > 1
    }

    pub(super) fn options(&self, used: Used) -> &PgConnectOptions {
        &self.0.hosts[used.host].options
    }

    /// The host that is used, or the first if none is.
    pub(super) fn place(&self) -> &Place {
        &self.0.hosts[self.used().map_or(0, |used| used.host)].place
    }

    /// The host that is used at this moment.
    pub(super) fn used(&self) -> Option<Used> {
        *self.0.used.borrow()
    }

    /// The host that is used, as soon as there is one. Looks for it.
    pub(super) async fn wait_for_used(&self) -> Used {
        let mut changes = self.0.used.subscribe();
        loop {
            if let Some(used) = *changes.borrow_and_update() {
                return used;
            }
            self.look_again(None);
            // a look may find none: then another one is due
            let _ = timeout(LOOK_AGAIN, changes.changed()).await;
        }
    }

    /// Returns when another host is used than this.
    pub(super) async fn left(&self, used: Used) {
        let mut changes = self.0.used.subscribe();
        // this holds the sender, so there is always one
        let _ = changes.wait_for(|now| *now != Some(used)).await;
    }

    /// A connection to the only host, or to the one that accepts writes.
    pub(super) async fn connect(&self) -> Result<(PgConnection, &Place), Trouble> {
        let used = match self.used() {
            Some(used) => used,
            None => self.look(None).await?,
        };
        match self.connect_to(used).await {
            Ok(connection) => Ok((connection, self.place_of(used))),
            Err(trouble) if !self.has_choice() => Err(trouble),
            Err(trouble) => match self.look(Some(used)).await {
                Ok(other) if other != used => Ok((self.connect_to(other).await?, self.place_of(other))),
                Ok(_) => Err(trouble),
                Err(nowhere) => Err(nowhere),
            },
        }
    }

    fn place_of(&self, used: Used) -> &Place {
        &self.0.hosts[used.host].place
    }

    async fn connect_to(&self, used: Used) -> Result<PgConnection, Trouble> {
        let place = self.place_of(used);
        let connecting = async {
            let mut connection = self.options(used).connect().await?;
            let accepts = self.confirm(&mut connection, used).await?;
            Ok::<_, sqlx::Error>((connection, accepts))
        };
        match timeout(CONNECT_LIMIT, connecting).await {
            Ok(Ok((connection, true))) => Ok(connection),
            Ok(Ok((_, false))) => Err(Trouble::read_only(place)),
            Ok(Err(error)) => Err(Trouble::of(&error, place)),
            Err(_) => Err(Trouble::silence(place)),
        }
    }

    /// Whether a new connection leads to a host that accepts writes, if there is a choice. If not, the host is left at once.
    pub(super) async fn confirm(&self, connection: &mut PgConnection, used: Used) -> sqlx::Result<bool> {
        if !self.has_choice() || !refuses_writes(connection).await? {
            return Ok(true);
        }
        self.0.leave(used);
        self.look_again(None);
        Ok(false)
    }

    /// Looks again in the background whether `used` still is the right host, because something went wrong with it.
    pub(super) fn doubt(&self, used: Used) {
        if self.has_choice() && self.used() == Some(used) {
            self.look_again(Some(used));
        }
    }

    fn look_again(&self, doubted: Option<Used>) {
        if self.0.looks.try_lock().is_err() {
            // a look is under way
            return;
        }
        let inner = self.0.clone();
        tokio::spawn(async move { inner.look(doubted).await });
    }

    /// A look goes on if its caller has gone.
    async fn look(&self, doubted: Option<Used>) -> Result<Used, Trouble> {
        let inner = self.0.clone();
        let look = tokio::spawn(async move { inner.look(doubted).await });
        look.await.unwrap_or_else(|_| Err(Trouble::silence(self.place())))
    }
}

/// Whether a session may not write: on a standby, or where this is set.
async fn refuses_writes(connection: &mut PgConnection) -> sqlx::Result<bool> {
    sqlx::query_scalar(
        "-- primary.refuses_writes
        select pg_is_in_recovery() or current_setting('transaction_read_only')::bool",
    )
    .fetch_one(connection)
    .await
}

impl Host {
    async fn ask(&self) -> Finding {
        let asking = async {
            let mut connection = self.options.connect().await?;
            let finding = if refuses_writes(&mut connection).await? {
                Finding::ReadOnly
            } else {
                // not every service that speaks PostgreSQL's protocol has timelines
                let timeline: Option<String> = sqlx::query_scalar(
                    "-- primary.timeline
                    select left(pg_walfile_name(pg_current_wal_lsn()), 8)",
                )
                .fetch_one(&mut connection)
                .await
                .ok();
                let timeline = timeline.and_then(|hex| i64::from_str_radix(&hex, 16).ok()).unwrap_or(0);
                Finding::Primary { timeline }
            };
            // an answer is an answer, however the connection ends
            let _ = connection.close().await;
            Ok(finding)
        };
        match timeout(HOST_LIMIT, asking).await {
            Ok(Ok(finding)) => finding,
            Ok(Err(error)) => Finding::Away(Trouble::of(&error, &self.place)),
            Err(_) => Finding::Away(Trouble::silence(&self.place)),
        }
    }
}

impl Inner {
    /// Asks all hosts, unless that was done a moment ago or another host than the doubted one is used by now.
    async fn look(&self, doubted: Option<Used>) -> Result<Used, Trouble> {
        let mut looks = self.looks.lock().await;
        let used = *self.used.borrow();
        if let Some(used) = used.filter(|used| Some(*used) != doubted) {
            return Ok(used);
        }
        if let Some((at, outcome)) = &looks.last
            && at.elapsed() < LOOK_AGAIN
            && (used.is_some() || outcome.is_err())
        {
            return outcome.clone().and_then(|()| used.ok_or_else(|| Trouble::silence(&self.hosts[0].place)));
        }
        let findings = join_all(self.hosts.iter().map(Host::ask)).await;
        // a new connection may have been refused writes in the meantime
        let used = *self.used.borrow();
        let chosen = choose(&findings, used.map(|used| used.host), looks.timeline);
        self.tell_of_old_primaries(&findings, chosen, &mut looks);
        let outcome = if let Some(host) = chosen {
            Ok(self.use_host(host, used, &findings, &mut looks))
        } else {
            // what is away may come back, and connections to it may still work; what refuses writes is of no use
            if let Some(used) = used.filter(|used| findings[used.host] == Finding::ReadOnly) {
                self.leave(used);
            }
            Err(self.no_primary(&findings))
        };
        looks.last = Some((Instant::now(), outcome.clone().map(drop)));
        outcome
    }

    fn use_host(&self, host: usize, used: Option<Used>, findings: &[Finding], looks: &mut Looks) -> Used {
        if let Finding::Primary { timeline } = findings[host] {
            looks.timeline = looks.timeline.max(timeline);
        }
        if let Some(used) = used.filter(|used| used.host == host) {
            return used;
        }
        let address = self.hosts[host].place.address();
        match used {
            None => info!("PostgreSQL at {address} accepts writes and is used"),
            Some(left) => warn!(
                "PostgreSQL at {address} accepts writes and is used from now on instead of {}: {}",
                self.hosts[left.host].place.address(),
                self.reason(left.host, &findings[left.host])
            ),
        }
        if looks.turns == 0 {
            for (other, finding) in findings.iter().enumerate() {
                if let Finding::Away(trouble) = finding {
                    let address = self.hosts[other].place.address();
                    warn!("a failover to {address} is not possible now: {trouble}");
                }
            }
        }
        looks.turns += 1;
        let used = Used { host, turn: looks.turns };
        self.used.send_replace(Some(used));
        used
    }

    /// Stops using a host, unless another one is used by now.
    fn leave(&self, left: Used) {
        let was_used = self.used.send_if_modified(|used| {
            let is_used = *used == Some(left);
            if is_used {
                *used = None;
            }
            is_used
        });
        if was_used {
            warn!(
                "PostgreSQL at {} is left: {}; looking for the host in {} that accepts writes",
                self.hosts[left.host].place.address(),
                self.reason(left.host, &Finding::ReadOnly),
                self.setting
            );
        }
    }

    fn tell_of_old_primaries(&self, findings: &[Finding], chosen: Option<usize>, looks: &mut Looks) {
        for (host, finding) in findings.iter().enumerate() {
            let Finding::Primary { timeline } = *finding else { continue };
            if chosen == Some(host) || looks.told_of.contains(&(host, timeline)) {
                continue;
            }
            looks.told_of.push((host, timeline));
            warn!(
                "PostgreSQL at {} accepts writes on timeline {timeline}, but is not used, since there is another primary: if it \
                 was not stopped before a standby was promoted, what is written there is lost; stop it",
                self.hosts[host].place.address()
            );
        }
    }

    fn reason(&self, host: usize, finding: &Finding) -> String {
        match finding {
            Finding::Primary { timeline } => format!("it is on timeline {timeline}, which is older"),
            Finding::ReadOnly => {
                format!(
                    "{} is a standby, or default_transaction_read_only is on",
                    self.hosts[host].place.address()
                )
            }
            Finding::Away(trouble) => trouble.to_string(),
        }
    }

    fn no_primary(&self, findings: &[Finding]) -> Trouble {
        let reasons: Vec<String> =
            findings.iter().enumerate().map(|(host, finding)| self.reason(host, finding)).collect();
        let passes = |finding: &Finding| !matches!(finding, Finding::Away(trouble) if !trouble.passes());
        Trouble::no_primary(self.setting, &reasons.join("; "), findings.iter().any(passes))
    }
}

/// The host to use: of those that accept writes the one on the newest timeline, then the one that is used already, then the first.
/// None that is older than `timeline_min`; a timeline that is not known (0) is not compared.
fn choose(findings: &[Finding], used: Option<usize>, timeline_min: i64) -> Option<usize> {
    let primaries = findings.iter().enumerate().filter_map(|(host, finding)| match finding {
        Finding::Primary { timeline } if *timeline >= timeline_min || *timeline == 0 => {
            Some((host, *timeline))
        }
        Finding::Primary { .. } | Finding::ReadOnly | Finding::Away(_) => None,
    });
    primaries
        .max_by_key(|(host, timeline)| (*timeline, used == Some(*host), std::cmp::Reverse(*host)))
        .map(|(host, _)| host)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_newest_primary_is_used_and_none_that_is_older_than_what_was_used() {
        use Finding::ReadOnly;
        let primary = |timeline| Finding::Primary { timeline };
        let away = || Finding::Away(Trouble::lasting("is away"));
        for (findings, used, timeline_min, expected) in [
            (vec![primary(1), ReadOnly], None, 0, Some(0)),
            (vec![away(), primary(2)], Some(0), 1, Some(1)),
            (vec![ReadOnly, away()], Some(0), 1, None),
            // both accept writes
            (vec![primary(1), primary(2)], Some(0), 1, Some(1)),
            (vec![primary(1), primary(1)], Some(1), 1, Some(1)),
            (vec![primary(1), primary(1)], None, 0, Some(0)),
            // an old primary has come back, and the new one is away
            (vec![primary(1), away()], Some(1), 2, None),
            // no timelines
            (vec![primary(0), away()], Some(1), 0, Some(0)),
        ] {
            assert_eq!(choose(&findings, used, timeline_min), expected, "{findings:?}");
        }
    }
}
