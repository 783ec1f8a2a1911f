//! The report: tables for people, `bench/figures.json`, and `docs/benchmarks.md` with its chart, made from that.

use std::fs;
use std::path::Path;
use std::process::Command;

use anyhow::Context as _;

use super::Group;
use super::chart;
use super::figures::{Figure, Section, Sections, Unit};
use crate::cli::output::{say, table};

/// What is committed, seen from the root of the repository.
const FIGURES: &str = "bench/figures.json";
const DOCUMENT: &str = "docs/benchmarks.md";
const CHART: &str = "docs/benchmarks.svg";
/// A figure that has come down to this share of what it was is marked.
const WORSE: f64 = 0.9;

const INTRODUCTION: &str = "\
# Benchmarks

`make bench` measures the machine that it runs on and writes this page and its chart; `make bench-peers` does the same for
other queues, side by side with ours. It is not a test and fails nothing. `webhook-processor bench --help` tells what else
can be asked.

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
fn explanation(group: Group) -> (&'static str, &'static str) {
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

/// Prints the figures of a run beside what they were.
pub fn print(sections: &Sections, then: &Sections) -> anyhow::Result<()> {
    for (group, section) in sections {
        let mut rows = table(&[explanation(*group).0, "median", "lowest to highest", "goal", "", "change"]);
        for figure in &section.figures {
            rows.add_row([
                figure.name.clone(),
                figure.unit.write(figure.value),
                extremes(figure),
                figure.goal_text(),
                verdict(figure).to_owned(),
                change(figure, section, then.get(group)),
            ]);
        }
        say(rows)?;
        for remark in &section.remarks {
            say(remark)?;
        }
    }
    Ok(())
}

fn extremes(figure: &Figure) -> String {
    format!("{} to {}", figure.unit.write(figure.lowest), figure.unit.write(figure.highest))
}

fn verdict(figure: &Figure) -> &'static str {
    match figure.is_met() {
        None => "",
        Some(true) => "met",
        Some(false) => "not met",
    }
}

/// How a figure differs from the last one of its name.
fn change(figure: &Figure, section: &Section, then: Option<&Section>) -> String {
    let earlier =
        then.and_then(|then| Some((then, then.figures.iter().find(|last| last.name == figure.name)?)));
    let improvement = earlier.map(|(then, last)| figure.improvement(section.ceiling, last, then.ceiling));
    match improvement {
        // there is no share of nothing
        Some(improvement) if improvement.is_finite() => {
            let mark = if improvement < WORSE { "  WORSE" } else { "" };
            format!("{:+.0} %{mark}", (improvement - 1.0) * 100.0)
        }
        _ => String::new(),
    }
}

/// What is committed in the repository at `root`, or at least written there; nothing if there is none.
pub fn committed(root: &Path) -> Sections {
    let git = Command::new("git").arg("-C").arg(root).args(["show", &format!("HEAD:{FIGURES}")]).output();
    let text = match git {
        Ok(output) if output.status.success() => output.stdout,
        _ => fs::read(root.join(FIGURES)).unwrap_or_default(),
    };
    serde_json::from_slice(&text).unwrap_or_default()
}

/// Puts the figures of a run in the place of the last ones of their groups, and renders all.
pub fn write(root: &Path, sections: Sections) -> anyhow::Result<()> {
    let path = root.join(FIGURES);
    let mut all: Sections = match fs::read(&path) {
        Ok(text) => serde_json::from_slice(&text).with_context(|| format!("reading {}", path.display()))?,
        Err(_) => Sections::new(),
    };
    all.extend(sections);
    for (name, text) in [
        (FIGURES, serde_json::to_string_pretty(&all)? + "\n"),
        (DOCUMENT, document(&all)),
        (CHART, chart::chart(&all)),
    ] {
        let path = root.join(name);
        if let Some(directory) = path.parent() {
            fs::create_dir_all(directory)?;
        }
        fs::write(&path, text).with_context(|| format!("writing {}", path.display()))?;
    }
    Ok(())
}

fn document(sections: &Sections) -> String {
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
    use super::super::figures::Samples;
    use super::*;

    fn section(rate: f64, ceiling: f64) -> Section {
        let mut samples = Samples::default();
        samples.add("drain", Unit::PerSecond, rate);
        samples.add("share", Unit::Ratio, rate / ceiling);
        Section {
            date: "2026-01-02".into(),
            machine: "2 cores".into(),
            versions: "PostgreSQL 15".into(),
            command: "webhook-processor bench".into(),
            ceiling,
            figures: samples
                .into_figures(|figure| if figure.name == "share" { figure.at_least(0.8) } else { figure }),
            remarks: vec![],
        }
    }

    #[test]
    fn what_has_become_worse_is_marked() {
        let (then, now) = (section(8_000.0, 10_000.0), section(3_000.0, 5_000.0));
        assert_eq!(change(&now.figures[0], &now, Some(&then)), "-25 %  WORSE");
        assert_eq!(change(&then.figures[0], &then, Some(&then)), "+0 %");
        assert_eq!(change(&now.figures[0], &now, None), "");
    }

    #[test]
    fn the_document_tells_figures_goals_and_how_they_were_measured() {
        let document = document(&Sections::from([(Group::Drain, section(3_000.0, 5_000.0))]));
        assert!(document.contains("| drain | 3,000/s | 3,000/s to 3,000/s |  |  |\n"), "{document}");
        assert!(
            document.contains("| share | 0.60 | 0.60 to 0.60 | at least 0.80 | **not met** |\n"),
            "{document}"
        );
        assert!(document.contains("2026-01-02. 2 cores. PostgreSQL 15."), "{document}");
        assert!(document.lines().all(|line| line.starts_with('|') || line.len() <= 130), "{document}");
    }

    #[test]
    fn one_group_replaces_only_its_own_section() {
        let root = tempfile::tempdir().unwrap();
        write(
            root.path(),
            Sections::from([(Group::Drain, section(1.0, 2.0)), (Group::Peers, section(5.0, 9.0))]),
        )
        .unwrap();
        write(root.path(), Sections::from([(Group::Drain, section(3.0, 4.0))])).unwrap();
        let kept = committed(root.path());
        assert_eq!(kept[&Group::Drain], section(3.0, 4.0));
        assert_eq!(kept[&Group::Peers], section(5.0, 9.0));
    }
}
