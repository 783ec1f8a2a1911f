//! What each statement of the lease protocol does to the store, as a value.
//!
//! This is the one description that both tests stand on: the model checks all runs of it, and a state machine
//! (`tests/it/lease_machine.rs`) compares the statements of the real store with it, one by one. There is one endpoint. Its
//! deliveries are numbered, and time is what the steps say it is.

/// The most attempts of a delivery that are recorded here.
pub const ATTEMPTS_MAX: usize = 3;

/// The name of a worker. A name that is given up is never used again.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Name(pub u8);

/// A worker's right to send a delivery.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Lease {
    pub name: Name,
    /// When it was taken: 0 with the delivery itself, then one more for each lease of the delivery.
    pub at: u8,
}

/// What keeps a statement from touching a lease that it does not name. Without one of them the protocol is broken, and
/// the tests must notice.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Fences {
    /// A settle names its lease.
    pub settle: bool,
    /// A release names its lease.
    pub release: bool,
    /// The outcome of a probe moves a circuit only if no later probe was sent.
    pub circuit: bool,
}

impl Fences {
    /// The protocol as it is.
    pub const ALL: Self = Self { settle: true, release: true, circuit: true };
}

/// Where a delivery is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Place {
    /// It was not accepted, or not yet.
    Absent,
    Pending {
        /// Whether a claim may take it. If not, it waits for the time of its next attempt.
        ready: bool,
    },
    Leased {
        lease: Lease,
        /// Whether its time has passed.
        over: bool,
    },
    Completed,
    Failed,
}

/// How an attempt ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Answer {
    Success,
    /// The receiver refused, or did not answer in time.
    Failure,
}

/// An attempt in the audit.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Record {
    /// What was seen under this lease.
    Known { lease: Lease, answer: Answer },
    /// Nobody knows. It stands for the request that may have been sent under the lost lease, if there was one.
    Unknown { lost: Option<Lease> },
}

/// What an attempt means for its delivery.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Ending {
    Completed,
    Retry,
    DeadLetter,
    /// A probe failed: no attempt is used up.
    WaitsOn,
}

/// An attempt that a settle writes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Finished {
    pub lease: Lease,
    pub number: u8,
    /// `None` for a loss.
    pub answer: Option<Answer>,
    pub ending: Ending,
}

/// What a lease is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Work {
    Attempt { probe: bool },
    RecordLoss,
}

/// A lease that a claim took.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Taken {
    pub lease: Lease,
    /// The number of the attempt.
    pub number: u8,
    pub work: Work,
}

/// A delivery.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Row {
    pub place: Place,
    /// The lease that expired before the present one was taken. Its outcome still counts.
    pub abandoned: Option<Lease>,
    /// The number of the attempt that is next, under way, or was the last.
    pub attempt: u8,
    pub audit: [Option<Record>; ATTEMPTS_MAX],
    /// The leases under which failed probes were sent.
    pub probes: Vec<Lease>,
    /// When the last lease was taken.
    pub clock: u8,
}

impl Row {
    fn absent() -> Self {
        Self {
            place: Place::Absent,
            abandoned: None,
            attempt: 0,
            audit: [None; ATTEMPTS_MAX],
            probes: Vec::new(),
            clock: 0,
        }
    }

    /// Whether it will never change again.
    pub fn is_terminal(&self) -> bool {
        matches!(self.place, Place::Completed | Place::Failed)
    }

    /// Whether it is under this lease, expired or not.
    pub fn is_under(&self, lease: Lease) -> bool {
        matches!(self.place, Place::Leased { lease: present, .. } if present == lease)
    }
}

/// The circuit of the endpoint.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Circuit {
    Closed,
    Open {
        /// Whether it is time for a probe.
        due: bool,
    },
    HalfOpen {
        /// The delivery and the lease of the probe; `None` if it was given back unsent.
        probe: Option<(usize, Lease)>,
        /// Whether it is time for another probe, because this one counts as lost or was given back.
        due: bool,
    },
}

/// The database.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Store {
    pub rows: Vec<Row>,
    pub circuit: Circuit,
}

impl Store {
    /// A store that has yet to accept so many deliveries.
    pub fn new(deliveries: usize, circuit: Circuit) -> Self {
        Self { rows: vec![Row::absent(); deliveries], circuit }
    }

    /// `webhook_enqueue`: stores the delivery, under a lease of `wanted` if nothing can hold it back.
    pub fn enqueue(&mut self, delivery: usize, wanted: Option<Name>) -> Option<Taken> {
        let row = &mut self.rows[delivery];
        assert_eq!(row.place, Place::Absent, "an event is accepted once");
        let name = wanted.filter(|_| self.circuit == Circuit::Closed);
        let lease = name.map(|name| Lease { name, at: 0 });
        row.place =
            lease.map_or(Place::Pending { ready: true }, |lease| Place::Leased { lease, over: false });
        lease.map(|lease| Taken { lease, number: 0, work: Work::Attempt { probe: false } })
    }

    /// Whether a claim may take the delivery.
    pub fn may_claim(&self, delivery: usize) -> bool {
        match (self.circuit, self.rows[delivery].place) {
            (Circuit::Closed, Place::Pending { ready: true } | Place::Leased { over: true, .. })
            | (
                Circuit::Open { due: true } | Circuit::HalfOpen { due: true, .. },
                Place::Pending { ready: true },
            ) => true,
            (Circuit::Closed | Circuit::Open { .. } | Circuit::HalfOpen { .. }, _) => false,
        }
    }

    /// Whether the lease of the delivery expired at an endpoint that claims skip.
    pub fn may_take_over_held(&self, delivery: usize) -> bool {
        self.circuit != Circuit::Closed
            && matches!(self.rows[delivery].place, Place::Leased { over: true, .. })
    }

    /// `webhook_claim`: takes a lease on a delivery that may be claimed, or taken over.
    pub fn take(&mut self, delivery: usize, name: Name) -> Taken {
        let row = &mut self.rows[delivery];
        row.clock += 1;
        let lease = Lease { name, at: row.clock };
        let work = match row.place {
            Place::Leased { lease: expired, over: true } => {
                row.abandoned = row.abandoned.or(Some(expired));
                Work::RecordLoss
            }
            Place::Pending { ready: true } => {
                row.abandoned = None;
                Work::Attempt { probe: self.circuit != Circuit::Closed }
            }
            place => panic!("{place:?} cannot be claimed"),
        };
        row.place = Place::Leased { lease, over: false };
        if work == (Work::Attempt { probe: true }) {
            self.circuit = Circuit::HalfOpen { probe: Some((delivery, lease)), due: false };
        }
        Taken { lease, number: row.attempt, work }
    }

    /// `webhook_settle_N_retry`, `webhook_settle_N_terminal` and `webhook_settle_probe`. Returns whether the attempt was
    /// written.
    pub fn settle(&mut self, delivery: usize, finished: Finished, fences: Fences) -> bool {
        let Finished { lease, number, answer, ending } = finished;
        let row = &mut self.rows[delivery];
        let is_leased = matches!(row.place, Place::Leased { .. });
        let is_open = is_leased || matches!(row.place, Place::Pending { .. });
        let is_own = row.is_under(lease) && row.attempt == number;
        // a known outcome that comes late, before the delivery was sent again
        let is_late = match ending {
            Ending::Completed | Ending::Retry | Ending::DeadLetter => {
                is_open && (row.attempt == number || row.attempt == number + 1)
            }
            Ending::WaitsOn => is_leased,
        };
        let may = is_own || is_late && row.abandoned == Some(lease);
        if !(may || !fences.settle && is_leased) {
            return false;
        }
        let record = match answer {
            Some(answer) => Record::Known { lease, answer },
            None => Record::Unknown { lost: row.abandoned },
        };
        // nobody knows yet: what is known may still come
        let abandoned = if answer.is_none() { row.abandoned } else { None };
        match ending {
            Ending::WaitsOn => {
                row.probes.push(lease);
                row.place = Place::Pending { ready: true };
            }
            Ending::Retry => {
                row.audit[usize::from(number)] = Some(record);
                row.attempt = number + 1;
                row.place = Place::Pending { ready: false };
            }
            Ending::Completed | Ending::DeadLetter => {
                row.audit[usize::from(number)] = Some(record);
                row.audit[usize::from(number) + 1..].fill(None);
                row.attempt = number;
                row.place = if ending == Ending::Completed { Place::Completed } else { Place::Failed };
            }
        }
        row.abandoned = if row.is_terminal() { None } else { abandoned };
        true
    }

    /// `webhook_release`: gives a lease back that nobody uses. `at` is `None` for the lease that the delivery was stored
    /// under. Returns whether there was one.
    pub fn release(&mut self, delivery: usize, name: Name, at: Option<u8>, fences: Fences) -> bool {
        let row = &mut self.rows[delivery];
        let Place::Leased { lease: present, .. } = row.place else { return false };
        let named = at.or((row.attempt == 0).then_some(0)).map(|at| Lease { name, at });
        let is_present = named == Some(present);
        let is_abandoned = named.is_some() && named == row.abandoned;
        if (is_present || !fences.release)
            && let Circuit::HalfOpen { probe: Some(probe), .. } = self.circuit
            && probe == (delivery, present)
        {
            self.circuit = Circuit::HalfOpen { probe: None, due: true };
        }
        if !(is_present || is_abandoned || !fences.release) {
            return false;
        }
        row.place = match row.abandoned.take() {
            // what was taken over is a lost lease again
            Some(lost) if !is_abandoned => Place::Leased { lease: lost, over: true },
            Some(_) | None => Place::Pending { ready: true },
        };
        true
    }

    /// `webhook_release_lost_claims`: gives back what is under names that are no longer in use, except for the deliveries in
    /// `kept`. Returns how many there were.
    pub fn release_lost_claims(&mut self, names: &[Name], kept: &[usize], fences: Fences) -> usize {
        let lost = |(delivery, row): (usize, &Row)| {
            let Place::Leased { lease, .. } = row.place else { return None };
            let is_lost = |lease: &Lease| names.contains(&lease.name);
            let unused = Some(lease).filter(is_lost).or(row.abandoned.filter(is_lost))?;
            (!kept.contains(&delivery)).then_some((delivery, unused))
        };
        let unused: Vec<(usize, Lease)> = self.rows.iter().enumerate().filter_map(lost).collect();
        unused
            .into_iter()
            .filter(|&(delivery, lease)| self.release(delivery, lease.name, Some(lease.at), fences))
            .count()
    }

    /// `webhook_promote`, when the time of the next attempt has come.
    pub fn promote(&mut self, delivery: usize) {
        let row = &mut self.rows[delivery];
        assert_eq!(row.place, Place::Pending { ready: false }, "only what is scheduled is promoted");
        row.place = Place::Pending { ready: true };
    }

    /// The time of a lease passes, and with it the time after which its probe counts as lost.
    pub fn expire(&mut self, delivery: usize) {
        let Place::Leased { lease, over } = &mut self.rows[delivery].place else {
            panic!("there is no lease")
        };
        *over = true;
        if let Circuit::HalfOpen { probe: Some(probe), due } = &mut self.circuit
            && *probe == (delivery, *lease)
        {
            *due = true;
        }
    }

    /// Opens a closed circuit.
    pub fn open_circuit(&mut self) {
        if self.circuit == Circuit::Closed {
            self.circuit = Circuit::Open { due: false };
        }
    }

    /// A probe succeeded.
    pub fn close_circuit(&mut self) {
        if let Circuit::HalfOpen { .. } = self.circuit {
            self.circuit = Circuit::Closed;
        }
    }

    /// The probe of `delivery` under `lease` failed.
    pub fn reopen_circuit(&mut self, delivery: usize, lease: Lease, fences: Fences) {
        if let Circuit::HalfOpen { probe, .. } = self.circuit
            && (probe == Some((delivery, lease)) || !fences.circuit)
        {
            self.circuit = Circuit::Open { due: false };
        }
    }

    /// The time of the next probe comes.
    pub fn probe_falls_due(&mut self) {
        match &mut self.circuit {
            Circuit::Closed => panic!("a closed circuit is not probed"),
            Circuit::Open { due } | Circuit::HalfOpen { due, .. } => *due = true,
        }
    }
}
