//! `freezeframe-tiers [--seed S] [--cases N | --seconds T] [--first K]`: random programs on interpreter and translator.

#[cfg(all(target_arch = "x86_64", target_os = "linux"))]
fn main() -> std::process::ExitCode {
    use std::time::{Duration, Instant};

    use diff::tiers::campaign::{self, Options};

    let mut options = Options::default();
    let mut args = std::env::args().skip(1);
    while let Some(arg) = args.next() {
        let number = args.next().and_then(|v| v.parse::<u64>().ok());
        match (arg.as_str(), number) {
            ("--seed", Some(n)) => options.seed = n,
            ("--cases", Some(n)) => options.cases = n,
            ("--first", Some(n)) => options.first = n,
            // 250: hardly any block is translated, which tells a tier's fault from one of turns.
            ("--threshold", Some(n)) => options.threshold = Some(n.min(250) as u8),
            ("--examples", Some(n)) => options.examples = n as usize,
            ("--seconds", Some(n)) => {
                options.until = Some(Instant::now() + Duration::from_secs(n));
                options.cases = u64::MAX;
            }
            _ => {
                eprintln!(
                    "usage: freezeframe-tiers [--seed S] [--first K] [--cases N | --seconds T] [--examples N] [--threshold N]"
                );
                return std::process::ExitCode::from(2);
            }
        }
    }
    let summary = campaign::run(&options, |report| println!("{report}"));
    println!("{}", summary.text(options.seed));
    if summary.differing == 0 { std::process::ExitCode::SUCCESS } else { std::process::ExitCode::FAILURE }
}

#[cfg(not(all(target_arch = "x86_64", target_os = "linux")))]
fn main() {
    eprintln!("the translator needs an x86-64 Linux host");
    std::process::exit(1);
}
