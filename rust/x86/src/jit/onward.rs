//! From translated code to translated code without the run loop: after an instruction's function ended its block, and after a jump to
//! an address that the vCPU's table does not have.
//!
//! Whatever the loop would do something about (an event, a request, written code, a trap flag, the end of the budget) is left to it;
//! what is done here is what it does when there is nothing of that kind.

use super::frame::{BUDGET, PAGE, STEP, TARGET};
use crate::core::Core;
use crate::mmu::{Kind, Rights};
use crate::run::End;
use crate::state::{Activity, CodeSize, flags};

impl Core {
    /// After an instruction that ended its block as `self.ended` says: the code to go on with, or [`STEP`].
    pub(super) fn onward(&mut self) -> u64 {
        match self.ended {
            None => {}
            Some(End::Boundary | End::FarJump) if self.undisturbed() => self.refresh(),
            _ => return STEP,
        }
        if self.budget == 0 {
            return STEP;
        }
        let Some(code) = self.code_at_rip() else { return STEP };
        self.ended = None;
        // As the loop, which knows that nothing shows it.
        self.cpu.flags &= !flags::RF;
        // The word with the flags is not made anew: after an instruction that has no business with flags, the lazy form is old.
        let eager = self.x87_after == 0;
        self.begin_translated(eager);
        code
    }

    /// After a jump to the address in word [`TARGET`]: the code to go on with, or 0. The x87 registers are saved and stay the guest's: who
    /// called loads them again, or they are taken over on the way out.
    pub(super) fn jump(&mut self) -> u64 {
        if self.cpu.gpr[BUDGET] == 0 {
            // Nothing is fetched there yet.
            return 0;
        }
        let floating = self.suspend_floating();
        self.cpu.rip = self.cpu.gpr[TARGET];
        let Some(code) = self.code_at_rip() else { return 0 };
        self.cpu.gpr[PAGE] = self.cpu.rip & !0xfff;
        if floating {
            self.resume_floating();
        }
        code
    }

    /// Whether the loop would find nothing to do at this boundary but to go on.
    fn undisturbed(&self) -> bool {
        !self.shared.control.attention()
            && self.code_written.is_empty()
            && !self.shared.memory.code_write_pending()
            && !self.event_pending()
            && self.cpu.activity == Activity::Running
            && !self.yielded
            && self.cpu.flags & flags::TF == 0
            && self.cpu.shadow == 0
            && !self.breakpoints.active
            && self.breakpoints.hit == 0
            && !self.alone
    }

    /// The translation of the block at RIP, if there is one that may be executed now.
    fn code_at_rip(&mut self) -> Option<u64> {
        let rip = self.cpu.rip;
        if self.cpu.code_size != CodeSize::Bits64 {
            return None;
        }
        if let Some(code) = self.codes.get(rip, self.half) {
            return Some(code);
        }
        let Ok(phys) = self.translate(rip, Kind::Fetch, Rights::Current) else {
            // The loop comes to the same result.
            (self.fault, self.noncanonical) = (None, false);
            return None;
        };
        // SAFETY: set on the way in; the table does not change while translated code runs.
        let code = unsafe { &*self.places }.get(phys, self.half)?;
        if !self.code_written.is_empty() {
            return None;
        }
        self.tlb.note_fetch(rip);
        let global = self.tlb.is_global(rip, self.half);
        self.codes.put(rip, self.half, code, global);
        Some(code)
    }
}
