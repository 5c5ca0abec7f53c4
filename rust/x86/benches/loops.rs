//! Speed of the interpreter on loops that stand for what guests do: `cargo bench -p freezeframe-x86`.
//! Instructions per second; the figures of the design's measurements are in docs/design.

#[path = "../tests/flat/mod.rs"]
mod flat;

use std::time::Instant;

use flat::{DATA, Machine};
use x86::state::{RDI, RSI};

/// ALU: add, xor, shl, lea, cmp, jcc.
/// `l: add rax,rcx; xor rbx,rax; shl rbx,1; lea rdx,[rbx+rax*4+3]; cmp rdx,rsi; jne +3; inc r8; and rax,0xffffff; dec ecx; jnz l`
const ALU: &[u8] = &[
    0x48, 0x01, 0xc8, 0x48, 0x31, 0xc3, 0x48, 0xd1, 0xe3, 0x48, 0x8d, 0x54, 0x83, 0x03, 0x48, 0x39, 0xf2, 0x75, 0x03, 0x49, 0xff,
    0xc0, 0x48, 0x25, 0xff, 0xff, 0xff, 0x00, 0xff, 0xc9, 0x75, 0xe0, 0xf4,
];

/// Memory: byte hash with a read-modify-write.
/// `l: movzx eax,byte [rsi+rcx]; add rbx,rax; mov [rdi],rbx; mov rdx,[rdi]; add dword [rdi+8],1; test al,1; je +3; inc r8; dec ecx; jnz l`
const MEMORY: &[u8] = &[
    0x0f, 0xb6, 0x04, 0x0e, 0x48, 0x01, 0xc3, 0x48, 0x89, 0x1f, 0x48, 0x8b, 0x17, 0x83, 0x47, 0x08, 0x01, 0xa8, 0x01, 0x74, 0x03,
    0x49, 0xff, 0xc0, 0xff, 0xc9, 0x75, 0xe4, 0xf4,
];

/// Calls: `l: call f; dec ecx; jnz l; hlt; f: push rbx; push rbp; mov rbp,rsp; xor eax,eax; pop rbp; pop rbx; ret`
const CALLS: &[u8] =
    &[0xe8, 0x05, 0, 0, 0, 0xff, 0xc9, 0x75, 0xf7, 0xf4, 0x53, 0x55, 0x48, 0x89, 0xe5, 0x31, 0xc0, 0x5d, 0x5b, 0xc3];

fn main() {
    for ((name, body), threshold) in
        [("alu", ALU), ("memory", MEMORY), ("calls", CALLS)].into_iter().flat_map(|row| [(row, None), (row, Some(16))])
    {
        let mut best = 0.0f64;
        for _ in 0..3 {
            let mut code = vec![0xb9];
            code.extend(0x8000u32.to_le_bytes());
            code.extend(body);
            let mut m = Machine::new(&code);
            if let Some(threshold) = threshold {
                m.cache.translate_after(threshold).expect("this host does not let us translate");
            }
            m.write(DATA, &(0..0x1_0000u32).map(|n| (n * 31) as u8).collect::<Vec<_>>());
            (*m.gpr(RSI), *m.gpr(RDI)) = (DATA, 0x20_0000);
            let before = m.core.cpu.icount;
            let start = Instant::now();
            for _ in 0..200 {
                m.restart(flat::CODE);
                assert_eq!(m.run(), None);
            }
            best = best.max((m.core.cpu.icount - before) as f64 / start.elapsed().as_secs_f64() / 1e6);
        }
        let tier = if threshold.is_some() { "translator" } else { "interpreter" };
        println!("{name:8} {tier:12} {best:6.0} M instructions/s");
    }
}
