//! What was measured, which may be known only to be more than something, and what it says of a target. Pure:
//! [`main`](super) measures, [`table`](super::table) prints.

use crate::rows::{Program, Target};
use std::cmp::Ordering;
use std::fmt;
use std::ops::Div;

/// A figure, or what is known of it.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Figure {
    /// This much.
    Is(f64),
    /// It did not end within this, or had come so far when nobody waited any more.
    MoreThan(f64),
    /// By something of which only a lower bound is known.
    LessThan(f64),
}

impl Figure {
    fn bound(self) -> f64 {
        match self {
            Self::Is(value) | Self::MoreThan(value) | Self::LessThan(value) => value,
        }
    }

    /// What has no upper bound comes last.
    fn order(&self, other: &Self) -> Ordering {
        let endless = |figure: &Self| matches!(figure, Self::MoreThan(_));
        endless(self).cmp(&endless(other)).then(self.bound().total_cmp(&other.bound()))
    }

    /// Whether it is at most `most`; `None` if that cannot be told. What has not ended is too much.
    fn is_at_most(self, most: f64) -> Option<bool> {
        match self {
            Self::Is(value) => Some(value <= most),
            Self::MoreThan(_) => Some(false),
            Self::LessThan(bound) => (bound <= most).then_some(true),
        }
    }

    fn is_at_least(self, least: f64) -> Option<bool> {
        match self {
            Self::Is(value) => Some(value >= least),
            Self::MoreThan(bound) => (bound >= least).then_some(true),
            Self::LessThan(bound) => (bound <= least).then_some(false),
        }
    }

    /// Between two.
    fn mean(self, other: Self) -> Self {
        let mean = f64::midpoint(self.bound(), other.bound());
        match (self, other) {
            (Self::Is(_), Self::Is(_)) => Self::Is(mean),
            _ => Self::MoreThan(mean),
        }
    }
}

impl From<f64> for Figure {
    fn from(value: f64) -> Self {
        Self::Is(value)
    }
}

impl fmt::Display for Figure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let rounded = (self.bound() * 100.0).round() / 100.0;
        match self {
            Self::Is(value) => write!(f, "{value:.2}"),
            Self::MoreThan(_) => write!(f, "> {rounded}"),
            Self::LessThan(_) => write!(f, "< {rounded}"),
        }
    }
}

impl Div for Figure {
    type Output = Option<Self>;

    fn div(self, by: Self) -> Option<Self> {
        let ratio = self.bound() / by.bound();
        match (self, by) {
            (Self::Is(_), Self::Is(_)) => Some(Self::Is(ratio)),
            (Self::MoreThan(_), Self::Is(_)) => Some(Self::MoreThan(ratio)),
            (Self::Is(_), Self::MoreThan(_)) => Some(Self::LessThan(ratio)),
            _ => None,
        }
    }
}

/// The figures of one program in one row.
#[derive(Default)]
pub struct Figures {
    pub all: Vec<Figure>,
    /// Its first failure; it was not asked again.
    pub failure: Option<anyhow::Error>,
}

impl Figures {
    pub fn median(&self) -> Option<Figure> {
        let mut all = self.all.clone();
        all.sort_by(Figure::order);
        let (middle, even) = (all.len() / 2, all.len().is_multiple_of(2));
        let upper = *all.get(middle).filter(|_| self.failure.is_none())?;
        Some(if even { all[middle - 1].mean(upper) } else { upper })
    }

    /// Median and spread, or how it failed.
    pub fn cell(&self) -> String {
        let Some(median) = self.median() else {
            return if self.failure.is_some() { "FAILED".into() } else { "-".into() };
        };
        let least = self.all.iter().copied().min_by(Figure::order);
        let most = self.all.iter().copied().max_by(Figure::order);
        match least.zip(most).filter(|_| self.all.len() > 1) {
            None => median.to_string(),
            // A dash beside a sign is hard to read.
            Some((least, most @ Figure::MoreThan(_))) => format!("{median} ({least} to {most})"),
            Some((least, most)) => format!("{median} ({least}-{most})"),
        }
    }
}

/// The figures of a row, by program.
#[derive(Default)]
pub struct Measured {
    pub qemu: Figures,
    pub newer: Figures,
    pub ferry: Figures,
}

impl Measured {
    pub fn of(&mut self, program: Program) -> &mut Figures {
        match program {
            Program::Qemu => &mut self.qemu,
            Program::Newer => &mut self.newer,
            Program::Ferry => &mut self.ferry,
        }
    }

    pub fn all(&self) -> [&Figures; 3] {
        [&self.qemu, &self.newer, &self.ferry]
    }

    /// The figure of the better QEMU.
    fn better(&self, target: &Target) -> Option<Figure> {
        let qemus = [&self.qemu, &self.newer].into_iter().filter_map(Figures::median);
        match target {
            Target::AtMost(_) | Target::RatioAtMost(_) | Target::MoreByAtMost(_) => {
                qemus.min_by(Figure::order)
            }
            Target::AtLeast(_) | Target::RatioAtLeast(_) => qemus.max_by(Figure::order),
        }
    }

    /// Ferry's figure by that of the better QEMU.
    pub fn ratio(&self, target: &Target) -> Option<Figure> {
        self.ferry.median()? / self.better(target)?
    }

    /// The target in words, and whether Ferry meets it; `None` if that cannot be told.
    pub fn verdict(&self, target: &Target) -> (String, Option<bool>) {
        let (ferry, ratio) = (self.ferry.median(), self.ratio(target));
        match target {
            Target::AtMost(most) => {
                (format!("≤ {most}"), ferry.and_then(|ferry| ferry.is_at_most(*most)))
            }
            Target::AtLeast(least) => {
                (format!("≥ {least}"), ferry.and_then(|ferry| ferry.is_at_least(*least)))
            }
            Target::RatioAtMost(most) => {
                // What did not end is a miss, whatever it is compared with.
                let endless = matches!(ferry, Some(Figure::MoreThan(_))).then_some(false);
                let met = endless.or(ratio.and_then(|ratio| ratio.is_at_most(*most)));
                (format!("ratio ≤ {most:.2}"), met)
            }
            Target::RatioAtLeast(least) => {
                (format!("ratio ≥ {least}"), ratio.and_then(|ratio| ratio.is_at_least(*least)))
            }
            Target::MoreByAtMost(most) => {
                let met = match (ferry, self.better(target)) {
                    (Some(Figure::Is(ferry)), Some(Figure::Is(other))) => {
                        Some(ferry - other <= *most)
                    }
                    (Some(Figure::MoreThan(_)), _) => Some(false),
                    _ => None,
                };
                (format!("+ ≤ {most}"), met)
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::Figure::{Is, LessThan, MoreThan};
    use super::*;

    fn figures(all: &[Figure]) -> Figures {
        Figures { all: all.to_vec(), failure: None }
    }

    fn failed() -> Figures {
        Figures { all: vec![Is(1.0)], failure: Some(anyhow::anyhow!("as a test wants it")) }
    }

    fn measured(qemu: &[Figure], newer: &[Figure], ferry: &[Figure]) -> Measured {
        Measured { qemu: figures(qemu), newer: figures(newer), ferry: figures(ferry) }
    }

    #[test]
    fn a_figure_that_has_no_end_is_said_to_be_more_and_comes_last() {
        assert_eq!(figures(&[MoreThan(60.0)]).cell(), "> 60");
        let all = figures(&[MoreThan(3.0), Is(50.0), Is(4.0)]);
        assert_eq!(all.median(), Some(Is(50.0)));
        assert_eq!(all.cell(), "50.00 (4.00 to > 3)");
        assert_eq!(figures(&[MoreThan(60.0), Is(20.0)]).median(), Some(MoreThan(40.0)));
        assert_eq!(figures(&[Is(1.0), Is(2.0), Is(4.0), Is(3.0)]).cell(), "2.50 (1.00-4.00)");
        assert_eq!((figures(&[]).median(), figures(&[]).cell().as_str()), (None, "-"));
        assert_eq!((failed().median(), failed().cell().as_str()), (None, "FAILED"));
    }

    #[test]
    fn what_is_compared_with_is_the_better_qemu() {
        let both = measured(&[Is(4.0)], &[Is(2.0)], &[Is(1.0)]);
        let (most, least) = (Target::RatioAtMost(0.4), Target::RatioAtLeast(0.4));
        assert_eq!(both.ratio(&most), Some(Is(0.5)));
        assert_eq!(both.ratio(&least), Some(Is(0.25)));
        let one = measured(&[MoreThan(60.0)], &[Is(20.0)], &[Is(10.0)]);
        assert_eq!(one.ratio(&most), Some(Is(0.5)));
        let none = measured(&[MoreThan(60.0)], &[], &[Is(15.0)]);
        assert_eq!(none.ratio(&most), Some(LessThan(0.25)));
        assert_eq!(measured(&[], &[], &[Is(15.0)]).ratio(&most), None);
        let neither = measured(&[MoreThan(60.0)], &[], &[MoreThan(60.0)]);
        assert_eq!(neither.ratio(&most), None);
    }

    #[test]
    fn verdicts() {
        let (slow, fast) = ([Is(10.0)], [Is(2.0)]);
        let endless = [MoreThan(60.0)];
        type Case<'c> = (Target, &'c [Figure], &'c [Figure], &'static str, Option<bool>);
        let cases: &[Case] = &[
            (Target::AtMost(2.0), &[], &fast, "≤ 2", Some(true)),
            (Target::AtMost(1.9), &[], &fast, "≤ 1.9", Some(false)),
            (Target::AtMost(100.0), &slow, &endless, "≤ 100", Some(false)),
            (Target::AtLeast(2.0), &slow, &fast, "≥ 2", Some(true)),
            (Target::AtLeast(2.1), &[], &fast, "≥ 2.1", Some(false)),
            (Target::AtLeast(2.0), &[], &[], "≥ 2", None),
            (Target::RatioAtMost(0.2), &slow, &fast, "ratio ≤ 0.20", Some(true)),
            (Target::RatioAtMost(0.1), &slow, &fast, "ratio ≤ 0.10", Some(false)),
            (Target::RatioAtMost(0.1), &endless, &fast, "ratio ≤ 0.10", Some(true)),
            (Target::RatioAtMost(0.01), &endless, &fast, "ratio ≤ 0.01", None),
            (Target::RatioAtMost(9.0), &endless, &endless, "ratio ≤ 9.00", Some(false)),
            (Target::RatioAtMost(9.0), &[], &fast, "ratio ≤ 9.00", None),
            (Target::RatioAtLeast(5.0), &fast, &slow, "ratio ≥ 5", Some(true)),
            (Target::RatioAtLeast(5.1), &fast, &slow, "ratio ≥ 5.1", Some(false)),
            (Target::RatioAtLeast(0.1), &endless, &fast, "ratio ≥ 0.1", Some(false)),
            (Target::MoreByAtMost(8.0), &fast, &slow, "+ ≤ 8", Some(true)),
            (Target::MoreByAtMost(7.9), &fast, &slow, "+ ≤ 7.9", Some(false)),
            (Target::MoreByAtMost(0.0), &[Is(0.0)], &[Is(0.0)], "+ ≤ 0", Some(true)),
            (Target::MoreByAtMost(7.9), &[], &slow, "+ ≤ 7.9", None),
        ];
        for (target, qemu, ferry, words, met) in cases {
            let measured = measured(qemu, &[], ferry);
            assert_eq!(measured.verdict(target), ((*words).to_owned(), *met), "{qemu:?} {ferry:?}");
        }
    }

    #[test]
    fn a_side_that_fails_says_nothing_of_the_other() {
        let ferry = Measured { ferry: failed(), ..measured(&[Is(1.0)], &[], &[]) };
        assert_eq!(ferry.verdict(&Target::AtMost(5.0)).1, None);
        assert_eq!(ferry.qemu.cell(), "1.00");
        let qemu = Measured { qemu: failed(), ..measured(&[], &[Is(2.0)], &[Is(1.0)]) };
        assert_eq!(qemu.ratio(&Target::RatioAtMost(0.5)), Some(Is(0.5)), "of the other QEMU");
    }
}
