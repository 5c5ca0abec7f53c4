//! Many cases, counted.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::time::Instant;

use super::case::{Case, Pair};
use super::corpus::{self, Block};
use super::program::Pools;
use super::shrink;

#[derive(Debug, Clone)]
pub struct Options {
    pub seed: u64,
    pub first: u64,
    pub cases: u64,
    /// No case starts after this.
    pub until: Option<Instant>,
    /// Differences reported before it gives up.
    pub examples: usize,
    /// Executions before a translation, for all cases.
    pub threshold: Option<u8>,
    /// Blocks are kept from case to case, so that there comes a time when there is no room for more. What a case does then depends
    /// on those before it.
    pub keep: bool,
}

impl Default for Options {
    fn default() -> Self {
        Self { seed: 1, first: 0, cases: 10_000, until: None, examples: 3, threshold: None, keep: false }
    }
}

#[derive(Debug, Default)]
pub struct Summary {
    pub cases: u64,
    pub instructions: u64,
    pub translated: u64,
    pub early: u64,
    pub storms: u64,
    pub stale: u64,
    pub differing: u64,
    /// How often the translator began anew because it was full.
    pub refills: u64,
    pub tally: [u64; 5],
}

impl Summary {
    pub fn text(&self, seed: u64) -> String {
        let [exceptions, calls, interrupts, changes, excursions] = self.tally;
        format!(
            "seed {seed}: {} cases, {} instructions on each tier, {} blocks translated (full {} times); {exceptions} exceptions, {calls} system calls, {interrupts} interrupts, {changes} changes of page tables, {excursions} excursions from long mode; {} cases ended early, {} in endless faults, {} differ by translations without a flush; {} differ",
            self.cases, self.instructions, self.translated, self.refills, self.early, self.storms, self.stale, self.differing
        )
    }
}

/// Runs the cases; `tell` is given a text about each that differs.
pub fn run(options: &Options, tell: impl Fn(&str)) -> Summary {
    let pools = Pools::new();
    run_all(options, tell, |number| Some(Case::new(options.seed, number, &pools)))
}

/// As `run` with the blocks of a corpus in turn: case n is of block n modulo their number.
pub fn run_corpus(options: &Options, blocks: &[Block], tell: impl Fn(&str)) -> Summary {
    run_all(options, tell, |number| corpus::case(options.seed, number, &blocks[(number % blocks.len() as u64) as usize]))
}

fn run_all(options: &Options, tell: impl Fn(&str), make: impl Fn(u64) -> Option<Case>) -> Summary {
    let new = || {
        let mut pair = Pair::new();
        (pair.interpreter.keep, pair.translator.keep) = (options.keep, options.keep);
        pair
    };
    let mut pair = new();
    let mut translated = 0;
    let mut summary = Summary::default();
    for number in options.first..options.first.saturating_add(options.cases) {
        if number % 16 == 0 && options.until.is_some_and(|t| Instant::now() >= t) {
            break;
        }
        let Some(mut case) = make(number) else { continue };
        case.threshold = options.threshold.unwrap_or(case.threshold);
        let before = (pair.early, pair.storms, pair.stale);
        let outcome = catch_unwind(AssertUnwindSafe(|| pair.run(&case, u64::MAX)));
        summary.cases += 1;
        summary.instructions += pair.interpreter.executed();
        let now = pair.translator.cache.translations() as u64;
        summary.refills += u64::from(options.keep && now < translated);
        summary.translated += if options.keep && now >= translated { now - translated } else { now };
        translated = now;
        summary.early += pair.early - before.0;
        summary.storms += pair.storms - before.1;
        summary.stale += pair.stale - before.2;
        match outcome {
            Ok(Ok(())) => continue,
            Ok(Err((count, text))) if options.keep => {
                tell(&format!("seed {} case {number} differs after {count} instructions at most:\n{text}", options.seed));
            }
            Ok(Err(_)) => tell(&shrink::report(&mut pair, &case, options.seed)),
            Err(_) => {
                tell(&format!("seed {} case {number}: panic\n{}", options.seed, case.listing()));
                let tally = pair.tally;
                pair = new();
                pair.tally = tally;
            }
        }
        summary.differing += 1;
        if summary.differing >= options.examples as u64 {
            break;
        }
    }
    summary.tally = pair.tally;
    summary
}
