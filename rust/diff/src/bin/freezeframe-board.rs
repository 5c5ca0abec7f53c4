//! `freezeframe-board IMAGE [--cpus N] [--memory MIB] [--limit SECONDS] [--env KEY=VALUE]… [--until TEXT] [-- ARGUMENTS]`: runs an
//! ELF image (a test of the kvm-unit-tests suite, a tiny guest) on the bare machine and prints what it prints.
#[cfg(all(target_arch = "x86_64", target_os = "linux"))]
fn main() -> std::process::ExitCode {
    use diff::board::{Board, BoardConfig, Ended};

    let usage = || -> ! {
        eprintln!(
            "usage: freezeframe-board IMAGE [--cpus N] [--memory MIB] [--limit SECONDS] [--env KEY=VALUE]… [--until TEXT] [-- ARGUMENTS]"
        );
        std::process::exit(2)
    };
    let (mut image, mut cpus, mut memory, mut limit, mut env, mut until, mut rest) =
        (None, 1, 128, 60, String::new(), None, Vec::new());
    let mut args = std::env::args().skip(1);
    while let Some(arg) = args.next() {
        let mut number = || args.next().and_then(|v| v.parse().ok()).unwrap_or_else(|| usage());
        match arg.as_str() {
            "--cpus" => cpus = number() as usize,
            "--memory" => memory = number(),
            "--limit" => limit = number(),
            "--env" => env = env + &args.next().unwrap_or_else(|| usage()) + "\n",
            "--until" => until = args.next(),
            "--" => {
                rest = args.collect();
                break;
            }
            _ if image.is_none() => image = Some(arg),
            _ => usage(),
        }
    }
    let bytes = match image.map(std::fs::read) {
        Some(Ok(bytes)) => bytes,
        Some(Err(e)) => {
            eprintln!("{e}");
            return std::process::ExitCode::from(2);
        }
        None => usage(),
    };
    let module = (!env.is_empty()).then_some(env.as_bytes());
    let config = BoardConfig { image: &bytes, cpus, memory: memory << 20, command_line: &rest.join(" "), module };
    let mut board = match Board::new(&config) {
        Ok(board) => board,
        Err(e) => {
            eprintln!("{e}");
            return std::process::ExitCode::from(2);
        }
    };
    let ended = board.run(until.as_deref(), std::time::Duration::from_secs(limit));
    print!("{}", board.output());
    println!("[{ended:?}]");
    match ended {
        Ended::Exit(0) | Ended::Text => std::process::ExitCode::SUCCESS,
        _ => std::process::ExitCode::FAILURE,
    }
}

#[cfg(not(all(target_arch = "x86_64", target_os = "linux")))]
fn main() {
    eprintln!("this needs an x86-64 Linux host");
    std::process::exit(1);
}
