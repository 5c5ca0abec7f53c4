//! `freezeframe-tiers`: random programs, or blocks of a real guest, on interpreter and translator; random bytes at the decoder.
//! See fuzz/README.md.

#[cfg(all(target_arch = "x86_64", target_os = "linux"))]
mod command {
    use std::process::ExitCode;
    use std::time::{Duration, Instant};

    use diff::tiers::bytes::Bytes;
    use diff::tiers::campaign::{self, Options};
    use diff::tiers::corpus;

    const USAGE: &str =
        "usage: freezeframe-tiers [--seed S] [--first K] [--cases N | --seconds T] [--examples N] [--threshold N] [--keep]
                         [--corpus FILE | --decoder]";

    enum What {
        Programs,
        Corpus(Vec<corpus::Block>),
        Decoder,
    }

    fn options() -> Result<(Options, What), String> {
        let mut options = Options::default();
        let mut what = What::Programs;
        let mut args = std::env::args().skip(1);
        while let Some(arg) = args.next() {
            if arg == "--decoder" {
                what = What::Decoder;
                continue;
            }
            if arg == "--keep" {
                options.keep = true;
                continue;
            }
            let value = args.next().ok_or(USAGE)?;
            if arg == "--corpus" {
                let data = std::fs::read(&value).map_err(|e| format!("{value}: {e}"))?;
                let blocks = corpus::read(&data).map_err(|e| format!("{value}: {e}"))?;
                if blocks.is_empty() {
                    return Err(format!("{value}: no blocks"));
                }
                options.cases = blocks.len() as u64;
                what = What::Corpus(blocks);
                continue;
            }
            let number: u64 = value.parse().map_err(|_| format!("{arg} wants a number"))?;
            match arg.as_str() {
                "--seed" => options.seed = number,
                "--cases" => options.cases = number,
                "--first" => options.first = number,
                "--examples" => options.examples = number as usize,
                // 250: hardly any block is translated, which tells a tier's fault from one of turns.
                "--threshold" => options.threshold = Some(number.min(250) as u8),
                "--seconds" => {
                    options.until = Some(Instant::now() + Duration::from_secs(number));
                    options.cases = u64::MAX;
                }
                _ => return Err(USAGE.into()),
            }
        }
        Ok((options, what))
    }

    fn decoder(options: &Options) -> ExitCode {
        let (mut cases, mut instructions) = (0u64, 0);
        let bytes = Bytes::default();
        for number in options.first..options.first.saturating_add(options.cases) {
            if options.until.is_some_and(|t| number % 64 == 0 && Instant::now() >= t) {
                break;
            }
            match bytes.check(options.seed, number) {
                Ok(n) => instructions += n,
                Err(text) => {
                    println!("{text}");
                    return ExitCode::FAILURE;
                }
            }
            cases += 1;
        }
        println!("seed {}: {cases} cases in three modes, {instructions} instructions decoded", options.seed);
        ExitCode::SUCCESS
    }

    pub fn main() -> ExitCode {
        let (options, what) = match options() {
            Ok(both) => both,
            Err(text) => {
                eprintln!("{text}");
                return ExitCode::from(2);
            }
        };
        let tell = |report: &str| println!("{report}");
        let summary = match what {
            What::Programs => campaign::run(&options, tell),
            What::Corpus(blocks) => campaign::run_corpus(&options, &blocks, tell),
            What::Decoder => return decoder(&options),
        };
        println!("{}", summary.text(options.seed));
        if summary.differing == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE }
    }
}

#[cfg(all(target_arch = "x86_64", target_os = "linux"))]
fn main() -> std::process::ExitCode {
    command::main()
}

#[cfg(not(all(target_arch = "x86_64", target_os = "linux")))]
fn main() {
    eprintln!("the translator needs an x86-64 Linux host");
    std::process::exit(1);
}
