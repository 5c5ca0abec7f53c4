//! Many cases, counted, with a short list of what differed.

use std::collections::BTreeMap;
use std::fmt::Write as _;

use iced_x86::{Code, Formatter, IntelFormatter};

use crate::case::{Case, Outcome};
use crate::compare::{self, Rules};
use crate::engine::{Ours, Trouble};
use crate::native::Native;
use crate::{forms, generate};

#[derive(Debug, Clone)]
pub struct Options {
    pub seed: u64,
    pub cases: u64,
    pub first: u64,
    pub bits: u32,
    /// Only codes whose name contains this, ignoring case; a leading `=` wants the whole mnemonic.
    pub filter: Vec<String>,
    pub rules: Rules,
    /// Reports kept a code.
    pub examples: usize,
    /// Up to so many other instructions before each.
    pub prelude: u64,
    /// Random bytes instead of instructions by name.
    pub raw: bool,
    /// Decoder and instruction functions alone, without block loop and exception delivery.
    pub handlers_only: bool,
    /// With every block translated at its first execution.
    pub translate: bool,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            seed: 1,
            cases: 100_000,
            first: 0,
            bits: 64,
            filter: Vec::new(),
            rules: Rules::default(),
            examples: 1,
            prelude: 0,
            raw: false,
            handlers_only: false,
            translate: false,
        }
    }
}

#[derive(Debug, Default)]
pub struct Summary {
    pub run: u64,
    /// Native outcome: how many cases ended with each vector (3: went through).
    pub vectors: BTreeMap<u8, u64>,
    /// Code → (cases, differing cases, reports).
    pub differing: BTreeMap<String, (u64, Vec<String>)>,
    pub missing: BTreeMap<String, u64>,
    pub tried: BTreeMap<String, u64>,
    /// First line of the reports, without numbers that vary → cases.
    pub kinds: BTreeMap<String, u64>,
}

impl Summary {
    pub fn clean(&self) -> bool {
        self.differing.is_empty() && self.missing.is_empty()
    }

    pub fn text(&self) -> String {
        let mut s = String::new();
        for (count, reports) in self.differing.values() {
            for r in reports {
                let _ = writeln!(s, "{r}");
            }
            let _ = count;
        }
        if !self.missing.is_empty() {
            let names: Vec<_> = self.missing.keys().map(String::as_str).collect();
            let _ = writeln!(s, "without a function in the engine: {}", names.join(" "));
        }
        let differing: u64 = self.differing.values().map(|(n, _)| n).sum();
        for (code, (n, _)) in &self.differing {
            let _ = writeln!(s, "{n:7} of {:7} {code}", self.tried.get(code).copied().unwrap_or(0));
        }
        for (kind, n) in &self.kinds {
            let _ = writeln!(s, "{n:7} {kind}");
        }
        let _ = writeln!(
            s,
            "{} cases of {} codes, {differing} differ in {} codes, {} codes missing; ended by vector: {:?}",
            self.run,
            self.tried.len(),
            self.differing.len(),
            self.missing.len(),
            self.vectors
        );
        s
    }
}

pub fn codes(options: &Options) -> Vec<Code> {
    let wanted = |c: &Code| {
        let name = format!("{c:?}").to_lowercase();
        let mnemonic = format!("{:?}", c.mnemonic()).to_lowercase();
        options.filter.is_empty()
            || options.filter.iter().any(|f| {
                let f = f.to_lowercase();
                f.strip_prefix('=').map_or(name.contains(&f), |whole| mnemonic == whole)
            })
    };
    forms::all(options.bits).into_iter().filter(wanted).collect()
}

/// Runs the cases that `options` describes.
pub fn run(options: &Options) -> Summary {
    let codes = if options.raw { Vec::new() } else { codes(options) };
    let mut summary = Summary::default();
    if codes.is_empty() && !options.raw {
        return summary;
    }
    let mut native = Native::new();
    let mut ours = if options.translate { Ours::translating() } else { Ours::new() };
    for number in options.first..options.first + options.cases {
        let Some(case) = generate::case(options.seed, number, &codes, options.bits, options.prelude) else { continue };
        let code = format!("{:?}", case.code);
        *summary.tried.entry(code.clone()).or_default() += 1;
        summary.run += 1;
        let expected = native.run(&case);
        *summary.vectors.entry(expected.vector).or_default() += 1;
        let got = if options.handlers_only { ours.run_handlers(&case) } else { ours.run(&case) };
        let lines = match got {
            Ok(got) => {
                let lines = compare::differences(&case, &expected, &got, options.rules);
                if lines.is_empty() {
                    continue;
                }
                lines
            }
            Err(Trouble::Unsupported(_)) => {
                *summary.missing.entry(code).or_default() += 1;
                continue;
            }
            Err(Trouble::Other(what)) => vec![format!("native vector {} ours: {what}", expected.vector)],
        };
        *summary.kinds.entry(kind(&lines[0])).or_default() += 1;
        let entry = summary.differing.entry(code).or_default();
        entry.0 += 1;
        if entry.1.len() < options.examples {
            entry.1.push(report(options, &case, &expected, &lines));
        }
    }
    summary
}

fn kind(line: &str) -> String {
    match line.split_whitespace().next() {
        Some("vector" | "native") => line.to_string(),
        Some("rflags") => line.split(", ").last().unwrap_or_default().to_string(),
        Some(first) => first.to_string(),
        None => String::new(),
    }
}

/// All that is needed to look into one difference.
fn report(options: &Options, case: &Case, native: &Outcome, lines: &[String]) -> String {
    let mut text = String::new();
    let mut disassembly = String::new();
    if let Some(form) = forms::decode(&case.bytes[case.prelude..], case.bits, case.state.rip + case.prelude as u64) {
        IntelFormatter::new().format(&form.insn, &mut disassembly);
    }
    let bytes: Vec<_> = case.bytes.iter().map(|b| format!("{b:02x}")).collect();
    let mut before = String::new();
    let mut decoder =
        iced_x86::Decoder::with_ip(case.bits, &case.bytes[..case.prelude], case.state.rip, iced_x86::DecoderOptions::AMD);
    while decoder.can_decode() {
        IntelFormatter::new().format(&decoder.decode(), &mut before);
        before.push_str("; ");
    }
    disassembly.insert_str(0, &before);
    let _ = writeln!(text, "--- {:?} seed {} case {}: {} | {disassembly}", case.code, options.seed, case.number, bytes.join(" "));
    let s = &case.state;
    let _ = writeln!(
        text,
        "    rip {:x} rflags {:x} rax {:x} rcx {:x} rdx {:x} rbx {:x} rsp {:x} rsi {:x} rdi {:x} mxcsr {:x} fcw {:x} fsw {:x} ftw {:x} | native vector {}",
        s.rip,
        s.rflags,
        s.gpr[0],
        s.gpr[1],
        s.gpr[2],
        s.gpr[3],
        s.gpr[4],
        s.gpr[6],
        s.gpr[7],
        s.mxcsr(),
        s.u16(0),
        s.u16(2),
        s.fx[4],
        native.vector
    );
    if let Some(form) = forms::decode(&case.bytes[case.prelude..], case.bits, s.rip + case.prelude as u64) {
        for op in 0..form.insn.op_count() {
            if form.insn.op_kind(op) == iced_x86::OpKind::Register {
                let r = form.insn.op_register(op);
                if r.is_xmm() {
                    let _ = writeln!(text, "    {r:?} = {:032x}", s.xmm(r.number()));
                } else if r.is_gpr() {
                    let _ = writeln!(text, "    {r:?} = {:x}", s.gpr[r.full_register().number()]);
                } else if r.is_st() || r.is_mm() {
                    let i = if r.is_st() { r.number() } else { (r.number() + 8 - usize::from(s.u16(2) >> 11 & 7)) & 7 };
                    let _ = writeln!(text, "    {r:?} = {:04x}:{:016x}", s.st(i).1, s.st(i).0);
                }
            }
        }
        if format!("{:?}", case.code).starts_with('F') {
            let _ =
                writeln!(text, "    st(0) = {:04x}:{:016x} st(1) = {:04x}:{:016x}", s.st(0).1, s.st(0).0, s.st(1).1, s.st(1).0);
        }
        let mut factory = iced_x86::InstructionInfoFactory::new();
        for used in factory.info(&form.insn).used_memory() {
            let at = used.virtual_address(0, |r, _, _| {
                Some(match r {
                    iced_x86::Register::FS => s.fs_base,
                    iced_x86::Register::GS => s.gs_base,
                    r if r.is_gpr() => s.gpr[r.full_register().number()] & if r.size() == 4 { 0xffff_ffff } else { u64::MAX },
                    _ => 0,
                })
            });
            let Some(at) = at else { continue };
            let size = used.memory_size().size();
            let offset = at.wrapping_sub(crate::case::DATA) as usize;
            let bytes: Vec<_> =
                (0..size.min(32)).filter_map(|i| case.data.get(offset.wrapping_add(i))).map(|b| format!("{b:02x}")).collect();
            let _ = writeln!(text, "    memory {at:#x} size {size} {:?}: {}", used.access(), bytes.join(" "));
        }
    }
    for l in lines {
        let _ = writeln!(text, "    {l}");
    }
    text.pop();
    text
}
