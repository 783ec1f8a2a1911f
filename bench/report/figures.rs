//! A figure: the median of what its rounds measured, against its goal.

use std::collections::BTreeMap;
use std::time::Instant;

use serde::{Deserialize, Serialize};

use crate::groups::Group;

/// What a figure counts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Unit {
    /// Deliveries, events or rows a second.
    PerSecond,
    Milliseconds,
    /// One rate or time against another of the same round.
    Ratio,
    Bytes,
    Megabytes,
    Number,
}

impl Unit {
    pub fn write(self, value: f64) -> String {
        match self {
            Self::PerSecond => format!("{}/s", with_thousands(value)),
            Self::Milliseconds => format!("{value:.1} ms"),
            Self::Ratio => format!("{value:.2}"),
            Self::Bytes => format!("{} bytes", with_thousands(value)),
            Self::Megabytes => format!("{value:.0} MB"),
            Self::Number => format!("{value:.3}"),
        }
    }

    fn is_better_when_larger(self) -> bool {
        matches!(self, Self::PerSecond | Self::Ratio)
    }
}

/// A count, of millions in words.
pub fn written(count: usize) -> String {
    if count >= 1_000_000 { format!("{} million", float(count) / 1e6) } else { with_thousands(float(count)) }
}

fn with_thousands(value: f64) -> String {
    let digits = format!("{value:.0}");
    let mut written = String::new();
    for (place, digit) in digits.chars().enumerate() {
        if place > 0 && (digits.len() - place).is_multiple_of(3) {
            written.push(',');
        }
        written.push(digit);
    }
    written
}

/// The median of the rounds.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Figure {
    /// Names it within its group, for people too.
    pub name: String,
    pub unit: Unit,
    pub value: f64,
    /// Of all rounds.
    pub lowest: f64,
    pub highest: f64,
    /// Whether a larger value is an improvement.
    pub larger_is_better: bool,
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub goal: Option<f64>,
}

impl Figure {
    fn new(name: String, unit: Unit, values: &[f64]) -> Self {
        Self {
            name,
            unit,
            value: rounded(median(values)),
            lowest: rounded(values.iter().copied().fold(f64::INFINITY, f64::min)),
            highest: rounded(values.iter().copied().fold(f64::NEG_INFINITY, f64::max)),
            larger_is_better: unit.is_better_when_larger(),
            goal: None,
        }
    }

    pub fn at_least(self, goal: f64) -> Self {
        Self { goal: Some(goal), larger_is_better: true, ..self }
    }

    pub fn at_most(self, goal: f64) -> Self {
        Self { goal: Some(goal), larger_is_better: false, ..self }
    }

    /// Whether the goal is met; `None` without one.
    pub fn is_met(&self) -> Option<bool> {
        self.goal.map(|goal| if self.larger_is_better { self.value >= goal } else { self.value <= goal })
    }

    /// The goal as people write it.
    pub fn goal_text(&self) -> String {
        let bound = if self.larger_is_better { "at least" } else { "at most" };
        self.goal.map_or_else(String::new, |goal| format!("{bound} {}", self.unit.write(goal)))
    }

    /// How much better (above 1) or worse (below 1) it is than it was `then`. Rates and times are measured by the
    /// ceiling of their own run, so that another machine makes no difference.
    pub fn improvement(&self, ceiling: f64, then: &Self, ceiling_then: f64) -> f64 {
        let own_measure = |value: f64, ceiling: f64| match self.unit {
            Unit::PerSecond => value / ceiling,
            Unit::Milliseconds => value * ceiling,
            Unit::Ratio | Unit::Bytes | Unit::Megabytes | Unit::Number => value,
        };
        let change = own_measure(self.value, ceiling) / own_measure(then.value, ceiling_then);
        if self.larger_is_better { change } else { 1.0 / change }
    }
}

/// What the rounds of a group have measured so far.
#[derive(Debug, Default)]
pub struct Samples(Vec<(String, Unit, Vec<f64>)>);

impl Samples {
    /// Adds what a round has measured; the figures keep the order of the first one.
    pub fn add(&mut self, name: impl Into<String>, unit: Unit, value: f64) {
        let name = name.into();
        match self.0.iter_mut().find(|(known, ..)| *known == name) {
            Some((.., values)) => values.push(value),
            None => self.0.push((name, unit, vec![value])),
        }
    }

    /// The medians. `goal` gives those a goal that have one.
    pub fn into_figures(self, goal: impl Fn(Figure) -> Figure) -> Vec<Figure> {
        self.0.into_iter().map(|(name, unit, values)| goal(Figure::new(name, unit, &values))).collect()
    }
}

/// The figures of one group, and how they were measured.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Section {
    /// The day, UTC.
    pub date: String,
    pub machine: String,
    pub versions: String,
    pub command: String,
    /// Of the run that measured this group, in deliveries a second.
    pub ceiling: f64,
    pub figures: Vec<Figure>,
    /// What else a reader wants to know, such as the settings of a peer.
    #[serde(skip_serializing_if = "Vec::is_empty", default)]
    pub remarks: Vec<String>,
}

/// What is kept in `bench/figures.json`.
pub type Sections = BTreeMap<Group, Section>;

/// As it is kept: nothing is measured to more digits.
pub fn rounded(value: f64) -> f64 {
    (value * 1e4).round() / 1e4
}

pub fn median(values: &[f64]) -> f64 {
    percentile(values, 50)
}

/// The value below which `percent` of the values lie; of an even number the upper one.
pub fn percentile(values: &[f64], percent: usize) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_unstable_by(f64::total_cmp);
    sorted
        .get((sorted.len() * percent / 100).min(sorted.len().saturating_sub(1)))
        .copied()
        .unwrap_or_default()
}

/// So many of something in the time since `begun`.
pub fn per_second(count: usize, begun: Instant) -> f64 {
    float(count) / begun.elapsed().as_secs_f64()
}

/// A count as a figure: exact up to four thousand millions.
pub fn float(count: usize) -> f64 {
    f64::from(u32::try_from(count).unwrap_or(u32::MAX))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn figure(unit: Unit, value: f64) -> Figure {
        Figure::new("it".into(), unit, &[value])
    }

    #[test]
    fn medians_and_percentiles_do_not_mind_the_order() {
        assert!((median(&[3.0, 1.0, 2.0]) - 2.0).abs() < f64::EPSILON);
        let values: Vec<_> = (0..100).rev().map(f64::from).collect();
        assert!((percentile(&values, 99) - 99.0).abs() < f64::EPSILON);
        assert!((percentile(&[7.0], 99) - 7.0).abs() < f64::EPSILON);
        assert!(percentile(&[], 50).abs() < f64::EPSILON);
    }

    #[test]
    fn goals_know_their_direction() {
        assert_eq!(figure(Unit::Ratio, 0.8).at_least(0.8).is_met(), Some(true));
        assert_eq!(figure(Unit::Ratio, 1.6).at_most(1.5).is_met(), Some(false));
        assert_eq!(figure(Unit::PerSecond, 1.0).is_met(), None);
        assert_eq!(figure(Unit::Bytes, 1.0).at_most(3072.0).goal_text(), "at most 3,072 bytes");
    }

    #[test]
    fn a_faster_machine_is_no_improvement() {
        for (unit, then, now) in [(Unit::PerSecond, 4_000.0, 8_000.0), (Unit::Milliseconds, 8.0, 4.0)] {
            let improvement = figure(unit, now).improvement(10_000.0, &figure(unit, then), 5_000.0);
            assert!((improvement - 1.0).abs() < 1e-9, "{improvement}");
        }
        let slower =
            figure(Unit::PerSecond, 3_000.0).improvement(5_000.0, &figure(Unit::PerSecond, 4_000.0), 5_000.0);
        assert!((slower - 0.75).abs() < 1e-9);
        let more = figure(Unit::Bytes, 200.0).improvement(1.0, &figure(Unit::Bytes, 100.0), 1.0);
        assert!((more - 0.5).abs() < 1e-9);
    }

    #[test]
    fn figures_keep_their_order_and_their_extremes() {
        let mut samples = Samples::default();
        for value in [2.0, 9.0, 1.0] {
            samples.add("b", Unit::PerSecond, value);
            samples.add("a", Unit::PerSecond, 1.0);
        }
        let figures = samples.into_figures(|figure| figure);
        assert_eq!(figures.iter().map(|figure| figure.name.as_str()).collect::<Vec<_>>(), ["b", "a"]);
        assert_eq!((figures[0].value, figures[0].lowest, figures[0].highest), (2.0, 1.0, 9.0));
    }

    #[test]
    fn large_numbers_are_written_in_threes() {
        assert_eq!(Unit::PerSecond.write(1_234_567.4), "1,234,567/s");
        assert_eq!(Unit::PerSecond.write(999.6), "1,000/s");
        assert_eq!(Unit::PerSecond.write(12.0), "12/s");
        assert_eq!((written(20_000).as_str(), written(5_000_000).as_str()), ("20,000", "5 million"));
    }
}
