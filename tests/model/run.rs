//! What processes do with the statements of [`protocol`](crate::protocol), and what can go wrong at any point.
//!
//! A process that stands still is one that takes no step while others do, and while time passes. So a pause needs no step
//! of its own: it is a lease that expires under a process that lives.

use crate::protocol::{
    Answer, Circuit, Ending, Fences, Finished, Lease, Name, Place, Record, Row, Store, Taken, Work,
};

/// How many processes there are. Each has one worker with one slot.
pub const PROCESSES: usize = 2;

/// How much may go wrong in one run.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Faults {
    /// Faults of any kind: a process that stands still until a lease of its own is over; a process that is killed, and replaced;
    /// a statement whose answer is lost, and which is executed at once, later, or never; a lease that is given back because
    /// storing took too long or the endpoint cannot be read.
    pub any: u8,
    /// How often the circuit opens.
    pub openings: u8,
    /// Probes that find the receiver failing.
    pub failed_probes: u8,
}

/// What is explored.
#[derive(Debug, Clone, Copy)]
pub struct Run {
    pub deliveries: usize,
    pub retries_max: u8,
    pub circuit: Circuit,
    pub faults: Faults,
    pub fences: Fences,
    /// Whether an answer that has come outweighs a time limit that has passed.
    pub answers_first: bool,
}

/// A statement whose caller was not answered. Nobody knows whether, or when, it is executed.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum Statement {
    Enqueue { delivery: usize, wanted: Option<Name> },
    Claim { name: Name },
    TakeOverHeld { name: Name },
    Settle { delivery: usize, finished: Finished },
    Release { delivery: usize, name: Name, at: Option<u8> },
    ReleaseLostClaims { names: Vec<Name>, kept: Vec<usize> },
}

/// How far an attempt has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Stage {
    Claimed,
    /// The request is sent.
    Sent {
        /// Whether an answer is in the socket: a success. If none comes in time, that is a failure.
        answered: bool,
    },
    /// The outcome was to be written, and the answer to that was lost.
    InDoubt {
        outcome: Answer,
    },
    /// A probe is written, and the circuit is yet to be informed.
    Noting {
        outcome: Answer,
    },
}

/// A slot in use.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Hold {
    pub delivery: usize,
    pub lease: Lease,
    pub number: u8,
    pub probe: bool,
    pub stage: Stage,
    /// Whether the time of the lease has passed, by the clock of the process.
    pub over: bool,
}

/// A takeover that is to be recorded as a loss.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Loss {
    pub delivery: usize,
    pub lease: Lease,
    pub number: u8,
}

/// The memory of a process.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Process {
    /// The name of its worker.
    pub name: Name,
    pub slot: Option<Hold>,
    pub losses: Vec<Loss>,
    /// Names that it gave up after a claim in doubt.
    pub disowned: Vec<Name>,
    /// Deliveries that may be stored under a lease that nobody uses.
    pub unconfirmed: Vec<(usize, Name)>,
}

impl Process {
    fn named(name: Name) -> Self {
        Self { name, slot: None, losses: Vec::new(), disowned: Vec::new(), unconfirmed: Vec::new() }
    }
}

/// A request that the receiver got.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Request {
    pub lease: Lease,
    /// Whether the receiver took it and said so.
    pub answered: bool,
}

/// What must never happen, and has.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash)]
pub struct Flaws {
    pub overwritten: bool,
    pub invented_loss: bool,
    pub sent_too_soon: bool,
}

/// Everything there is.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct World {
    pub store: Store,
    pub processes: Vec<Process>,
    pub limbo: Option<Statement>,
    pub left: Faults,
    /// How many deliveries someone has asked to accept.
    pub asked: usize,
    pub names: u8,
    pub requests: Vec<Vec<Request>>,
    pub flaws: Flaws,
}

/// How a statement goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Fate {
    Answered,
    AnswerLost,
}

/// One thing that happens.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Step {
    /// A process stores the next delivery, with a lease if its slot is free and reserved.
    Enqueue {
        process: usize,
        reserved: bool,
        fate: Fate,
    },
    /// The same, so slowly that the lease is too old to be used.
    EnqueueSlowly {
        process: usize,
    },
    Claim {
        process: usize,
        delivery: usize,
    },
    ClaimAnswerLost {
        process: usize,
    },
    TakeOverHeld {
        process: usize,
        delivery: usize,
    },
    TakeOverAnswerLost {
        process: usize,
    },
    Send {
        process: usize,
    },
    GiveBack {
        process: usize,
        fate: Fate,
    },
    /// A takeover whose endpoint cannot be read.
    GiveBackLoss {
        process: usize,
        loss: usize,
    },
    ReceiverAnswers {
        process: usize,
    },
    Settle {
        process: usize,
        outcome: Answer,
        fate: Fate,
    },
    /// Other attempts have failed.
    OpenCircuit,
    NoteProbe {
        process: usize,
    },
    RecordLoss {
        process: usize,
        loss: usize,
        fate: Fate,
    },
    ReleaseUnconfirmed {
        process: usize,
        entry: usize,
        fate: Fate,
    },
    ReleaseLostClaims {
        process: usize,
        fate: Fate,
    },
    Promote {
        delivery: usize,
    },
    ProbeFallsDue,
    LeaseExpires {
        delivery: usize,
    },
    /// The same, while the process that holds it stands still.
    LeaseExpiresInUse {
        delivery: usize,
    },
    Crash {
        process: usize,
    },
    /// The statement in limbo is executed after all. If it is a claim, it takes this delivery.
    LateCommit {
        delivery: Option<usize>,
    },
}

impl Step {
    /// Whether it may just as well never happen.
    pub fn is_fault(&self) -> bool {
        match self {
            Self::EnqueueSlowly { .. }
            | Self::ClaimAnswerLost { .. }
            | Self::TakeOverAnswerLost { .. }
            | Self::GiveBackLoss { .. }
            | Self::OpenCircuit
            | Self::LeaseExpiresInUse { .. }
            | Self::LateCommit { .. }
            | Self::Crash { .. } => true,
            Self::Enqueue { fate, .. }
            | Self::GiveBack { fate, .. }
            | Self::Settle { fate, .. }
            | Self::RecordLoss { fate, .. }
            | Self::ReleaseUnconfirmed { fate, .. }
            | Self::ReleaseLostClaims { fate, .. } => *fate == Fate::AnswerLost,
            Self::Claim { .. }
            | Self::TakeOverHeld { .. }
            | Self::Send { .. }
            | Self::ReceiverAnswers { .. }
            | Self::NoteProbe { .. }
            | Self::Promote { .. }
            | Self::ProbeFallsDue
            | Self::LeaseExpires { .. } => false,
        }
    }
}

impl World {
    /// The process whose slot is in use under this lease.
    pub fn holder(&self, delivery: usize, lease: Lease) -> Option<usize> {
        self.processes.iter().position(|process| {
            process.slot.is_some_and(|hold| hold.delivery == delivery && hold.lease == lease)
        })
    }

    fn is_used(&self, delivery: usize, lease: Lease) -> bool {
        let records = |process: &Process| {
            process.losses.iter().any(|loss| loss.delivery == delivery && loss.lease == lease)
        };
        self.holder(delivery, lease).is_some() || self.processes.iter().any(records)
    }

    /// Whether the outcome of the request that was sent under this lease stands in the audit.
    fn records(&self, delivery: usize, lease: Lease) -> bool {
        let row = &self.store.rows[delivery];
        let is_it = |record: &Record| matches!(record, Record::Known { lease: of, .. } if *of == lease);
        row.probes.contains(&lease) || row.audit.iter().flatten().any(is_it)
    }

    /// Whether the audit says what became of the request that was sent under this lease.
    pub fn accounts_for(&self, delivery: usize, lease: Lease) -> bool {
        let lost = Some(Record::Unknown { lost: Some(lease) });
        self.records(delivery, lease) || self.store.rows[delivery].audit.contains(&lost)
    }

    /// How many times more than once the receiver took the delivery.
    pub fn duplicates(&self, delivery: usize) -> usize {
        self.requests[delivery].iter().filter(|request| request.answered).count().saturating_sub(1)
    }

    /// How many requests stand in the audit as lost.
    pub fn losses(&self, delivery: usize) -> usize {
        let is_lost = |lease: Lease| {
            self.store.rows[delivery].audit.contains(&Some(Record::Unknown { lost: Some(lease) }))
        };
        self.requests[delivery].iter().filter(|request| is_lost(request.lease)).count()
    }

    /// How many probes are sent, or about to be, under a lease whose time has not passed.
    pub fn probes_under_way(&self) -> usize {
        let holds = self.processes.iter().filter_map(|process| process.slot);
        holds
            .filter(|hold| {
                hold.probe && !hold.over && matches!(hold.stage, Stage::Claimed | Stage::Sent { .. })
            })
            .count()
    }
}

impl Run {
    pub fn beginning(&self) -> World {
        World {
            store: Store::new(self.deliveries, self.circuit),
            processes: (0..PROCESSES).map(|p| Process::named(Name(u8::try_from(p).expect("few")))).collect(),
            limbo: None,
            left: self.faults,
            asked: 0,
            names: u8::try_from(PROCESSES).expect("few"),
            requests: vec![Vec::new(); self.deliveries],
            flaws: Flaws::default(),
        }
    }

    /// What can happen.
    pub fn steps(&self, world: &World) -> Vec<Step> {
        let mut steps = Vec::new();
        let may_be_lost = world.left.any > 0;
        let fates: &[Fate] =
            if may_be_lost { &[Fate::Answered, Fate::AnswerLost] } else { &[Fate::Answered] };
        for process in 0..PROCESSES {
            self.steps_of(world, process, fates, &mut steps);
        }
        for (delivery, row) in world.store.rows.iter().enumerate() {
            match row.place {
                Place::Pending { ready: false } => steps.push(Step::Promote { delivery }),
                Place::Leased { lease, over: false } if !world.is_used(delivery, lease) => {
                    steps.push(Step::LeaseExpires { delivery });
                }
                Place::Leased { over: false, .. } if world.left.any > 0 => {
                    steps.push(Step::LeaseExpiresInUse { delivery });
                }
                _ => {}
            }
        }
        match world.store.circuit {
            Circuit::Open { due: false } => steps.push(Step::ProbeFallsDue),
            // a probe that is written or lost, and whose process will not inform the circuit
            Circuit::HalfOpen { probe: Some((delivery, lease)), due: false }
                if !world.store.rows[delivery].is_under(lease) && world.holder(delivery, lease).is_none() =>
            {
                steps.push(Step::ProbeFallsDue);
            }
            Circuit::Closed | Circuit::Open { .. } | Circuit::HalfOpen { .. } => {}
        }
        let late = |delivery| Step::LateCommit { delivery };
        match &world.limbo {
            None => {}
            Some(Statement::Claim { .. }) => {
                let free = (0..self.deliveries).filter(|&delivery| world.store.may_claim(delivery));
                steps.extend(free.map(|delivery| late(Some(delivery))));
            }
            Some(Statement::TakeOverHeld { .. }) => {
                let free = (0..self.deliveries).filter(|&delivery| world.store.may_take_over_held(delivery));
                steps.extend(free.map(|delivery| late(Some(delivery))));
            }
            Some(_) => steps.push(late(None)),
        }
        if world.store.circuit == Circuit::Closed && world.left.openings > 0 {
            steps.push(Step::OpenCircuit);
        }
        steps
    }

    fn steps_of(&self, world: &World, process: usize, fates: &[Fate], steps: &mut Vec<Step>) {
        let me = &world.processes[process];
        let may_be_lost = fates.contains(&Fate::AnswerLost);
        // the processes are alike, so the first one may as well be asked first
        if world.asked < self.deliveries && (world.asked > 0 || process == 0) {
            for &fate in fates {
                steps.push(Step::Enqueue { process, reserved: false, fate });
                if me.slot.is_none() {
                    steps.push(Step::Enqueue { process, reserved: true, fate });
                }
            }
            if me.slot.is_none() && world.left.any > 0 && world.store.circuit == Circuit::Closed {
                steps.push(Step::EnqueueSlowly { process });
            }
        }
        for delivery in 0..self.deliveries {
            if me.slot.is_none() && world.store.may_claim(delivery) {
                steps.push(Step::Claim { process, delivery });
            }
            if world.store.may_take_over_held(delivery) {
                steps.push(Step::TakeOverHeld { process, delivery });
            }
        }
        if may_be_lost && world.asked > 0 && me.slot.is_none() {
            steps.push(Step::ClaimAnswerLost { process });
        }
        if may_be_lost && world.store.circuit != Circuit::Closed {
            steps.push(Step::TakeOverAnswerLost { process });
        }
        if let Some(hold) = me.slot {
            self.steps_of_hold(world, process, hold, fates, steps);
        }
        for loss in 0..me.losses.len() {
            steps.extend(fates.iter().map(|&fate| Step::RecordLoss { process, loss, fate }));
            if world.left.any > 0 {
                steps.push(Step::GiveBackLoss { process, loss });
            }
        }
        for (entry, &(delivery, name)) in me.unconfirmed.iter().enumerate() {
            // a look that finds nothing changes nothing
            let mut store = world.store.clone();
            store.release(delivery, name, None, self.fences);
            if store != world.store {
                steps.extend(fates.iter().map(|&fate| Step::ReleaseUnconfirmed { process, entry, fate }));
            }
        }
        if !me.disowned.is_empty() {
            let mut store = world.store.clone();
            store.release_lost_claims(&me.disowned, &kept(me), self.fences);
            if store != world.store {
                steps.extend(fates.iter().map(|&fate| Step::ReleaseLostClaims { process, fate }));
            }
        }
        let has_memory = me.slot.is_some()
            || !me.losses.is_empty()
            || !me.unconfirmed.is_empty()
            || !me.disowned.is_empty();
        if world.left.any > 0 && has_memory {
            steps.push(Step::Crash { process });
        }
    }

    fn steps_of_hold(
        &self,
        world: &World,
        process: usize,
        hold: Hold,
        fates: &[Fate],
        steps: &mut Vec<Step>,
    ) {
        let settles = |outcome| fates.iter().map(move |&fate| Step::Settle { process, outcome, fate });
        // a receiver that fails for ever would be probed for ever
        let may_fail = !hold.probe || world.left.failed_probes > 0;
        match hold.stage {
            Stage::Claimed => {
                if !hold.over {
                    steps.push(Step::Send { process });
                }
                if hold.over || world.left.any > 0 {
                    steps.push(Step::GiveBack { process, fate: Fate::Answered });
                }
                if hold.over && world.left.any > 0 || world.left.any > 1 {
                    steps.push(Step::GiveBack { process, fate: Fate::AnswerLost });
                }
            }
            Stage::Sent { answered } => {
                if answered {
                    steps.extend(settles(Answer::Success));
                } else {
                    steps.push(Step::ReceiverAnswers { process });
                }
                // the time limit
                if (!answered || !self.answers_first) && may_fail {
                    steps.extend(settles(Answer::Failure));
                }
            }
            Stage::InDoubt { outcome } => steps.extend(settles(outcome)),
            Stage::Noting { .. } => steps.push(Step::NoteProbe { process }),
        }
    }

    /// What is the case after a step.
    pub fn after(&self, world: &World, step: Step) -> World {
        let mut next = world.clone();
        self.take(&mut next, step);
        for (before, after) in world.store.rows.iter().zip(&next.store.rows) {
            next.flaws.overwritten |= overwrites(before, after);
            next.flaws.invented_loss |= after.audit.contains(&Some(Record::Unknown { lost: None }));
        }
        next
    }

    fn take(&self, world: &mut World, step: Step) {
        match step {
            Step::Enqueue { process, reserved, fate } => enqueue(world, process, reserved, fate),
            Step::EnqueueSlowly { process } => {
                let delivery = world.asked;
                world.asked += 1;
                world.left.any -= 1;
                let name = world.processes[process].name;
                world.store.enqueue(delivery, Some(name));
                world.processes[process].unconfirmed.push((delivery, name));
            }
            Step::Claim { process, delivery } | Step::TakeOverHeld { process, delivery } => {
                let taken = world.store.take(delivery, world.processes[process].name);
                let me = &mut world.processes[process];
                match taken.work {
                    Work::Attempt { probe } => me.slot = Some(hold(delivery, taken, probe)),
                    Work::RecordLoss => {
                        me.losses.push(Loss { delivery, lease: taken.lease, number: taken.number });
                    }
                }
            }
            Step::ClaimAnswerLost { process } => {
                let name = world.processes[process].name;
                lose_answer(world, Statement::Claim { name });
                world.processes[process].disowned.push(name);
                world.processes[process].name = new_name(world);
            }
            Step::TakeOverAnswerLost { process } => {
                let name = world.processes[process].name;
                lose_answer(world, Statement::TakeOverHeld { name });
            }
            Step::Send { process } => send(world, process),
            Step::GiveBack { process, fate } => {
                let hold = world.processes[process].slot.take().expect("it is claimed");
                if !hold.over {
                    world.left.any -= 1;
                }
                let Lease { name, at } = hold.lease;
                self.release(world, hold.delivery, name, Some(at), fate);
            }
            Step::GiveBackLoss { process, loss } => {
                world.left.any -= 1;
                let Loss { delivery, lease, .. } = world.processes[process].losses.remove(loss);
                world.store.release(delivery, lease.name, Some(lease.at), self.fences);
            }
            Step::ReceiverAnswers { process } => {
                let hold = world.processes[process].slot.as_mut().expect("it is sent");
                hold.stage = Stage::Sent { answered: true };
                let Hold { delivery, lease, .. } = *hold;
                let request = world.requests[delivery].iter_mut().find(|sent| sent.lease == lease);
                request.expect("it is sent").answered = true;
            }
            Step::Settle { process, outcome, fate } => self.settle(world, process, outcome, fate),
            Step::OpenCircuit => {
                world.left.openings -= 1;
                world.store.open_circuit();
            }
            Step::NoteProbe { process } => {
                let hold = world.processes[process].slot.take().expect("it is written");
                match hold.stage {
                    Stage::Noting { outcome: Answer::Success } => world.store.close_circuit(),
                    _ => world.store.reopen_circuit(hold.delivery, hold.lease, self.fences),
                }
            }
            Step::RecordLoss { process, loss, fate } => self.record_loss(world, process, loss, fate),
            Step::ReleaseUnconfirmed { process, entry, fate } => {
                let (delivery, name) = world.processes[process].unconfirmed[entry];
                if self.release(world, delivery, name, None, fate) {
                    world.processes[process].unconfirmed.remove(entry);
                }
            }
            Step::ReleaseLostClaims { process, fate } => self.release_lost_claims(world, process, fate),
            Step::Promote { delivery } => world.store.promote(delivery),
            Step::ProbeFallsDue => world.store.probe_falls_due(),
            Step::LeaseExpires { delivery } => world.store.expire(delivery),
            Step::LeaseExpiresInUse { delivery } => expire_in_use(world, delivery),
            Step::Crash { process } => {
                world.left.any -= 1;
                world.processes[process] = Process::named(new_name(world));
            }
            Step::LateCommit { delivery } => self.commit_late(world, delivery),
        }
    }

    fn record_loss(&self, world: &mut World, process: usize, loss: usize, fate: Fate) {
        let Loss { delivery, lease, number } = world.processes[process].losses[loss];
        let ending = if number < self.retries_max { Ending::Retry } else { Ending::DeadLetter };
        let finished = Finished { lease, number, answer: None, ending };
        match fate {
            // written, or lost itself: there is nothing more to do
            Fate::Answered => {
                world.store.settle(delivery, finished, self.fences);
                world.processes[process].losses.remove(loss);
            }
            Fate::AnswerLost => lose_answer(world, Statement::Settle { delivery, finished }),
        }
    }

    fn release_lost_claims(&self, world: &mut World, process: usize, fate: Fate) {
        let me = &world.processes[process];
        let (names, kept) = (me.disowned.clone(), kept(me));
        match fate {
            Fate::Answered => {
                world.store.release_lost_claims(&names, &kept, self.fences);
            }
            Fate::AnswerLost => lose_answer(world, Statement::ReleaseLostClaims { names, kept }),
        }
    }

    fn settle(&self, world: &mut World, process: usize, outcome: Answer, fate: Fate) {
        let hold = world.processes[process].slot.expect("it has an outcome");
        let Hold { delivery, lease, number, probe, stage, .. } = hold;
        if probe && outcome == Answer::Failure && matches!(stage, Stage::Sent { .. }) {
            world.left.failed_probes -= 1;
        }
        let ending = match outcome {
            Answer::Success => Ending::Completed,
            Answer::Failure if probe => Ending::WaitsOn,
            Answer::Failure if number < self.retries_max => Ending::Retry,
            Answer::Failure => Ending::DeadLetter,
        };
        let finished = Finished { lease, number, answer: Some(outcome), ending };
        if fate == Fate::AnswerLost {
            lose_answer(world, Statement::Settle { delivery, finished });
            world.processes[process].slot = Some(Hold { stage: Stage::InDoubt { outcome }, ..hold });
            return;
        }
        let written = world.store.settle(delivery, finished, self.fences);
        // an earlier try that was not answered may have written it
        let is_own = matches!(stage, Stage::InDoubt { .. }) && world.records(delivery, lease);
        let note = probe && (written || is_own);
        world.processes[process].slot = note.then_some(Hold { stage: Stage::Noting { outcome }, ..hold });
    }

    fn release(&self, world: &mut World, delivery: usize, name: Name, at: Option<u8>, fate: Fate) -> bool {
        match fate {
            Fate::Answered => world.store.release(delivery, name, at, self.fences),
            Fate::AnswerLost => {
                lose_answer(world, Statement::Release { delivery, name, at });
                false
            }
        }
    }

    fn commit_late(&self, world: &mut World, free: Option<usize>) {
        match world.limbo.take().expect("there is a statement") {
            Statement::Enqueue { delivery, wanted } => {
                world.store.enqueue(delivery, wanted);
            }
            Statement::Claim { name } | Statement::TakeOverHeld { name } => {
                world.store.take(free.expect("it takes one"), name);
            }
            Statement::Settle { delivery, finished } => {
                world.store.settle(delivery, finished, self.fences);
            }
            Statement::Release { delivery, name, at } => {
                world.store.release(delivery, name, at, self.fences);
            }
            Statement::ReleaseLostClaims { names, kept } => {
                world.store.release_lost_claims(&names, &kept, self.fences);
            }
        }
    }
}

fn enqueue(world: &mut World, process: usize, reserved: bool, fate: Fate) {
    let delivery = world.asked;
    world.asked += 1;
    let wanted = reserved.then_some(world.processes[process].name);
    match fate {
        Fate::Answered => {
            if let Some(taken) = world.store.enqueue(delivery, wanted) {
                world.processes[process].slot = Some(hold(delivery, taken, false));
            }
        }
        Fate::AnswerLost => {
            world.processes[process].unconfirmed.extend(wanted.map(|name| (delivery, name)));
            lose_answer(world, Statement::Enqueue { delivery, wanted });
        }
    }
}

fn send(world: &mut World, process: usize) {
    let hold = world.processes[process].slot.as_mut().expect("it is claimed");
    hold.stage = Stage::Sent { answered: false };
    let Hold { delivery, lease, .. } = *hold;
    let accounted = world.requests[delivery].iter().all(|sent| world.accounts_for(delivery, sent.lease));
    world.flaws.sent_too_soon |= !accounted;
    world.requests[delivery].push(Request { lease, answered: false });
}

fn expire_in_use(world: &mut World, delivery: usize) {
    world.left.any -= 1;
    let Place::Leased { lease, .. } = world.store.rows[delivery].place else { unreachable!("it is leased") };
    world.store.expire(delivery);
    for hold in world.processes.iter_mut().filter_map(|process| process.slot.as_mut()) {
        hold.over |= hold.delivery == delivery && hold.lease == lease;
    }
}

fn hold(delivery: usize, Taken { lease, number, .. }: Taken, probe: bool) -> Hold {
    Hold { delivery, lease, number, probe, stage: Stage::Claimed, over: false }
}

/// The deliveries whose leases a process uses.
fn kept(process: &Process) -> Vec<usize> {
    process.slot.iter().map(|hold| hold.delivery).collect()
}

fn new_name(world: &mut World) -> Name {
    world.names += 1;
    Name(world.names - 1)
}

/// A statement that was in limbo before is never executed.
fn lose_answer(world: &mut World, statement: Statement) {
    world.left.any -= 1;
    world.limbo = Some(statement);
}

/// Whether something that stood in the audit stands there no more. What nobody knew may become known.
fn overwrites(before: &Row, after: &Row) -> bool {
    let kept = before.audit.iter().zip(&after.audit).all(|(before, after)| match (*before, *after) {
        (None, _) => true,
        (Some(Record::Unknown { lost }), Some(Record::Known { lease, .. })) => lost == Some(lease),
        (before, after) => before == after,
    });
    before.is_terminal() && before != after || !kept || !after.probes.starts_with(&before.probes)
}
