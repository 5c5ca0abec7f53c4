//! Far jumps, calls and returns, IRET (SDM vol. 3, 5.8; AMD vol. 2, 4.12 and 8.9).

use iced_x86::{Code, Instruction};

use crate::core::{Core, GP, NP, SS as STACK_FAULT};
use crate::insn::{Fault, Flow, Handler, Insn};
use crate::segments::{CALL16, CALL32, Descriptor, canonical, v8086_segment};
use crate::state::{CS, CodeSize, DS, ES, FS, GS, RSP, SS, Segment, flags};
use crate::task::Way;

pub fn select(instr: &Instruction) -> Option<Handler> {
    Some(match instr.code() {
        Code::Jmp_ptr1616 => jump_pointer::<2>,
        Code::Jmp_ptr1632 => jump_pointer::<4>,
        Code::Jmp_m1616 => jump_memory::<2>,
        Code::Jmp_m1632 => jump_memory::<4>,
        Code::Jmp_m1664 => jump_rex,
        Code::Call_ptr1616 => call_pointer::<2>,
        Code::Call_ptr1632 => call_pointer::<4>,
        Code::Call_m1616 => call_memory::<2>,
        Code::Call_m1632 => call_memory::<4>,
        Code::Call_m1664 => call_rex,
        Code::Retfw | Code::Retfw_imm16 => far_return::<2>,
        Code::Retfd | Code::Retfd_imm16 => far_return::<4>,
        Code::Retfq | Code::Retfq_imm16 => far_return::<8>,
        Code::Iretw => iret::<2>,
        Code::Iretd => iret::<4>,
        Code::Iretq => iret::<8>,
        _ => return None,
    })
}

fn pointer(i: &Insn) -> (u16, u64) {
    ((i.imm >> 32) as u16, i.imm & 0xffff_ffff)
}

fn memory<const SIZE: u8>(core: &mut Core, i: &Insn) -> Result<(u16, u64), Fault> {
    let at = core.ea(i);
    let offset = match SIZE {
        2 => u64::from(core.load16(at)?),
        4 => u64::from(core.load32(at)?),
        _ => core.load64(at)?,
    };
    Ok((core.load16(core.linear(at, u64::from(SIZE)))?, offset))
}

fn jump_pointer<const SIZE: u8>(core: &mut Core, i: &Insn) -> Result<Flow, Fault> {
    let (selector, offset) = pointer(i);
    core.far_jump(i, selector, offset)
}
fn jump_memory<const SIZE: u8>(core: &mut Core, i: &Insn) -> Result<Flow, Fault> {
    let (selector, offset) = memory::<SIZE>(core, i)?;
    core.far_jump(i, selector, offset)
}
fn call_pointer<const SIZE: u8>(core: &mut Core, i: &Insn) -> Result<Flow, Fault> {
    let (selector, offset) = pointer(i);
    core.far_call(i, selector, offset, SIZE)
}
fn call_memory<const SIZE: u8>(core: &mut Core, i: &Insn) -> Result<Flow, Fault> {
    let (selector, offset) = memory::<SIZE>(core, i)?;
    core.far_call(i, selector, offset, SIZE)
}

/// With REX.W, which the profile's vendor ignores.
fn jump_rex(core: &mut Core, i: &Insn) -> Result<Flow, Fault> {
    if core.shared.switches.far64 { jump_memory::<8>(core, i) } else { jump_memory::<4>(core, i) }
}
fn call_rex(core: &mut Core, i: &Insn) -> Result<Flow, Fault> {
    if core.shared.switches.far64 { call_memory::<8>(core, i) } else { call_memory::<4>(core, i) }
}

/// What a far jump or call leads to.
struct Target {
    code: Segment,
    rip: u64,
    /// Through a call gate: its operand size, parameter count and the privilege of the code.
    gate: Option<(u8, u8)>,
    cpl: u8,
}

impl Core {
    /// Real and virtual-8086 mode: the selector is the base.
    fn real_code(&mut self, selector: u16) -> Segment {
        if self.cpu.v8086() {
            return v8086_segment(selector);
        }
        Segment { base: u64::from(selector) << 4, selector, ..self.cpu.seg[CS] }
    }

    fn selector_less(&self) -> bool {
        !self.cpu.protected() || self.cpu.v8086()
    }

    /// The offset must lie in the segment; in 64-bit code it must be canonical.
    fn check_target(&mut self, code: &Segment, rip: u64) -> Result<(), Fault> {
        let good = if self.cpu.code_size_of(code) == CodeSize::Bits64 { canonical(rip) } else { rip <= u64::from(code.limit) };
        if good { Ok(()) } else { Err(self.raise(GP, Some(0))) }
    }

    /// A code descriptor that a jump or call at this privilege may name directly.
    fn direct_code(&mut self, selector: u16, d: Descriptor) -> Result<Segment, Fault> {
        let error = Some(u32::from(selector & !3));
        let rpl = (selector & 3) as u8;
        let allowed = if d.conforming() { d.dpl() <= self.cpu.cpl } else { d.dpl() == self.cpu.cpl && rpl <= self.cpu.cpl };
        if !allowed || self.cpu.long_mode() && d.long() && d.big() {
            return Err(self.raise(GP, error));
        }
        if !d.present() {
            return Err(self.raise(NP, error));
        }
        let d = self.mark_accessed(selector, d)?;
        Ok(d.segment(selector & !3 | u16::from(self.cpu.cpl)))
    }

    fn far_target(&mut self, selector: u16, offset: u64, call: bool) -> Result<Target, Fault> {
        if selector & !3 == 0 {
            return Err(self.raise(GP, Some(0)));
        }
        let error = Some(u32::from(selector & !3));
        let d = self.descriptor_or(selector, GP, 0)?;
        if d.is_code() {
            let code = self.direct_code(selector, d)?;
            self.check_target(&code, offset)?;
            return Ok(Target { code, rip: offset, gate: None, cpl: self.cpu.cpl });
        }
        let long = self.cpu.long_mode();
        match d.type_() {
            CALL32 if d.is_system() => {}
            CALL16 if d.is_system() && !long => {}
            _ => return Err(self.raise(GP, error)),
        }
        if d.dpl() < self.cpu.cpl.max((selector & 3) as u8) {
            return Err(self.raise(GP, error));
        }
        if !d.present() {
            return Err(self.raise(NP, error));
        }
        let mut rip = if d.type_() == CALL16 { d.gate_offset() & 0xffff } else { d.gate_offset() };
        if long {
            let Some(at) = self.descriptor_address(selector, 16) else { return Err(self.raise(GP, error)) };
            let high: u64 = self.read_system(at.wrapping_add(8))?;
            if high >> 40 & 0x1f != 0 {
                return Err(self.raise(GP, error));
            }
            rip |= high << 32;
        }
        let target = d.gate_selector();
        if target & !3 == 0 {
            return Err(self.raise(GP, Some(0)));
        }
        let error = Some(u32::from(target & !3));
        let code = self.descriptor_or(target, GP, 0)?;
        if !code.is_code() || code.dpl() > self.cpu.cpl || long && (!code.long() || code.big()) {
            return Err(self.raise(GP, error));
        }
        // A jump through a gate cannot change privilege.
        if !call && !code.conforming() && code.dpl() != self.cpu.cpl {
            return Err(self.raise(GP, error));
        }
        if !code.present() {
            return Err(self.raise(NP, error));
        }
        let cpl = if code.conforming() { self.cpu.cpl } else { code.dpl() };
        let code = self.mark_accessed(target, code)?.segment(target & !3 | u16::from(cpl));
        self.check_target(&code, rip)?;
        let size = if long {
            8
        } else if d.type_() == CALL16 {
            2
        } else {
            4
        };
        Ok(Target { code, rip, gate: Some((size, (d.0 >> 32 & 31) as u8)), cpl })
    }

    /// Switches tasks when `selector` names a TSS or task gate.
    fn far_task(&mut self, i: &Insn, selector: u16, way: Way) -> Result<bool, Fault> {
        if selector & !3 == 0 {
            return Ok(false);
        }
        let Some(d) = self.descriptor(selector)? else { return Ok(false) };
        let Some(tss) = self.task_target(selector, d)? else { return Ok(false) };
        self.cpu.rip = self.next_rip(i);
        self.switch_task(tss, way, None, 0)?;
        Ok(true)
    }

    fn far_jump(&mut self, i: &Insn, selector: u16, offset: u64) -> Result<Flow, Fault> {
        if self.selector_less() {
            let code = self.real_code(selector);
            if offset > u64::from(code.limit) {
                return Err(self.raise(GP, Some(0)));
            }
            self.set_segment(CS, code);
            self.cpu.rip = offset;
            return Ok(Flow::LeaveJump);
        }
        if self.far_task(i, selector, Way::Jump)? {
            return Ok(Flow::LeaveJump);
        }
        let target = self.far_target(selector, offset, false)?;
        self.set_segment(CS, target.code);
        self.cpu.rip = target.rip;
        Ok(Flow::LeaveJump)
    }

    fn far_call(&mut self, i: &Insn, selector: u16, offset: u64, size: u8) -> Result<Flow, Fault> {
        let next = self.next_rip(i);
        let old_cs = u64::from(self.cpu.seg[CS].selector);
        let sp = self.cpu.gpr[RSP];
        if self.selector_less() {
            let code = self.real_code(selector);
            if offset > u64::from(code.limit) {
                return Err(self.raise(GP, Some(0)));
            }
            self.poke_stack(sp.wrapping_sub(u64::from(size)), size, old_cs)?;
            self.poke_stack(sp.wrapping_sub(2 * u64::from(size)), size, next)?;
            self.set_stack_pointer(sp.wrapping_sub(2 * u64::from(size)));
            self.set_segment(CS, code);
            self.cpu.rip = offset;
            return Ok(Flow::LeaveJump);
        }
        if self.far_task(i, selector, Way::Call)? {
            return Ok(Flow::LeaveJump);
        }
        let target = self.far_target(selector, offset, true)?;
        let size = target.gate.map_or(size, |(size, _)| size);
        if target.cpl < self.cpu.cpl {
            self.call_inner(&target, size, next)?;
        } else {
            let mut at = sp;
            for value in [old_cs, next] {
                at = at.wrapping_sub(u64::from(size));
                self.poke_stack(at, size, value)?;
            }
            self.set_stack_pointer(at);
        }
        self.cpu.cpl = target.cpl;
        self.set_segment(CS, target.code);
        self.cpu.rip = target.rip;
        Ok(Flow::LeaveJump)
    }

    /// A call gate to more privilege: new stack from the TSS, old stack and parameters copied.
    fn call_inner(&mut self, target: &Target, size: u8, next: u64) -> Result<(), Fault> {
        let (new_sp, new_ss) = self.tss_stack(target.cpl, 0)?;
        let long = self.cpu.long_mode();
        let stack = if long {
            if !canonical(new_sp) {
                return Err(self.raise(STACK_FAULT, Some(0)));
            }
            let mut ss = crate::segments::null_segment(u16::from(target.cpl));
            ss.attr |= u32::from(target.cpl) << 5;
            ss
        } else {
            self.check_stack_segment(new_ss, target.cpl, crate::core::TS, 0)?
        };
        let parameters = if long { 0 } else { target.gate.map_or(0, |(_, n)| n) };
        let old_sp = self.cpu.gpr[RSP];
        let mut frame = vec![u64::from(self.cpu.seg[SS].selector), old_sp];
        for n in (0..parameters).rev() {
            frame.push(self.peek_stack(old_sp.wrapping_add(u64::from(n) * u64::from(size)), size)?);
        }
        frame.extend([u64::from(self.cpu.seg[CS].selector), next]);
        let mask = if long {
            u64::MAX
        } else if stack.attr & Segment::DB != 0 {
            0xffff_ffff
        } else {
            0xffff
        };
        let mut sp = new_sp;
        for value in frame {
            sp = sp.wrapping_sub(u64::from(size)) & mask;
            let at = if long { sp } else { stack.base.wrapping_add(sp) & 0xffff_ffff };
            match size {
                2 => self.write_system(at, value as u16)?,
                4 => self.write_system(at, value as u32)?,
                _ => self.write_system(at, value)?,
            }
        }
        self.set_segment(SS, stack);
        self.cpu.gpr[RSP] = if mask == 0xffff { old_sp & !mask | sp } else { sp };
        Ok(())
    }

    /// The code descriptor that a return leads to, at the privilege of the selector.
    fn return_code(&mut self, selector: u16) -> Result<Segment, Fault> {
        if selector & !3 == 0 {
            return Err(self.raise(GP, Some(0)));
        }
        let error = Some(u32::from(selector & !3));
        let d = self.descriptor_or(selector, GP, 0)?;
        let rpl = (selector & 3) as u8;
        let dpl_good = if d.conforming() { d.dpl() <= rpl } else { d.dpl() == rpl };
        if !d.is_code() || rpl < self.cpu.cpl || !dpl_good || self.cpu.long_mode() && d.long() && d.big() {
            return Err(self.raise(GP, error));
        }
        if !d.present() {
            return Err(self.raise(NP, error));
        }
        Ok(self.mark_accessed(selector, d)?.segment(selector))
    }

    /// The stack that a return leads to, for code `code` at privilege `cpl`.
    fn return_stack(&mut self, selector: u16, cpl: u8, code: &Segment) -> Result<Segment, Fault> {
        if selector & !3 == 0 {
            if self.cpu.code_size_of(code) == CodeSize::Bits64 && cpl != 3 && (selector & 3) as u8 == cpl {
                let mut ss = crate::segments::null_segment(selector);
                ss.attr |= u32::from(cpl) << 5;
                return Ok(ss);
            }
            return Err(self.raise(GP, Some(0)));
        }
        self.check_stack_segment(selector, cpl, GP, 0)
    }

    /// Leaves `cpl` for the code, stack and RIP of a frame.
    fn land(&mut self, code: Segment, rip: u64, stack: Option<(Segment, u64)>) {
        let outer = (code.selector & 3) as u8 != self.cpu.cpl;
        self.cpu.cpl = (code.selector & 3) as u8;
        self.set_segment(CS, code);
        self.cpu.rip = rip;
        if let Some((ss, sp)) = stack {
            self.set_segment(SS, ss);
            self.set_stack_pointer(sp);
        }
        if outer {
            self.drop_privileged_segments();
        }
    }
}

fn far_return<const SIZE: u8>(core: &mut Core, i: &Insn) -> Result<Flow, Fault> {
    let release = i.imm & 0xffff;
    let size = u64::from(SIZE);
    let sp = core.cpu.gpr[RSP];
    let rip = core.peek_stack(sp, SIZE)?;
    let selector = core.peek_stack(sp.wrapping_add(size), SIZE)? as u16;
    let after = sp.wrapping_add(2 * size).wrapping_add(release);
    if core.selector_less() {
        let code = core.real_code(selector);
        if rip > u64::from(code.limit) {
            return Err(core.raise(GP, Some(0)));
        }
        core.set_stack_pointer(after);
        core.set_segment(CS, code);
        core.cpu.rip = rip;
        return Ok(Flow::LeaveJump);
    }
    let code = core.return_code(selector)?;
    core.check_target(&code, rip)?;
    let cpl = (selector & 3) as u8;
    if cpl == core.cpu.cpl {
        core.set_stack_pointer(after);
        core.set_segment(CS, code);
        core.cpu.rip = rip;
        return Ok(Flow::LeaveJump);
    }
    let new_sp = core.peek_stack(after, SIZE)?;
    let new_ss = core.peek_stack(after.wrapping_add(size), SIZE)? as u16;
    let stack = core.return_stack(new_ss, cpl, &code)?;
    core.land(code, rip, Some((stack, new_sp.wrapping_add(release))));
    Ok(Flow::LeaveJump)
}

/// The RFLAGS bits that IRET may write at the privilege it is executed at.
fn iret_mask(core: &Core, size: u8) -> u64 {
    use flags::*;
    let mut mask = ARITH | TF | DF | NT;
    if size >= 4 {
        mask |= RF | AC | ID;
    }
    if core.cpu.cpl == 0 || !core.cpu.protected() {
        mask |= IOPL | if size >= 4 && core.cpu.protected() { VIF | VIP } else { 0 };
    }
    let iopl = (core.cpu.flags >> 12 & 3) as u8;
    if core.cpu.cpl <= iopl || !core.cpu.protected() {
        mask |= IF;
    }
    mask
}

fn iret<const SIZE: u8>(core: &mut Core, i: &Insn) -> Result<Flow, Fault> {
    let size = u64::from(SIZE);
    let sp = core.cpu.gpr[RSP];
    if core.cpu.v8086() && core.cpu.flags & flags::IOPL != flags::IOPL {
        return Err(core.raise(GP, Some(0)));
    }
    let long = core.cpu.long_mode();
    if core.cpu.protected() && !core.cpu.v8086() && core.cpu.flags & flags::NT != 0 {
        if long {
            return Err(core.raise(GP, Some(0)));
        }
        let link: u16 = core.read_system(core.cpu.tr.base)?;
        core.cpu.rip = core.next_rip(i);
        core.switch_task(link, Way::Return, None, 0)?;
        core.cpu.nmi_masked = false;
        return Ok(Flow::LeaveJump);
    }
    let rip = core.peek_stack(sp, SIZE)?;
    let selector = core.peek_stack(sp.wrapping_add(size), SIZE)? as u16;
    let image = core.peek_stack(sp.wrapping_add(2 * size), SIZE)?;
    let after = sp.wrapping_add(3 * size);
    if core.selector_less() {
        let code = core.real_code(selector);
        if rip > u64::from(code.limit) {
            return Err(core.raise(GP, Some(0)));
        }
        let mut mask = iret_mask(core, SIZE);
        if core.cpu.v8086() {
            mask = mask & !flags::IOPL | flags::IF;
        }
        core.set_stack_pointer(after);
        core.set_segment(CS, code);
        core.cpu.rip = rip;
        core.cpu.merge_rflags(image, mask);
        core.cpu.nmi_masked = false;
        return Ok(Flow::LeaveJump);
    }
    if !long && SIZE == 4 && image & flags::VM != 0 && core.cpu.cpl == 0 {
        return return_to_v8086(core, rip, selector, image, after);
    }
    let code = core.return_code(selector)?;
    core.check_target(&code, rip)?;
    let cpl = (selector & 3) as u8;
    let mask = iret_mask(core, SIZE);
    // 64-bit code always pops the stack.
    let stack = if core.cpu.code_size == CodeSize::Bits64 || cpl != core.cpu.cpl {
        let new_sp = core.peek_stack(after, SIZE)?;
        let new_ss = core.peek_stack(after.wrapping_add(size), SIZE)? as u16;
        Some((core.return_stack(new_ss, cpl, &code)?, new_sp))
    } else {
        core.set_stack_pointer(after);
        None
    };
    core.land(code, rip, stack);
    core.cpu.merge_rflags(image, mask);
    core.cpu.nmi_masked = false;
    Ok(Flow::LeaveJump)
}

fn return_to_v8086(core: &mut Core, rip: u64, selector: u16, image: u64, after: u64) -> Result<Flow, Fault> {
    let mut words = [0u64; 6];
    for (n, word) in words.iter_mut().enumerate() {
        *word = core.peek_stack(after.wrapping_add(4 * n as u64), 4)?;
    }
    let [esp, ss, es, ds, fs, gs] = words;
    core.cpu.set_rflags(image & 0x003f_7fd7);
    core.cpu.cpl = 3;
    core.set_segment(CS, v8086_segment(selector));
    for (seg, selector) in [(SS, ss), (ES, es), (DS, ds), (FS, fs), (GS, gs)] {
        core.set_segment(seg, v8086_segment(selector as u16));
    }
    core.cpu.rip = rip & 0xffff;
    core.cpu.gpr[RSP] = esp;
    core.cpu.nmi_masked = false;
    Ok(Flow::LeaveJump)
}
