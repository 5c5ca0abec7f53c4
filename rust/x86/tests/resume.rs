//! A program stopped after any number of instructions, saved, and restored into a new engine goes on as if nothing had happened.

mod common;

use std::sync::Arc;

use common::*;
use memory::{GuestMemory, RegionLayout};
use vcpu::{Bus, Control, Engine, VcpuState};
use x86::{EngineConfig, SoftwareEngine};

const SIZE: usize = 0x40_0000;
const CODE: u64 = 0x5000;
const HANDLER: u64 = 0x6000;

#[rustfmt::skip]
const PROGRAM: &[u8] = &[
    0x48, 0x69, 0xc0, 0x2d, 0xf4, 0x51, 0x58,       // imul rax, rax, 0x5851f42d
    0x48, 0x01, 0xc8,                               // add rax, rcx
    0x48, 0x89, 0xc2,                               // mov rdx, rax
    0x81, 0xe2, 0xff, 0x0f, 0x00, 0x00,             // and edx, 0xfff
    0x48, 0x31, 0x84, 0x13, 0x00, 0x00, 0x02, 0x00, // xor [rbx + rdx + 0x20000], rax
    0xd1, 0xc0,                                     // rol eax, 1
    0x11, 0xc6,                                     // adc esi, eax
    0xcc,                                           // int3
    0x51, 0x57,                                     // push rcx; push rdi
    0xb9, 0x25, 0x00, 0x00, 0x00,                   // mov ecx, 37
    0xbf, 0xf0, 0x1f, 0x03, 0x00,                   // mov edi, 0x31ff0
    0xf3, 0xaa,                                     // rep stosb (across a page)
    0xfe, 0x05, 0x0b, 0x00, 0x00, 0x00,             // inc byte [rip + 11]: the immediate below
    0x5f, 0x59,                                     // pop rdi; pop rcx
    0xfb, 0x90, 0xfa,                               // sti; nop; cli
    0x48, 0xff, 0xc9,                               // dec rcx
    0x49, 0x81, 0xc0, 0x11, 0x22, 0x33, 0x44,       // add r8, 0x44332211 (modifies itself)
    0x48, 0x85, 0xc9,                               // test rcx, rcx
    0x75, 0xb8,                                     // jnz start
    0xf4,                                           // hlt
];
/// inc rbp; iretq
const TRAP: &[u8] = &[0x48, 0xff, 0xc5, 0x48, 0xcf];

struct Run {
    engine: SoftwareEngine,
    memory: Arc<GuestMemory>,
}

impl Run {
    fn new(contents: &[u8], state: &VcpuState) -> Self {
        let memory = Arc::new(GuestMemory::new(&[RegionLayout { gpa: 0, size: SIZE as u64 }]).unwrap());
        memory.write(0, contents).unwrap();
        let mut engine = SoftwareEngine::new(
            EngineConfig {
                memory: memory.clone(),
                bus: Arc::new(Bus::default()),
                clock: clock(1_000_000),
                control: Arc::new(Control::default()),
                vcpus: 1,
                phys_bits: 46,
                eoi: None,
                switches: Default::default(),
            },
            x86::Tier::default(),
        )
        .unwrap();
        engine.set_state(0, state).unwrap();
        Self { engine, memory }
    }
    fn contents(&self) -> Vec<u8> {
        let mut bytes = vec![0; SIZE];
        self.memory.read(0, &mut bytes).unwrap();
        bytes
    }
    fn run(&mut self, n: u64) -> u64 {
        self.engine.run_exactly(n).unwrap()
    }
    fn state(&mut self) -> VcpuState {
        self.engine.state(0).unwrap()
    }
}

fn start() -> (Vec<u8>, VcpuState) {
    let mut m = machine(1);
    m.long_mode(0, 0);
    m.write(CODE, PROGRAM);
    m.write(HANDLER, TRAP);
    m.gate64(3, CODE64, HANDLER, 0x8e, 0);
    let core = &mut m.cores[0];
    core.cpu.gpr[..8].copy_from_slice(&[7, 60, 0, 0, STACK1, 0, 0, 0]);
    core.cpu.rip = CODE;
    let state = core.save();
    let mut contents = vec![0; SIZE];
    m.shared.memory.read(0, &mut contents).unwrap();
    (contents, state)
}

#[test]
fn the_program_ends() {
    let (contents, state) = start();
    let mut run = Run::new(&contents, &state);
    let done = run.run(1_000_000);
    let end = run.state();
    // 60 rounds of 23 instructions, 36 more iterations of STOSB and two instructions of the trap; HLT.
    assert_eq!(done, 60 * (23 + 36 + 2) + 1);
    assert_eq!((end.regs.rbp, end.regs.rcx, end.mp_state), (60, 0, vcpu::state::MpState::Halted));
    // Round k (from 1) adds an immediate whose low byte has been incremented k times.
    assert_eq!(end.regs.r8, 60 * 0x4433_2211 + 60 * 61 / 2);
}

#[test]
fn any_boundary_is_as_good_as_none() {
    let (contents, state) = start();
    let mut whole = Run::new(&contents, &state);
    let mut at = 0;
    for n in [1, 2, 3, 5, 8, 13, 1, 1, 21, 34, 1, 55, 89, 144, 1, 233, 377] {
        assert_eq!(whole.run(n), n);
        at += n;
        let saved = whole.state();
        // A second engine that never ran the first part…
        let mut restored = Run::new(&whole.contents(), &saved);
        assert_eq!(restored.state(), saved, "after {at}");
        // …and a third that ran all of it at once.
        let mut once = Run::new(&contents, &state);
        assert_eq!(once.run(at), at);
        assert_eq!(once.state(), saved, "after {at}");
        for step in [1, 2, 3, 4, 50, 999] {
            let mut go_on = Run::new(&whole.contents(), &saved);
            assert_eq!(go_on.run(step), step);
            let mut once = Run::new(&contents, &state);
            assert_eq!(once.run(at + step), at + step);
            assert_eq!(go_on.state(), once.state(), "after {at} + {step}");
            assert_eq!(go_on.contents(), once.contents(), "after {at} + {step}");
        }
    }
}
