//! Instructions of features that the profile hides: on a processor without them some are #UD, some are no-operations, and some are
//! older instructions with a prefix that means nothing.
#![cfg(all(target_arch = "x86_64", target_os = "linux"))]

use diff::case::{CODE, Case, DATA, DATA_LEN, State};
use diff::engine::Ours;

const UD: u8 = 6;
const BP: u8 = 3;

fn run(ours: &mut Ours, bytes: &[u8], rcx: u64) -> (u8, State, State) {
    let mut state = State { rip: CODE + 0x100, rflags: 0x202, ..State::default() };
    for (n, g) in state.gpr.iter_mut().enumerate() {
        *g = DATA + 0x100 * n as u64;
    }
    state.gpr[1] = rcx;
    state.set_mxcsr(0x1f80);
    state.set_u16(0, 0x37f);
    let data = Box::new([0; DATA_LEN]);
    let code = iced_x86::Code::INVALID;
    let case = Case { number: 0, code, bytes: bytes.to_vec(), prelude: 0, bits: 64, state: state.clone(), data };
    let outcome = ours.run(&case).unwrap_or_else(|e| panic!("{bytes:02x?}: {e:?}"));
    (outcome.vector, state, outcome.state)
}

#[test]
fn are_no_operations() {
    let mut ours = Ours::new();
    let all: &[(&str, &[u8])] = &[
        ("endbr64", &[0xf3, 0x0f, 0x1e, 0xfa]),
        ("endbr32", &[0xf3, 0x0f, 0x1e, 0xfb]),
        ("rdsspd edx", &[0xf3, 0x0f, 0x1e, 0xca]),
        ("rdsspq rdx", &[0xf3, 0x48, 0x0f, 0x1e, 0xca]),
        ("bndmk", &[0xf3, 0x0f, 0x1b, 0x03]),
        ("bndcl", &[0xf3, 0x0f, 0x1a, 0x03]),
        ("bndcu", &[0xf2, 0x0f, 0x1a, 0x03]),
        ("bndmov load", &[0x66, 0x0f, 0x1a, 0x03]),
        ("bndmov store", &[0x66, 0x0f, 0x1b, 0x03]),
        ("bndldx", &[0x0f, 0x1a, 0x04, 0x13]),
        ("bndstx", &[0x0f, 0x1b, 0x04, 0x13]),
        ("cldemote", &[0x0f, 0x1c, 0x03]),
        ("prefetchit0", &[0x0f, 0x18, 0x3d, 0, 0, 0, 0]),
        ("0f 18 /4", &[0x0f, 0x18, 0x23]),
        ("0f 18 /6", &[0x0f, 0x18, 0x33]),
        ("0f 18 of a register", &[0x0f, 0x18, 0xc0]),
        ("0f 1e /1 of memory", &[0xf3, 0x0f, 0x1e, 0x0b]),
        ("0f 1d", &[0x0f, 0x1d, 0xc0]),
        ("prefetchwt1", &[0x0f, 0x0d, 0x13]),
        ("prefetchw", &[0x0f, 0x0d, 0x0b]),
        ("nop with every prefix", &[0x66, 0xf2, 0x2e, 0x0f, 0x1f, 0x84, 0, 0, 0, 0, 0]),
        ("hint nop 0f 19", &[0x0f, 0x19, 0xc0]),
        ("data16 pause", &[0x66, 0xf3, 0x90]),
    ];
    let wrong = all.iter().filter(|(_, bytes)| {
        let (vector, before, after) = run(&mut ours, bytes, 0x123);
        vector != BP || before.gpr != after.gpr || after.rip != before.rip + bytes.len() as u64 + 1
    });
    assert_eq!(wrong.map(|w| w.0).collect::<Vec<_>>(), Vec::<&str>::new());
}

#[test]
fn are_undefined() {
    let mut ours = Ours::new();
    let all: &[(&str, &[u8])] = &[
        ("movbe eax, [rbx]", &[0x0f, 0x38, 0xf0, 0x03]),
        ("rdrand eax", &[0x0f, 0xc7, 0xf0]),
        ("rdseed eax", &[0x0f, 0xc7, 0xf8]),
        ("xgetbv", &[0x0f, 0x01, 0xd0]),
        ("xsave [rbx]", &[0x0f, 0xae, 0x23]),
        ("xrstor [rbx]", &[0x0f, 0xae, 0x2b]),
        ("vzeroupper", &[0xc5, 0xf8, 0x77]),
        ("vpaddb xmm", &[0xc5, 0xf9, 0xfc, 0xc1]),
        ("andn", &[0xc4, 0xe2, 0x78, 0xf2, 0xc1]),
        ("evex", &[0x62, 0xf1, 0x7c, 0x48, 0x58, 0xc1]),
        ("aesenc", &[0x66, 0x0f, 0x38, 0xdc, 0xc1]),
        ("pclmulqdq", &[0x66, 0x0f, 0x3a, 0x44, 0xc1, 0]),
        ("sha1msg1", &[0x0f, 0x38, 0xc9, 0xc1]),
        ("adcx", &[0x66, 0x0f, 0x38, 0xf6, 0xc1]),
        ("adox", &[0xf3, 0x0f, 0x38, 0xf6, 0xc1]),
        ("extrq (sse4a)", &[0x66, 0x0f, 0x78, 0xc1, 1, 2]),
        ("movntsd (sse4a)", &[0xf2, 0x0f, 0x2b, 0x03]),
        ("pfadd (3dnow)", &[0x0f, 0x0f, 0xc1, 0x9e]),
        ("femms", &[0x0f, 0x0e]),
        ("xbegin", &[0xc7, 0xf8, 0, 0, 0, 0]),
        ("rdpkru", &[0x0f, 0x01, 0xee]),
        ("stac", &[0x0f, 0x01, 0xcb]),
        ("monitor", &[0x0f, 0x01, 0xc8]),
        ("mwait", &[0x0f, 0x01, 0xc9]),
        ("clzero", &[0x0f, 0x01, 0xfc]),
        ("vmrun", &[0x0f, 0x01, 0xd8]),
        ("vmxon [rbx]", &[0xf3, 0x0f, 0xc7, 0x33]),
        ("rdpid", &[0xf3, 0x0f, 0xc7, 0xf8]),
        ("ud0", &[0x0f, 0xff]),
        ("ud1", &[0x0f, 0xb9, 0xc0]),
        ("ud2", &[0x0f, 0x0b]),
        ("lock mov", &[0xf0, 0x89, 0x03]),
        ("lock add to a register", &[0xf0, 0x01, 0xc3]),
        ("push es", &[0x06]),
        ("into", &[0xce]),
        ("aam", &[0xd4, 10]),
        ("far call, direct", &[0x9a, 0, 0, 0, 0, 0x33, 0]),
    ];
    let wrong = all.iter().filter(|(_, bytes)| {
        let (vector, before, after) = run(&mut ours, bytes, 0x123);
        vector != UD || before.gpr != after.gpr || after.rip != before.rip
    });
    assert_eq!(wrong.map(|w| w.0).collect::<Vec<_>>(), Vec::<&str>::new());
}

/// TZCNT and LZCNT are BSF and BSR where the processor has neither: other results for LZCNT, other flags for both.
#[test]
fn are_older_instructions() {
    let mut ours = Ours::new();
    let (vector, _, after) = run(&mut ours, &[0xf3, 0x0f, 0xbc, 0xc1], 0x100);
    assert_eq!((vector, after.gpr[0]), (BP, 8));
    let (_, _, after) = run(&mut ours, &[0xf3, 0x0f, 0xbd, 0xc1], 0x100);
    assert_eq!(after.gpr[0], 8);
    // A zero source: ZF, the destination as it was.
    let (_, before, after) = run(&mut ours, &[0xf3, 0x48, 0x0f, 0xbc, 0xc1], 0);
    assert_eq!((after.gpr[0], after.rflags & 0x40), (before.gpr[0], 0x40));
    // XACQUIRE LOCK, BND JMP, NOTRACK JMP: prefixes without a meaning.
    let (vector, _, after) = run(&mut ours, &[0xf2, 0xf0, 0x48, 0x01, 0x03], 0);
    assert_eq!((vector, after.rip), (BP, CODE + 0x106));
    let (vector, _, after) = run(&mut ours, &[0xf2, 0xe9, 0x10, 0, 0, 0], 0);
    assert_eq!((vector, after.rip), (BP, CODE + 0x117));
    let (vector, _, after) = run(&mut ours, &[0x3e, 0xff, 0xe1], CODE + 0x200);
    assert_eq!((vector, after.rip), (BP, CODE + 0x201));
}
