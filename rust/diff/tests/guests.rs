//! The tiny guests of the Python package on the bare board.
#![cfg(all(target_arch = "x86_64", target_os = "linux"))]

use std::path::Path;
use std::process::Command;
use std::time::Duration;

use diff::board::{Board, BoardConfig, Ended};

const LIMIT: Duration = Duration::from_secs(60);

/// As `freezeframe.testing.guests` builds them.
fn assemble(name: &str, symbols: &[(&str, u64)]) -> Vec<u8> {
    let sources = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../src/freezeframe/testing/asm");
    let tag: String = symbols.iter().map(|(k, v)| format!("-{k}{v:x}")).collect();
    let base = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("{name}{tag}"));
    let (object, image) = (base.with_extension("o"), base.with_extension("elf"));
    let mut assembler = Command::new("as");
    assembler.arg("--64").arg("-I").arg(&sources);
    for (key, value) in symbols {
        assembler.arg("--defsym").arg(format!("{key}={value:#x}"));
    }
    let run = |command: &mut Command| {
        let status = command.status().unwrap_or_else(|e| panic!("{command:?}: {e} (Debian: binutils)"));
        assert!(status.success(), "{command:?}");
    };
    run(assembler.arg("-o").arg(&object).arg(sources.join(name).with_extension("s")));
    let options = ["-m", "elf_x86_64", "-n", "-z", "noexecstack", "--no-warn-rwx-segments", "-T"];
    run(Command::new("ld").args(options).arg(sources.join("guest.ld")).arg("-o").arg(&image).arg(&object));
    std::fs::read(&image).expect("the image")
}

fn run_until(image: &[u8], cpus: usize, text: &str) -> Board {
    let config = BoardConfig { image, cpus, memory: 32 << 20, command_line: "", module: None };
    let mut board = Board::new(&config).expect("a board");
    let ended = board.run(Some(text), LIMIT);
    assert_eq!(ended, Ended::Text, "{}", board.output());
    board
}

#[test]
fn ticks() {
    let image = assemble("tick", &[("BASE", 0x40_0000), ("SIZE", 0x1_0000), ("SPIN", 1000)]);
    let board = run_until(&image, 1, "T 20\n");
    assert!(board.output().starts_with("READY\nT 1\nT 2\n"), "{}", board.output());
}

#[test]
fn several_cpus_with_either_kind_of_apic_and_timer() {
    for (x2apic, deadline) in [(0, 0), (0, 1), (1, 0), (1, 1)] {
        for cpus in [1, 2, 4, 8] {
            let symbols = [("CPUS", cpus as u64), ("X2APIC", x2apic), ("DEADLINE", deadline), ("PERIOD", 100_000)];
            let board = run_until(&assemble("smp", &symbols), cpus, "T 130\n");
            assert!(board.output().contains(&format!("CPUS {cpus}\n")), "{}", board.output());
        }
    }
}
