//! The report of a run: tables that compare it with what is committed.

mod chart;
mod document;
pub mod figures;
pub mod record;

use webhook_processor::cli::output::{say, table};

use self::figures::{Figure, Section, Sections};

/// A figure that has come down to this share of what it was is marked.
const WORSE: f64 = 0.9;

/// Prints the figures of a run beside what they were.
pub fn print(sections: &Sections, then: &Sections) -> anyhow::Result<()> {
    for (group, section) in sections {
        let mut rows =
            table(&[document::explanation(*group).0, "median", "lowest to highest", "goal", "", "change"]);
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

#[cfg(test)]
pub mod tests {
    use super::figures::{Samples, Unit};
    use super::*;

    /// What a run may have measured.
    pub fn section(rate: f64, ceiling: f64) -> Section {
        let mut samples = Samples::default();
        samples.add("drain", Unit::PerSecond, rate);
        samples.add("share", Unit::Ratio, rate / ceiling);
        Section {
            date: "2026-01-02".into(),
            machine: "2 cores".into(),
            versions: "PostgreSQL 15".into(),
            command: "webhook-processor-bench".into(),
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
}
