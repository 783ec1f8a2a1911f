//! How long attempts took: means and percentiles of counted durations.

use std::collections::BTreeMap;

/// Durations by value, so that percentiles are exact values, not estimates.
#[derive(Debug, Clone, Default)]
pub struct DurationCounts {
    counts: BTreeMap<u64, u64>,
    total_ms: u64,
}

impl DurationCounts {
    /// Adds `occurrences` attempts of about `duration_ms` that took `total_ms` together.
    pub fn add(&mut self, duration_ms: u64, occurrences: u64, total_ms: u64) {
        *self.counts.entry(duration_ms).or_default() += occurrences;
        self.total_ms += total_ms;
    }

    /// The number of attempts.
    pub fn count(&self) -> u64 {
        self.counts.values().sum()
    }

    /// The mean in milliseconds; `None` if there are none.
    #[expect(clippy::cast_precision_loss, reason = "a mean of 2^53 ms is not met")]
    pub fn mean(&self) -> Option<f64> {
        (self.count() > 0).then(|| self.total_ms as f64 / self.count() as f64)
    }

    /// The smallest duration in milliseconds that `percent` of all attempts do not exceed (nearest rank); `None` if there are none.
    pub fn percentile(&self, percent: u64) -> Option<u64> {
        let rank = (self.count() * percent).div_ceil(100).max(1);
        let mut seen = 0;
        self.counts.iter().find_map(|(&duration_ms, &occurrences)| {
            seen += occurrences;
            (seen >= rank).then_some(duration_ms)
        })
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn nothing_has_no_percentile() {
        assert_eq!(DurationCounts::default().percentile(50), None);
        assert_eq!(DurationCounts::default().mean(), None);
    }

    proptest! {
        #[test]
        fn percentiles_are_those_of_the_sorted_values(mut values in prop::collection::vec(0_u64..500, 1..200), percent in 1_u64..=100) {
            let mut counts = DurationCounts::default();
            for &value in &values {
                counts.add(value, 1, value);
            }
            values.sort_unstable();
            let rank = (values.len() * usize::try_from(percent).unwrap()).div_ceil(100);
            prop_assert_eq!(counts.percentile(percent), Some(values[rank - 1]));
        }
    }
}
