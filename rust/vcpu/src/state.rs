//! A vCPU as it is saved: KVM-ABI shaped, named fields, untrusted when read back. Both engines convert to and
//! from this in one place, so a snapshot of one restores on the other.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

fn is_zero(value: &u32) -> bool {
    *value == 0
}

macro_rules! saved {
    ($(#[$m:meta])* pub struct $name:ident { $($(#[$fm:meta])* pub $field:ident: $ty:ty,)* }) => {
        $(#[$m])*
        #[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
        #[serde(deny_unknown_fields)]
        pub struct $name { $($(#[$fm])* pub $field: $ty,)* }
    };
}

saved! {
    /// General registers (`struct kvm_regs`).
    pub struct Regs {
        pub rax: u64, pub rbx: u64, pub rcx: u64, pub rdx: u64,
        pub rsi: u64, pub rdi: u64, pub rsp: u64, pub rbp: u64,
        pub r8: u64, pub r9: u64, pub r10: u64, pub r11: u64,
        pub r12: u64, pub r13: u64, pub r14: u64, pub r15: u64,
        pub rip: u64, pub rflags: u64,
    }
}

saved! {
    /// A segment register with its hidden part (`struct kvm_segment`). `type_` is the descriptor's 4-bit type.
    pub struct Segment {
        pub base: u64, pub limit: u32, pub selector: u16,
        pub type_: u8, pub present: u8, pub dpl: u8, pub db: u8, pub s: u8, pub l: u8, pub g: u8, pub avl: u8, pub unusable: u8,
    }
}

saved! {
    pub struct Table { pub base: u64, pub limit: u16, }
}

saved! {
    /// Segments and control registers (`struct kvm_sregs`).
    pub struct Sregs {
        pub cs: Segment, pub ds: Segment, pub es: Segment, pub fs: Segment, pub gs: Segment, pub ss: Segment,
        pub tr: Segment, pub ldt: Segment, pub gdt: Table, pub idt: Table,
        pub cr0: u64, pub cr2: u64, pub cr3: u64, pub cr4: u64, pub cr8: u64, pub efer: u64, pub apic_base: u64,
    }
}

saved! {
    /// x87 and SSE (`struct kvm_fpu`). `fpr[i]` is ST(i), 80 bits, as 20 hex digits; `xmm[i]` 32 hex digits, both
    /// most significant first. `ftwx` is FXSAVE's abridged tag byte.
    pub struct Fpu {
        pub fpr: [String; 8], pub fcw: u16, pub fsw: u16, pub ftwx: u8, pub last_opcode: u16, pub last_ip: u64, pub last_dp: u64,
        pub xmm: [String; 16], pub mxcsr: u32,
    }
}

saved! {
    pub struct DebugRegs { pub db: [u64; 4], pub dr6: u64, pub dr7: u64, }
}

saved! {
    /// LAPIC registers by name (Intel SDM vol. 3, table 11-1). IRR/ISR/TMR are 8 words of 32 bits.
    /// `timer_current` is the count at the moment of saving, the deadline is MSR 0x6e0.
    pub struct Lapic {
        pub id: u32, pub tpr: u32, pub ldr: u32, pub dfr: u32, pub svr: u32, pub esr: u32, pub esr_pending: u32, pub icr: u64,
        pub isr: [u32; 8], pub tmr: [u32; 8], pub irr: [u32; 8],
        pub lvt_cmci: u32, pub lvt_timer: u32, pub lvt_thermal: u32, pub lvt_perf: u32, pub lvt_lint0: u32, pub lvt_lint1: u32, pub lvt_error: u32,
        pub timer_initial: u32, pub timer_current: u32, pub timer_divide: u32,
    }
}

saved! {
    /// Exceptions, interrupts and NMIs on their way (`struct kvm_vcpu_events`).
    pub struct Events {
        pub exception_injected: bool, pub exception_pending: bool, pub exception_nr: u8, pub exception_error_code: Option<u32>,
        pub interrupt_injected: bool, pub interrupt_nr: u8, pub interrupt_soft: bool,
        /// Bit 0: shadow of MOV SS, bit 1: of STI.
        pub interrupt_shadow: u8,
        pub nmi_injected: bool, pub nmi_pending: u8, pub nmi_masked: bool,
        pub sipi_vector: u32, pub triple_fault_pending: bool,
    }
}

/// `KVM_MP_STATE_*`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum MpState {
    #[default]
    Runnable,
    /// Waiting for INIT.
    Uninitialized,
    /// INIT received, waiting for SIPI.
    InitReceived,
    Halted,
    SipiReceived,
}

saved! {
    /// Everything that a vCPU can observe later.
    pub struct VcpuState {
        pub regs: Regs, pub sregs: Sregs, pub fpu: Fpu, pub debug_regs: DebugRegs, pub lapic: Lapic, pub events: Events,
        pub mp_state: MpState, pub xcr0: u64,
        /// Rights of the user pages' protection keys; left out when zero, as it is without them.
        #[serde(default, skip_serializing_if = "is_zero")]
        pub pkru: u32,
        /// MSRs by number written as `0x…` hexadecimal (TSC as value at the moment the clock stopped).
        pub msrs: BTreeMap<String, u64>,
    }
}
