//! Runs cases on the processor itself, in this process: a signal frame is the way in and the way out.
//!
//! An undefined instruction of ours enters the handler, which swaps the interrupted context for the case's registers; SIGRETURN
//! loads them all at once (flags, x87, SSE). Whatever exception ends the case brings the handler back with every register in
//! the frame, and it swaps our own context in again. The handler must not touch thread-local storage, since FS is the case's.

use std::cell::UnsafeCell;
use std::ptr;
use std::sync::{Mutex, MutexGuard};

use crate::case::{CODE, CODE_LEN, Case, DATA, DATA_LEN, INT3, Outcome, READ_ONLY, State, USER_CS32, USER_CS64, USER_DS};

const ARCH_SET_GS: u64 = 0x1001;
const ARCH_SET_FS: u64 = 0x1002;
const ARCH_GET_FS: u64 = 0x1003;
const ARCH_GET_GS: u64 = 0x1004;

/// `gregs` indices of encoding order.
const GREGS: [i32; 16] = [
    libc::REG_RAX,
    libc::REG_RCX,
    libc::REG_RDX,
    libc::REG_RBX,
    libc::REG_RSP,
    libc::REG_RBP,
    libc::REG_RSI,
    libc::REG_RDI,
    libc::REG_R8,
    libc::REG_R9,
    libc::REG_R10,
    libc::REG_R11,
    libc::REG_R12,
    libc::REG_R13,
    libc::REG_R14,
    libc::REG_R15,
];

#[derive(Clone, Copy, PartialEq, Eq)]
enum Phase {
    Idle,
    Enter,
    Run,
}

struct Exchange {
    phase: Phase,
    bits: u32,
    state: State,
    trap: u64,
    error: u64,
    cr2: u64,
    host_gregs: [i64; 23],
    host_fx: [u8; 464],
    host_fs: u64,
    host_gs: u64,
}

struct Global(UnsafeCell<Exchange>);
// SAFETY: only the thread that holds RUNNER, and the signal handler on that thread, touch it.
unsafe impl Sync for Global {}

static EXCHANGE: Global = Global(UnsafeCell::new(Exchange {
    phase: Phase::Idle,
    bits: 64,
    state: State { fx: [0; 512], gpr: [0; 16], rip: 0, rflags: 0, fs_base: 0, gs_base: 0, selectors: [0; 6] },
    trap: 0,
    error: 0,
    cr2: 0,
    host_gregs: [0; 23],
    host_fx: [0; 464],
    host_fs: 0,
    host_gs: 0,
}));

static RUNNER: Mutex<()> = Mutex::new(());

/// The one native runner of this process. Bound to the thread that made it.
pub struct Native {
    _lock: MutexGuard<'static, ()>,
    /// Writable view of the code pages.
    code: *mut u8,
    data: *mut u8,
    stack: *mut libc::c_void,
}

const ALT_STACK: usize = 1 << 17;
const SIGNALS: [i32; 5] = [libc::SIGSEGV, libc::SIGBUS, libc::SIGILL, libc::SIGFPE, libc::SIGTRAP];

/// # Safety
/// `code` is one of ARCH_*; `value` what it wants.
unsafe fn arch_prctl(code: u64, value: u64) {
    // SAFETY: a system call that changes only FS/GS bases or writes 8 bytes where the caller says.
    unsafe {
        std::arch::asm!("syscall", inlateout("rax") 158u64 => _, in("rdi") code, in("rsi") value,
            lateout("rcx") _, lateout("r11") _, options(nostack));
    }
}

extern "C" fn on_signal(_signal: i32, _info: *mut libc::siginfo_t, context: *mut libc::c_void) {
    // SAFETY: the kernel hands a valid frame; EXCHANGE belongs to this thread. Flags: AC may be the case's, and our code is
    // free to make unaligned accesses.
    unsafe {
        std::arch::asm!("pushfq", "and dword ptr [rsp], ~0x40000", "popfq");
        let x = &mut *EXCHANGE.0.get();
        let context = &mut *context.cast::<libc::ucontext_t>();
        let gregs = &mut context.uc_mcontext.gregs;
        let fx = context.uc_mcontext.fpregs.cast::<u8>();
        match x.phase {
            Phase::Idle => {
                // Not ours: a real bug. Die of it.
                for s in SIGNALS {
                    libc::signal(s, libc::SIG_DFL);
                }
            }
            Phase::Enter => {
                x.phase = Phase::Run;
                x.host_gregs = *gregs;
                ptr::copy_nonoverlapping(fx, x.host_fx.as_mut_ptr(), 464);
                arch_prctl(ARCH_GET_FS, &raw mut x.host_fs as u64);
                arch_prctl(ARCH_GET_GS, &raw mut x.host_gs as u64);
                for (i, &g) in GREGS.iter().enumerate() {
                    gregs[g as usize] = x.state.gpr[i] as i64;
                }
                gregs[libc::REG_RIP as usize] = x.state.rip as i64;
                gregs[libc::REG_EFL as usize] = x.state.rflags as i64;
                let cs = if x.bits == 64 { USER_CS64 } else { USER_CS32 };
                gregs[libc::REG_CSGSFS as usize] = i64::from(cs) | i64::from(USER_DS) << 48;
                ptr::copy_nonoverlapping(x.state.fx.as_ptr(), fx, 464);
                *fx.add(512) |= 3;
                std::arch::asm!("mov ds, {0:x}", "mov es, {0:x}", in(reg) USER_DS);
                if x.bits == 64 {
                    arch_prctl(ARCH_SET_FS, x.state.fs_base);
                    arch_prctl(ARCH_SET_GS, x.state.gs_base);
                } else {
                    std::arch::asm!("mov fs, {0:x}", "mov gs, {0:x}", in(reg) USER_DS);
                }
            }
            Phase::Run => {
                x.phase = Phase::Idle;
                arch_prctl(ARCH_GET_FS, &raw mut x.state.fs_base as u64);
                arch_prctl(ARCH_GET_GS, &raw mut x.state.gs_base as u64);
                let (es, ds, fs, gs): (u16, u16, u16, u16);
                std::arch::asm!("mov {0:x}, es", "mov {1:x}, ds", "mov {2:x}, fs", "mov {3:x}, gs",
                    out(reg) es, out(reg) ds, out(reg) fs, out(reg) gs);
                let packed = gregs[libc::REG_CSGSFS as usize];
                x.state.selectors = [es, packed as u16, (packed >> 48) as u16, ds, fs, gs];
                std::arch::asm!("mov ds, {0:x}", "mov es, {0:x}", "mov fs, {0:x}", "mov gs, {0:x}", in(reg) 0);
                arch_prctl(ARCH_SET_FS, x.host_fs);
                arch_prctl(ARCH_SET_GS, x.host_gs);
                for (i, &g) in GREGS.iter().enumerate() {
                    x.state.gpr[i] = gregs[g as usize] as u64;
                }
                x.state.rip = gregs[libc::REG_RIP as usize] as u64;
                x.state.rflags = gregs[libc::REG_EFL as usize] as u64;
                x.trap = gregs[libc::REG_TRAPNO as usize] as u64;
                x.error = gregs[libc::REG_ERR as usize] as u64;
                x.cr2 = gregs[libc::REG_CR2 as usize] as u64;
                ptr::copy_nonoverlapping(fx, x.state.fx.as_mut_ptr(), 464);
                *gregs = x.host_gregs;
                gregs[libc::REG_RIP as usize] += 2;
                ptr::copy_nonoverlapping(x.host_fx.as_ptr(), fx, 464);
                *fx.add(512) |= 3;
            }
        }
    }
}

fn map(at: u64, len: usize, protection: i32, fd: i32) -> *mut u8 {
    let fixed = if at == 0 { 0 } else { libc::MAP_FIXED_NOREPLACE };
    let anonymous = if fd < 0 { libc::MAP_ANONYMOUS } else { 0 };
    // SAFETY: a new mapping; MAP_FIXED_NOREPLACE replaces nothing.
    let p = unsafe { libc::mmap(at as *mut libc::c_void, len, protection, libc::MAP_SHARED | fixed | anonymous, fd, 0) };
    assert!(p != libc::MAP_FAILED, "cannot map the test pages at {at:#x}: {}", std::io::Error::last_os_error());
    p.cast()
}

/// Whether this is a processor that tests may judge by: AMD as the profile is, family 0x19 (Zen 3 and 4) or later. Others differ where
/// the manuals leave room (undefined flags, 66 with near branches, what a faulting instruction has written): there a campaign
/// informs, and tests do not judge.
pub fn is_reference() -> bool {
    let leaf = std::arch::x86_64::__cpuid(0);
    let amd = (leaf.ebx, leaf.edx, leaf.ecx) == (0x6874_7541, 0x6974_6e65, 0x444d_4163);
    let version = std::arch::x86_64::__cpuid(1).eax;
    let family = (version >> 8 & 15) + if version >> 8 & 15 == 15 { version >> 20 & 0xff } else { 0 };
    amd && family >= 0x19 && std::arch::is_x86_feature_detected!("sse4.2")
}

impl Native {
    /// Maps the pages and takes the signals. Waits while another thread has one.
    pub fn new() -> Self {
        let lock = RUNNER.lock().unwrap_or_else(|e| e.into_inner());
        // SAFETY: plain system calls on our own descriptors and mappings.
        unsafe {
            let code_fd = libc::memfd_create(c"code".as_ptr(), 0);
            let data_fd = libc::memfd_create(c"data".as_ptr(), 0);
            assert!(code_fd >= 0 && data_fd >= 0, "memfd_create: {}", std::io::Error::last_os_error());
            assert_eq!(libc::ftruncate(code_fd, CODE_LEN as i64), 0);
            assert_eq!(libc::ftruncate(data_fd, DATA_LEN as i64), 0);
            map(CODE, CODE_LEN, libc::PROT_READ | libc::PROT_EXEC, code_fd);
            let code = map(0, CODE_LEN, libc::PROT_READ | libc::PROT_WRITE, code_fd);
            map(DATA, DATA_LEN, libc::PROT_READ | libc::PROT_WRITE, data_fd);
            let data = map(0, DATA_LEN, libc::PROT_READ | libc::PROT_WRITE, data_fd);
            let len = DATA_LEN - (READ_ONLY - DATA) as usize;
            assert_eq!(libc::mprotect(READ_ONLY as *mut libc::c_void, len, libc::PROT_READ), 0);
            libc::close(code_fd);
            libc::close(data_fd);
            ptr::write_bytes(code, INT3, CODE_LEN);
            // Present from the start: a page that the kernel has yet to map faults with another error code.
            for page in (CODE..CODE + CODE_LEN as u64).chain(DATA..DATA + DATA_LEN as u64).step_by(4096) {
                ptr::read_volatile(page as *const u8);
            }
            ptr::write_bytes(DATA as *mut u8, 0, (READ_ONLY - DATA) as usize);

            let stack = map(0, ALT_STACK, libc::PROT_READ | libc::PROT_WRITE, -1).cast::<libc::c_void>();
            let alt = libc::stack_t { ss_sp: stack, ss_flags: 0, ss_size: ALT_STACK };
            assert_eq!(libc::sigaltstack(&alt, ptr::null_mut()), 0);
            for signal in SIGNALS {
                let mut action: libc::sigaction = std::mem::zeroed();
                action.sa_sigaction = on_signal as *const () as usize;
                action.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK;
                assert_eq!(libc::sigaction(signal, &action, ptr::null_mut()), 0);
            }
            Self { _lock: lock, code, data, stack }
        }
    }

    pub fn run(&mut self, case: &Case) -> Outcome {
        let at = (case.state.rip - CODE) as usize;
        let len = case.bytes.len().min(CODE_LEN - at);
        // SAFETY: both views are ours and as long as said; the asm block returns with every register as it was, since the
        // handler restores the interrupted context (see the module's text).
        unsafe {
            ptr::copy_nonoverlapping(case.bytes.as_ptr(), self.code.add(at), len);
            ptr::copy_nonoverlapping(case.data.as_ptr(), self.data, DATA_LEN);
            let x = &mut *EXCHANGE.0.get();
            x.bits = case.bits;
            x.state = case.state.clone();
            x.phase = Phase::Enter;
            // SIGRETURN keeps NT and ID as they are: a POPF case may have left them set.
            std::arch::asm!("pushfq", "and dword ptr [rsp], ~0x204000", "popfq", "ud2", clobber_abi("C"));
            let x = &*EXCHANGE.0.get();
            assert!(x.phase == Phase::Idle, "the native run did not come back through the handler");
            ptr::write_bytes(self.code.add(at), INT3, len);
            let mut data = Box::new([0; DATA_LEN]);
            ptr::copy_nonoverlapping(self.data, data.as_mut_ptr(), DATA_LEN);
            Outcome { state: x.state.clone(), vector: x.trap as u8, error: x.error as u32, cr2: x.cr2, data }
        }
    }
}

impl Default for Native {
    fn default() -> Self {
        Self::new()
    }
}

impl Drop for Native {
    fn drop(&mut self) {
        // SAFETY: the mappings made in `new`; the signals go back to their defaults before the stack goes away.
        unsafe {
            for signal in SIGNALS {
                libc::signal(signal, libc::SIG_DFL);
            }
            let off = libc::stack_t { ss_sp: ptr::null_mut(), ss_flags: libc::SS_DISABLE, ss_size: 0 };
            libc::sigaltstack(&off, ptr::null_mut());
            libc::munmap(self.stack, ALT_STACK);
            libc::munmap(CODE as *mut libc::c_void, CODE_LEN);
            libc::munmap(DATA as *mut libc::c_void, DATA_LEN);
            libc::munmap(self.code.cast(), CODE_LEN);
            libc::munmap(self.data.cast(), DATA_LEN);
        }
    }
}
