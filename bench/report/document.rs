//! Renders `docs/benchmarks.md` from the figures.

use super::figures::{Figure, Sections, Unit};
use super::{extremes, verdict};
use crate::groups::Group;

const INTRODUCTION: &str = "\
# Benchmarks

`make bench` measures the machine that it runs on and writes this page and its chart; `make bench-peers` does the same for
other queues, side by side with ours. It is not a test and fails nothing. What else can be asked
shows in `target/release/webhook-processor-bench --help`.

It starts a PostgreSQL of its own with `fsync` on and the settings of the embedded default, and a receiver that answers
each request at once with 2 bytes; every run has a database that is new, and never analyzed. Runs take turns in rounds,
so that what else happens on the machine meets all of them alike. A figure is the median of the rounds, with the lowest
and the highest beside it.

Rates vary with the machine, and from hour to hour where it is shared; ratios vary less. So the change against the last
committed figures, which `make bench` prints, compares rates and times by the ceiling of their own run.

A figure of another queue comes from a command, `--peer NAME=COMMAND`. It finds `DATABASE_URL` (an empty database of its
own on the same server), `RECEIVER_URL` (what to GET for each job) and `DELIVERIES` in its environment, enqueues, prints
`ready`, waits for a line on its standard input, drains, and prints one line of JSON once its store has recorded the last
completion: `{\"peer\": \"its name 1.2.3\", \"settings\": \"in words\", \"deliveries\": 40000, \"seconds\": 8.1}`. That the
receiver got as many requests is checked.

![The figures that are ratios, and the drain against other queues](benchmarks.svg)
";

/// The heading and the explanation of a group.
pub fn explanation(group: Group) -> (&'static str, &'static str) {
    match group {
        Group::Drain => (
            "Drain",
            "One endpoint with a full queue, emptied by the ten workers of one process. *HTTP only* is the sender against \
             the receiver, GETs with keep-alive, as many at a time as workers hold leases. *SQL only* is two \
             clients that claim as many at a time as a process does, and settle them. The *ceiling* is what both would reach by taking turns, without any loss. \
             The log and the commits are those of the whole server during the drain, without the filling.",
        ),
        Group::Enqueue => (
            "Enqueue",
            "To an API without workers; each event is acknowledged after its commit. The plain inserts go into a table with \
             the columns, defaults and indexes of our open partition, and without its checks; `pgbench` sends them by its default \
             protocol, and as prepared statements. Latency is counted from the \
             time at which a call was due, whether or not those before had been answered.",
        ),
        Group::Latency => (
            "Latency",
            "A `serve` process at a steady rate, from the time at which `POST /webhooks` was due to the request at the \
             receiver; alone, and beside an endpoint with 200,000 waiting deliveries whose receiver accepts connections and \
             never answers.",
        ),
        Group::Scale => (
            "Scale",
            "The drain with much of something, against that of a fresh database with one endpoint just before it; more \
             processes against one. The archived deliveries are all in the archive of today, into which the drain writes. \
             The snapshot is held from before the filling until after the drain. Processes are real ones, and are timed \
             from the moment when their endpoint is enabled until the open partition is empty.",
        ),
        Group::Memory => (
            "Memory",
            "The highest resident memory of a `serve` process: while it drains 200,000 deliveries; and while somebody holds \
             a lock, so that nothing can be stored, and callers go on until events are refused with 503 for want of room. They \
             send single events of 7 kB, or streams of events of 0.5 kB.",
        ),
        Group::Soak => (
            "Soak",
            "A `serve` process that is sent events at half the drain rate, measured just before, for as long as `--minutes` \
             says. The size of the open partition is taken each minute after a VACUUM.",
        ),
        Group::Peers => (
            "Against other queues",
            "The same drain by other queues at their best settings, on the same server (BullMQ on a Redis that syncs its \
             log), with one GET a job to the same receiver. Ours also records each attempt with its answer. They live in \
             `bench/peers`.",
        ),
    }
}

/// The page.
pub fn document(sections: &Sections) -> String {
    let mut parts = vec![INTRODUCTION.to_owned()];
    for (group, section) in sections {
        let (heading, explanation) = explanation(*group);
        parts.push(format!("## {heading}\n\n{}\n", wrapped(explanation)));
        let rows: Vec<_> = section.figures.iter().map(row).collect();
        parts.push(format!(
            "| figure | median | lowest to highest | goal | |\n| --- | --- | --- | --- | --- |\n{}",
            rows.concat()
        ));
        if !section.remarks.is_empty() {
            parts.push(format!("- {}\n", section.remarks.join("\n- ")));
        }
        parts.push(wrapped(&format!(
            "{}. {}. {}. Ceiling of that run: {}. Command: `{}`\n",
            section.date,
            section.machine,
            section.versions,
            Unit::PerSecond.write(section.ceiling),
            section.command
        )));
    }
    parts.join("\n")
}

fn row(figure: &Figure) -> String {
    let verdict = match verdict(figure) {
        "not met" => "**not met**",
        verdict => verdict,
    };
    format!(
        "| {} | {} | {} | {} | {verdict} |\n",
        figure.name,
        figure.unit.write(figure.value),
        extremes(figure),
        figure.goal_text()
    )
}

/// Lines of at most 120 characters.
fn wrapped(text: &str) -> String {
    let mut lines = vec![String::new()];
    for word in text.split(' ') {
        let line = lines.last_mut().expect("there is one");
        if line.is_empty() {
            line.push_str(word);
        } else if line.len() + 1 + word.len() <= 120 {
            line.push(' ');
            line.push_str(word);
        } else {
            lines.push(word.to_owned());
        }
    }
    lines.join("\n")
}

#[cfg(test)]
mod tests {
    use super::super::tests::section;
    use super::*;

    #[test]
    fn the_document_shows_figures_goals_and_how_they_were_measured() {
        let document = document(&Sections::from([(Group::Drain, section(3_000.0, 5_000.0))]));
        assert!(document.contains("| drain | 3,000/s | 3,000/s to 3,000/s |  |  |\n"), "{document}");
        assert!(
            document.contains("| share | 0.60 | 0.60 to 0.60 | at least 0.80 | **not met** |\n"),
            "{document}"
        );
        assert!(document.contains("2026-01-02. 2 cores. PostgreSQL 15."), "{document}");
        assert!(document.lines().all(|line| line.starts_with('|') || line.len() <= 130), "{document}");
    }
}
