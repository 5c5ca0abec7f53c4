//! Every x87, MMX and SSE instruction of the profile has a handler.

use iced_x86::{Code, CpuidFeature as F, EncodingKind, Instruction, OpKind};

use super::{fpu, mmx, sse};

/// Instructions that other families serve, or that the decoder never returns (wait and no-wait form as one).
fn elsewhere(c: Code) -> bool {
    let name = format!("{c:?}");
    ["Crc32_", "Prefetch"].iter().any(|p| name.starts_with(p))
        || matches!(
            c,
            Code::Fstcw_m2byte
                | Code::Fstenv_m14byte
                | Code::Fstenv_m28byte
                | Code::Fsave_m94byte
                | Code::Fsave_m108byte
                | Code::Fstsw_m2byte
                | Code::Fstsw_AX
                | Code::Finit
                | Code::Fclex
                | Code::Feni
                | Code::Fdisi
                | Code::Fsetpm
        )
}

#[test]
fn all_have_handlers() {
    let ours = [F::FPU, F::FPU287, F::FPU387, F::MMX, F::SSE, F::SSE2, F::SSE3, F::SSSE3, F::SSE4_1, F::SSE4_2, F::FXSR];
    let mut seen = 0;
    for code in Code::values() {
        let features = code.cpuid_features();
        if code.encoding() != EncodingKind::Legacy || !features.iter().any(|f| ours.contains(f)) || elsewhere(code) {
            continue;
        }
        for memory in [None, Some(0), Some(1)] {
            let mut i = Instruction::default();
            i.set_code(code);
            if let Some(n) = memory.filter(|&n| n < i.op_count()) {
                i.set_op_kind(n, OpKind::Memory);
            }
            // Some have no register or no memory form; at least one must be there.
            seen += usize::from(memory.is_none());
            let found = fpu::select(&i).or_else(|| sse::select(&i)).or_else(|| mmx::select(&i)).is_some();
            let name = format!("{code:?}");
            let only_memory = name.contains("_m") && !name.contains("mmm") && !name.contains("_rm") && !name.contains("m8_");
            let right = match memory {
                None => !only_memory,
                Some(0) => name.split('_').nth(1).is_some_and(|o| o.contains('m') && o != "xmm" && o != "mm"),
                Some(_) => name.split('_').nth(2).is_some_and(|o| o.contains('m') && o != "xmm" && o != "mm"),
            };
            assert!(found || !right, "{code:?} with memory operand {memory:?}");
        }
    }
    assert!(seen > 500, "{seen}");
}
