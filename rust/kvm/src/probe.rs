//! Whether this host's KVM can run an operating system: tried in a throw-away machine, because that there is a `/dev/kvm` says
//! nothing. On some hosts (nested, sandboxed) KVM interprets the kernel's own code, slowly and not all of it.

use std::time::Instant;

use kvm_bindings::{kvm_segment, kvm_userspace_memory_region};
use kvm_ioctls::{VcpuExit, VcpuFd};
use memory::{GuestMemory, RegionLayout};

use crate::host::Host;
use crate::tsc::{self, TscControl};

/// What was found; `reason` is a sentence for people.
pub struct Probe {
    /// Whether Linux can be expected to boot.
    pub runs: bool,
    /// Whether guests can be shown a TSC of their own; `None` where there is no KVM to ask.
    pub tsc: Option<TscControl>,
    pub reason: String,
    /// Whether the same would be found until the host boots anew: not where it may be chance, such as a busy host, or a processor that
    /// another program has taken.
    pub lasting: bool,
}

/// Why Linux is not expected to boot.
struct Unfit {
    reason: String,
    lasting: bool,
}

/// What the host did, and may not do the next time.
impl From<String> for Unfit {
    fn from(reason: String) -> Self {
        Self { reason, lasting: false }
    }
}

impl Probe {
    /// Whether this KVM is what one would want a machine to run on: Linux boots, and snapshots keep the guest's TSC.
    pub fn fit(&self) -> bool {
        self.runs && self.tsc == Some(TscControl::Offset)
    }
}

const CODE: u64 = 0x8000;
const STACK: u64 = 0x7000;
const GDT: u64 = 0x5000;
const IDT: u64 = 0x4000;
const PML4: u64 = 0x1000;
const SIZE: u64 = 0x1_0000;
const TURNS: u32 = 1000;
/// Instructions a second below which KVM interprets: processors do a hundred times as many, interpreters a tenth.
const FAST: u64 = 20_000_000;

/// Instructions without which Linux does not boot, each ending in HLT.
const NEEDED: &[(&str, &[u8])] = &[
    // lock cmpxchg16b [0x6000]
    ("lock cmpxchg16b", &[0xf0, 0x48, 0x0f, 0xc7, 0x0c, 0x25, 0x00, 0x60, 0x00, 0x00, 0xf4]),
    // push 16; push STACK; push 2; push 8; push CODE + 0x40, where HLT is; iretq
    ("iretq", &[0x6a, 0x10, 0x68, 0, 0x70, 0, 0, 0x6a, 2, 0x6a, 8, 0x68, 0x40, 0x80, 0, 0, 0x48, 0xcf]),
    // int3, whose handler is HLT
    ("int3", &[0xcc, 0x90]),
    // fxsave64 [0x6000]; fxrstor64 [0x6000]
    ("fxrstor", &[0x48, 0x0f, 0xae, 0x04, 0x25, 0, 0x60, 0, 0, 0x48, 0x0f, 0xae, 0x0c, 0x25, 0, 0x60, 0, 0, 0xf4]),
    ("swapgs", &[0x0f, 0x01, 0xf8, 0xf4]),
    // xor eax, eax; xor edx, edx; mov ecx, KERNEL_GS_BASE; wrmsr
    ("wrmsr", &[0x31, 0xc0, 0x31, 0xd2, 0xb9, 0x02, 0x01, 0, 0xc0, 0x0f, 0x30, 0xf4]),
    // invlpg [0x6000]
    ("invlpg", &[0x0f, 0x01, 0x3c, 0x25, 0, 0x60, 0, 0, 0xf4]),
    // popcnt rax, rax
    ("popcnt", &[0xf3, 0x48, 0x0f, 0xb8, 0xc0, 0xf4]),
];

const UNKNOWN: &str = "KVM does not know it";

/// Takes a few milliseconds.
pub fn probe() -> Probe {
    let mut tsc = None;
    match measure(&mut tsc) {
        Ok(reason) => Probe { runs: true, tsc, reason: reason + shown(tsc), lasting: true },
        Err(Unfit { reason, lasting }) => Probe { runs: false, tsc, reason: reason + shown(tsc), lasting },
    }
}

fn shown(tsc: Option<TscControl>) -> &'static str {
    if tsc == Some(TscControl::Host) { "; guests read the host's TSC, which goes on while they stand still" } else { "" }
}

fn said<T, E: std::fmt::Display>(what: &str, done: Result<T, E>) -> Result<T, String> {
    done.map_err(|e| format!("{what} fails: {e}"))
}

fn measure(control: &mut Option<TscControl>) -> Result<String, Unfit> {
    let host = Host::open().map_err(|e| e.message)?;
    let lacks = host.missing();
    if !lacks.is_empty() {
        let reason = format!("this host lacks what every guest is shown: {}", lacks.join(", "));
        return Err(Unfit { reason, lasting: true });
    }
    let kvm = &host.kvm;
    let memory = said("memory", GuestMemory::new(&[RegionLayout { gpa: 0, size: SIZE }]))?;
    let vm = said("KVM_CREATE_VM", kvm.create_vm())?;
    let mapped = said("memory", memory.host_range(0, SIZE))?;
    let region = kvm_userspace_memory_region {
        slot: 0,
        flags: 0,
        guest_phys_addr: 0,
        memory_size: SIZE,
        userspace_addr: mapped.as_ptr() as u64,
    };
    // SAFETY: `memory` outlives the machine's last use, which is in this function.
    said("KVM_SET_USER_MEMORY_REGION", unsafe { vm.set_user_memory_region(region) })?;
    let mut fd = said("KVM_CREATE_VCPU", vm.create_vcpu(0))?;
    let cpuid = said("KVM_GET_SUPPORTED_CPUID", kvm.get_supported_cpuid(kvm_bindings::KVM_MAX_CPUID_ENTRIES))?;
    said("KVM_SET_CPUID2", fd.set_cpuid2(&cpuid))?;
    *control = Some(tsc::control(&fd).map_err(|e| e.message)?);
    tables(&memory)?;

    // The instructions first: they say more than a figure, and cost nothing.
    let mut missing: Vec<String> = Vec::new();
    let mut lasting = false;
    for (name, code) in NEEDED {
        if let Err(why) = run(&mut fd, &memory, code)? {
            lasting |= why == UNKNOWN;
            missing.push(if why == UNKNOWN { (*name).into() } else { format!("{name} ({why})") });
        }
    }
    let rate = rate(&mut fd, &memory)?;
    let mut problems = Vec::new();
    if !missing.is_empty() {
        problems.push(format!("it cannot run in ring 0: {}", missing.join(", ")));
    }
    let lacks = host.unoffered();
    if !lacks.is_empty() {
        problems.push(format!("it does not offer to guests: {}", lacks.join(", ")));
        lasting = true;
    }
    if rate < FAST {
        problems.push(format!("it interprets kernel code, at {:.1} million instructions a second", rate as f64 / 1e6));
    }
    if !problems.is_empty() {
        return Err(Unfit { reason: problems.join("; "), lasting });
    }
    Ok(format!("it runs kernel code on the processor ({} million instructions a second)", rate / 1_000_000))
}

/// Instructions a second: the better of two turns, for a host that was busy.
fn rate(fd: &mut VcpuFd, memory: &GuestMemory) -> Result<u64, String> {
    // mov ecx, TURNS; 1: dec ecx; jnz 1b; hlt
    let [a, b, c, d] = TURNS.to_le_bytes();
    let mut rate = 0;
    for _ in 0..2 {
        let started = Instant::now();
        run(fd, memory, &[0xb9, a, b, c, d, 0xff, 0xc9, 0x75, 0xfc, 0xf4])?
            .map_err(|why| format!("it cannot run a loop in ring 0 ({why})"))?;
        let ns = started.elapsed().as_nanos().max(1) as u64;
        rate = rate.max(u64::from(TURNS) * 2 * 1_000_000_000 / ns);
    }
    Ok(rate)
}

/// Long mode: the first 2 MiB one to one, flat segments, one interrupt gate.
fn tables(memory: &GuestMemory) -> Result<(), String> {
    let put = |at: u64, value: u64| said("memory", memory.write(at, &value.to_le_bytes()));
    put(PML4, PML4 + 0x1000 | 3)?;
    put(PML4 + 0x1000, PML4 + 0x2000 | 3)?;
    put(PML4 + 0x2000, 0x83)?;
    put(GDT + 8, 0x00af_9b00_0000_ffff)?;
    put(GDT + 16, 0x00cf_9300_0000_ffff)?;
    // Vector 3: an interrupt gate to CODE + 0x40, which is HLT.
    put(IDT + 3 * 16, 0x0000_8e00_0008_0000 | CODE + 0x40)?;
    said("memory", memory.write(CODE + 0x40, &[0xf4]))
}

/// Runs `code` until its HLT. The inner error is what the guest met, the outer one what KVM did.
fn run(fd: &mut VcpuFd, memory: &GuestMemory, code: &[u8]) -> Result<Result<(), String>, String> {
    said("memory", memory.write(CODE, code))?;
    let mut sregs = said("KVM_GET_SREGS", fd.get_sregs())?;
    let flat = kvm_segment { limit: !0, present: 1, s: 1, g: 1, ..Default::default() };
    sregs.cs = kvm_segment { selector: 8, type_: 11, l: 1, ..flat };
    let data = kvm_segment { selector: 16, type_: 3, db: 1, ..flat };
    (sregs.ds, sregs.es, sregs.ss) = (data, data, data);
    (sregs.gdt.base, sregs.gdt.limit) = (GDT, 23);
    (sregs.idt.base, sregs.idt.limit) = (IDT, 4 * 16 - 1);
    sregs.cr3 = PML4;
    sregs.cr4 |= 1 << 5 | 1 << 9;
    sregs.efer |= 1 << 8 | 1 << 10;
    sregs.cr0 = 0x8000_0011;
    said("KVM_SET_SREGS", fd.set_sregs(&sregs))?;
    let regs = kvm_bindings::kvm_regs { rip: CODE, rsp: STACK, rflags: 2, ..Default::default() };
    said("KVM_SET_REGS", fd.set_regs(&regs))?;
    loop {
        return Ok(match fd.run() {
            Ok(VcpuExit::Hlt) => Ok(()),
            Err(e) if e.errno() == libc::EINTR => continue,
            Ok(VcpuExit::InternalError) => Err(UNKNOWN.into()),
            Ok(VcpuExit::Shutdown) => Err("triple fault".into()),
            Ok(other) => Err(format!("{other:?}")),
            Err(e) => Err(e.to_string()),
        });
    }
}
