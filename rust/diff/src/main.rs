//! `freezeframe-diff --cases N --seed S [--first K] [--filter TEXT]… [--bits 32] [--strict] [--handlers] [--translate] [--prelude N] [--raw] [--examples N] [--list]`
#[cfg(all(target_arch = "x86_64", target_os = "linux"))]
fn main() -> std::process::ExitCode {
    use diff::campaign::{self, Options};

    let mut options = Options::default();
    let mut args = std::env::args().skip(1);
    let number = |flag: &str, v: Option<String>| -> u64 {
        v.and_then(|v| v.parse().ok()).unwrap_or_else(|| {
            eprintln!("{flag} wants a number");
            std::process::exit(2)
        })
    };
    let mut list = false;
    while let Some(arg) = args.next() {
        match arg.as_str() {
            "--cases" => options.cases = number(&arg, args.next()),
            "--seed" => options.seed = number(&arg, args.next()),
            "--first" => options.first = number(&arg, args.next()),
            "--bits" => options.bits = number(&arg, args.next()) as u32,
            "--examples" => options.examples = number(&arg, args.next()) as usize,
            "--prelude" => options.prelude = number(&arg, args.next()),
            "--filter" => options.filter.extend(args.next()),
            "--translate" => options.translate = true,
            "--raw" => options.raw = true,
            "--strict" => options.rules.strict = true,
            "--handlers" => {
                options.handlers_only = true;
                options.rules.stack_faults_alike = true;
            }
            "--list" => list = true,
            _ => {
                eprintln!(
                    "usage: freezeframe-diff [--cases N] [--seed S] [--first K] [--filter TEXT]… [--bits 32|64] [--strict] [--handlers] [--translate] [--prelude N] [--examples N] [--list]"
                );
                return std::process::ExitCode::from(2);
            }
        }
    }
    if list {
        for c in campaign::codes(&options) {
            println!("{c:?}");
        }
        return std::process::ExitCode::SUCCESS;
    }
    let summary = campaign::run(&options);
    print!("{}", summary.text());
    if summary.clean() { std::process::ExitCode::SUCCESS } else { std::process::ExitCode::FAILURE }
}

#[cfg(not(all(target_arch = "x86_64", target_os = "linux")))]
fn main() {
    eprintln!("the differential runner needs an x86-64 Linux host");
    std::process::exit(1);
}
