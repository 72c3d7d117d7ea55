//! Medians and their spread.

use serde::{Deserialize, Serialize};

/// Median and quartiles of a set of figures.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Quartiles {
    /// The median.
    pub median: f64,
    /// First quartile.
    pub low: f64,
    /// Third quartile.
    pub high: f64,
    /// Number of figures.
    pub n: usize,
}

impl Quartiles {
    /// Of these figures. `None` without figures.
    pub fn of(figures: impl IntoIterator<Item = f64>) -> Option<Self> {
        let mut figures: Vec<f64> = figures.into_iter().collect();
        figures.sort_by(f64::total_cmp);
        if figures.is_empty() {
            return None;
        }
        let at = |quarter: usize| {
            // Interpolated between the two nearest figures.
            let sandbox = quarter * (figures.len() - 1);
            let (below, part) = (sandbox / 4, sandbox % 4);
            let above = (below + 1).min(figures.len() - 1);
            figures[below] + (figures[above] - figures[below]) * [0.0, 0.25, 0.5, 0.75][part]
        };
        Some(Self { median: at(2), low: at(1), high: at(3), n: figures.len() })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quartiles_lie_between_the_nearest_figures() {
        assert_eq!(Quartiles::of([]), None);
        assert_eq!(Quartiles::of([3.0]), Some(Quartiles { median: 3.0, low: 3.0, high: 3.0, n: 1 }));
        let four = Quartiles::of([4.0, 1.0, 3.0, 2.0]).expect("there are figures");
        assert_eq!(four, Quartiles { median: 2.5, low: 1.75, high: 3.25, n: 4 });
        let five = Quartiles::of([5.0, 1.0, 4.0, 2.0, 3.0]).expect("there are figures");
        assert_eq!(five, Quartiles { median: 3.0, low: 2.0, high: 4.0, n: 5 });
    }
}
