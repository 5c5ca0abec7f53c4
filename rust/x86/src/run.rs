//! The block loop of one vCPU: which block is next, how long it may run, what happens at its end.

use memory::{MemoryError, PAGE_SIZE};
use vcpu::EngineError;

use crate::cache::{Cache, Heat, Key, Span};
use crate::core::{Core, Exception, GP, Pending, SS};
use crate::decode::{self, Decoded, MAX_INSNS, MAX_LEN};
use crate::insn::{Fault, Flow, Insn, LINK, STACK};
use crate::jit::{self, Left};
use crate::mmu::{Kind, Rights};
use crate::state::{Activity, CS, CodeSize, GPR_BLOCK, flags};

/// Why [`Core::run`] came back; the vCPU is exact at an instruction boundary.
#[derive(Debug, Clone)]
pub enum RunExit {
    /// Exactly the budget was executed.
    Budget,
    /// HLT (or not started yet): nothing to do until an event.
    Halted,
    /// PAUSE: another vCPU should go on.
    Pause,
    /// Somebody asked for attention: look at interrupts, posted work and stop requests, then go on.
    Events,
    TripleFault,
    Failed(EngineError),
}

/// How a run of blocks ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum End {
    /// The budget is used up.
    Limit,
    /// Something the loop must look at before it goes on; the instruction is complete.
    Boundary,
    /// As `Boundary`, after an instruction that loaded CS:RIP.
    FarJump,
    /// The instruction at RIP faulted.
    Fault,
}

/// The branch that was executed last: null, or an instruction with [`LINK`] of the block at `rip`.
struct From {
    branch: *const Insn,
    taken: bool,
    rip: u64,
}

/// Exceptions delivered without one instruction in between before the loop gives others a chance.
const FAULT_STORM: u32 = 1000;
/// DR6.BS: single step.
const DR6_BS: u64 = 1 << 14;

impl Core {
    /// Executes at most `budget` instructions; after `Budget` exactly that many (a REP iteration counts as one).
    pub fn run(&mut self, cache: &mut Cache, budget: u64) -> RunExit {
        self.budget = budget;
        self.yielded = false;
        self.refresh();
        let mut storm = 0;
        loop {
            self.absorb(cache);
            if let Err(Fault) = self.poll_events() {
                if let Some(exit) = self.pending() {
                    return exit;
                }
            }
            self.refresh();
            if self.cpu.activity != Activity::Running {
                return RunExit::Halted;
            }
            if self.budget == 0 {
                return RunExit::Budget;
            }
            if self.yielded {
                return RunExit::Pause;
            }
            let before = self.cpu.icount;
            self.fault = None;
            let end = self.step_or_run(cache);
            self.count_known = true;
            // No block is running: what looks at its neighbours must find none.
            self.stop_at = std::ptr::null();
            if end == End::Fault {
                if let Some(exit) = self.pending() {
                    return exit;
                }
            }
            self.refresh();
            storm = if self.cpu.icount == before { storm + 1 } else { 0 };
            if storm > FAULT_STORM || end != End::Limit && self.shared.control.attention() {
                self.absorb(cache);
                return RunExit::Events;
            }
        }
    }

    /// One instruction when something wants to look after it, else blocks until the budget or a boundary.
    #[inline]
    fn step_or_run(&mut self, cache: &mut Cache) -> End {
        let stepping = self.cpu.flags & flags::TF != 0;
        if !self.breakpoints.active {
            // RF lasts for one instruction, and without breakpoints nothing shows it: there is no need to execute that one by itself.
            self.cpu.flags &= !flags::RF;
        }
        if !stepping
            && self.cpu.flags & flags::RF == 0
            && self.cpu.shadow == 0
            && !self.breakpoints.active
            && self.breakpoints.hit == 0
            && !std::mem::take(&mut self.alone)
        {
            self.count_known = false;
            return self.blocks(cache);
        }
        if self.breakpoint_before() {
            return End::Fault;
        }
        self.cpu.shadow = 0;
        let rip = self.cpu.rip;
        let rest = self.budget - 1;
        self.budget = 1;
        let mut end = self.blocks(cache);
        self.budget += rest;
        if end == End::Limit {
            end = End::Boundary;
        }
        let trap = match end {
            End::Fault => false,
            End::FarJump => self.cpu.flags & flags::TF != 0,
            _ => self.cpu.shadow & 1 == 0,
        };
        match end {
            // What a faulting instruction touched does not count.
            End::Fault => self.breakpoints.hit = 0,
            // IRET has just loaded RF.
            End::FarJump => {}
            // Good for one instruction, whether there are breakpoints or not: interrupt frames show it.
            _ if self.cpu.rip != rip => self.cpu.flags &= !flags::RF,
            // Between the iterations of one instruction it stays.
            _ => {}
        }
        let hit = if end != End::Fault && self.cpu.shadow & 1 == 0 { std::mem::take(&mut self.breakpoints.hit) } else { 0 };
        if stepping && trap || hit != 0 {
            self.debug_exception(hit | if stepping && trap { DR6_BS } else { 0 });
            return End::Fault;
        }
        end
    }

    /// A data breakpoint hit on the way into an exception, or an instruction breakpoint at RIP: #DB before the instruction.
    #[cold]
    fn breakpoint_before(&mut self) -> bool {
        // MOV SS holds back data breakpoints, on AMD not those on the next instruction.
        let hit = if self.cpu.shadow & 1 == 0 { std::mem::take(&mut self.breakpoints.hit) } else { 0 };
        let code = if hit == 0 { self.code_breakpoint() } else { 0 };
        if hit | code == 0 {
            return false;
        }
        if code != 0 {
            // The frame shows RF, so that the return executes the instruction.
            self.cpu.flags |= flags::RF;
        }
        self.debug_exception(hit | code);
        true
    }

    /// Deals with `fault`: delivers an exception (`None`: go on) or says why the machine must stop.
    fn pending(&mut self) -> Option<RunExit> {
        self.noncanonical = false;
        loop {
            match self.fault.take()? {
                Pending::Exception(exception) => {
                    // A single step trap ends a HLT.
                    self.cpu.activity = Activity::Running;
                    if self.deliver(exception).is_ok() {
                        return None;
                    }
                }
                Pending::Memory(error) => return Some(RunExit::Failed(memory_failure(&error))),
                Pending::Failed(error) => return Some(RunExit::Failed(error)),
                Pending::TripleFault => return Some(RunExit::TripleFault),
                Pending::Count => {
                    self.alone = true;
                    return None;
                }
            }
        }
    }

    /// Carries out what stores, devices and other vCPUs did to decoded code since the last boundary.
    fn absorb(&mut self, cache: &mut Cache) {
        for (phys, len) in self.code_written.drain(..) {
            cache.invalidate(&self.shared.memory, phys, len);
        }
        if self.shared.memory.code_write_pending() {
            for (phys, len) in self.shared.memory.take_code_writes() {
                cache.invalidate(&self.shared.memory, phys, len);
            }
        }
        self.follow(cache);
    }

    /// Brings TLB and jump cache up to date with the block cache.
    fn follow(&mut self, cache: &Cache) {
        if self.generation != cache.generation() {
            self.generation = cache.generation();
            self.new_epoch();
        }
        if self.marks_seen != cache.marks() {
            match cache.marks_since(self.marks_seen) {
                Some(pages) if pages.len() <= 64 => pages.iter().for_each(|&page| self.tlb.protect(page)),
                _ => self.tlb.protect_all(),
            }
            self.marks_seen = cache.marks();
        }
    }

    /// Runs blocks until the budget is used up or the loop has to look at something.
    fn blocks(&mut self, cache: &mut Cache) -> End {
        let mut from = From { branch: std::ptr::null(), taken: false, rip: 0 };
        let mut linked = Span { start: 0, count: 0 };
        loop {
            let rip = self.cpu.rip;
            let span = if linked.count != 0 {
                linked
            } else {
                match self.successor(cache, rip, &from) {
                    Ok(span) => span,
                    Err(Fault) => return End::Fault,
                }
            };
            if cache.heat(span) != Heat::Interpret {
                match self.translated(cache, span) {
                    Some(Left::End(end)) => return end,
                    Some(_) => {
                        linked.count = 0;
                        from.branch = std::ptr::null();
                        if self.budget == 0 {
                            return End::Limit;
                        }
                        continue;
                    }
                    // Nothing was executed.
                    None => {}
                }
            }
            let insns = cache.insns(span);
            let count = insns.len().min(self.budget as usize);
            let start = insns.as_ptr();
            self.cpu.gpr[usize::from(GPR_BLOCK)] = rip;
            self.block_at = start;
            // SAFETY: `count` is at most the slice's length.
            self.stop_at = unsafe { start.add(count) };
            let mut at = start;
            let flow = loop {
                // SAFETY: `at` starts inside the slice (budget and block are not empty) and goes on only while below `stop_at`,
                // which is inside it or at its end. The cache cannot change meanwhile: handlers do not see it.
                let insn = unsafe { &*at };
                match (insn.f)(self, insn) {
                    Ok(Flow::Next) => {
                        // SAFETY: one past an element of the slice at most.
                        at = unsafe { at.add(1) };
                        if at >= self.stop_at {
                            break Flow::Next;
                        }
                    }
                    Ok(flow) => break flow,
                    Err(Fault) => {
                        self.retire(at, start);
                        self.cpu.rip = self.wrap_ip(rip.wrapping_add(u64::from(insn.off)));
                        if self.noncanonical {
                            self.blame_stack(insn);
                        }
                        return End::Fault;
                    }
                }
            };
            // The common ends first, as plain comparisons: a jump table costs more than all of this.
            if flow == Flow::Jump || flow == Flow::Jump2 {
                // SAFETY: a pair ends with the branch after `at`, which is in the slice.
                at = unsafe { at.add(usize::from(flow == Flow::Jump2)) };
                self.retire(at.wrapping_add(1), start);
                // SAFETY: `at` is the instruction just executed.
                let branch = unsafe { &*at };
                if branch.prefix & LINK != 0 {
                    let taken = self.cpu.rip.wrapping_sub(rip) == branch.imm;
                    let (start, count) = branch.link(taken);
                    linked = Span { start, count: u32::from(count) };
                    from = From { branch: at, taken, rip };
                } else {
                    linked.count = 0;
                    from.branch = std::ptr::null();
                }
            } else if flow == Flow::Next {
                linked.count = 0;
                from.branch = std::ptr::null();
                self.retire(at, start);
                // SAFETY: at least one instruction was executed, so the one before `at` is in the slice.
                let last = unsafe { &*at.sub(1) };
                self.cpu.rip = self.wrap_ip(rip.wrapping_add(u64::from(last.off) + u64::from(last.len)));
            } else if flow == Flow::Stale {
                // Whoever led here learns the new place.
                self.jumps.forget(self.linear(self.fetch_base, rip));
                linked.count = 0;
                continue;
            } else {
                // SAFETY: `at` is the instruction just executed.
                return self.left(flow, unsafe { &*at }, start, rip);
            }
            if self.stop_at.is_null() {
                return End::Boundary;
            }
            if self.budget == 0 {
                return End::Limit;
            }
        }
    }

    /// Runs translated code from the block at RIP on, if it can be translated; then, whatever it leads to that is translated too.
    #[inline(never)]
    fn translated(&mut self, cache: &mut Cache, mut span: Span) -> Option<Left> {
        let mut from: Option<(u32, u64)> = None;
        let mut left = None;
        loop {
            if cache.heat(span) == Heat::Translate {
                self.make_translation(cache, span);
                if self.generation != cache.generation() {
                    self.follow(cache);
                    return Some(Left::Next);
                }
            }
            let Some(id) = cache.jit.as_ref().and_then(|jit| jit.find(span.start, self.half, self.budget)) else { return left };
            let Some(jit) = &mut cache.jit else { return left };
            let mut global = None;
            match from.take() {
                Some((link, generation)) if generation == self.generation => jit.link(link, id),
                _ => {
                    jit.remember(id);
                    self.tlb.note_fetch(self.cpu.rip);
                    global = Some(self.jumps.is_global(self.cpu.rip, self.jump_key_global));
                }
            }
            match jit.run(self, id, global) {
                Left::Link(link) => from = Some((link, self.generation)),
                Left::Next => {}
                other => return Some(other),
            }
            left = Some(Left::Next);
            if self.budget == 0 {
                return left;
            }
            let nowhere = From { branch: std::ptr::null(), taken: false, rip: 0 };
            span = match self.successor(cache, self.cpu.rip, &nowhere) {
                Ok(span) => span,
                Err(Fault) => return Some(Left::End(End::Fault)),
            };
            if cache.heat(span) == Heat::Interpret {
                return left;
            }
        }
    }

    /// Translates the block at RIP, which is at `span`; or marks it as one that cannot be translated.
    #[cold]
    fn make_translation(&mut self, cache: &mut Cache, span: Span) {
        if cache.jit.as_ref().is_some_and(|jit| !jit.has_room()) {
            // Everything starts anew, when no block is running.
            return cache.clear(&self.shared.memory);
        }
        let mut bytes = [0; MAX_INSNS * MAX_LEN];
        let (mut phys, mut len) = (self.cpu.rip & (PAGE_SIZE - 1), 0);
        if self.cpu.code_size == CodeSize::Bits64 {
            (phys, len) = self.block_bytes(cache, span, &mut bytes).unwrap_or((phys, 0));
        }
        self.fault = None;
        let (insns, Some(jit)) = cache.insns_mut(span) else { return };
        jit.translate(jit::Block { start: span.start, insns, bytes: &bytes[..len], phys, half: self.half });
    }

    /// Where the block at RIP is, and the bytes that it was decoded from. `None`: it is not one to translate.
    fn block_bytes(&mut self, cache: &Cache, span: Span, bytes: &mut [u8]) -> Option<(u64, usize)> {
        let rip = self.cpu.rip;
        let phys = self.fetch(rip).ok()?;
        let len: usize = cache.insns(span).iter().map(|i| usize::from(i.len)).sum();
        if cache.find(Key::new(phys, CodeSize::Bits64)) != Some((span, u64::MAX))
            || (rip & (PAGE_SIZE - 1)) as usize + len > PAGE_SIZE as usize
        {
            return None;
        }
        self.read_code(phys, bytes.get_mut(..len)?).ok()?;
        Some((phys, len))
    }

    /// The block at `rip`, and tells the branch that led there when both are on one page.
    #[inline]
    fn successor(&mut self, cache: &mut Cache, rip: u64, from: &From) -> Result<Span, Fault> {
        let linear = self.linear(self.fetch_base, rip);
        let generation = cache.generation();
        let span = match self.jumps.get(linear, self.jump_key, self.jump_key_global) {
            Some(span) => span,
            None => self.lookup(cache, linear)?,
        };
        // Nothing can be said of a branch whose arena is gone, and what is not in the jump cache (an instruction that crosses into
        // another page) must be looked up every time.
        if !from.branch.is_null()
            && (from.rip ^ rip) >> 12 == 0
            && generation == cache.generation()
            && self.jumps.get(linear, self.jump_key, self.jump_key_global) == Some(span)
        {
            cache.link(from.branch, from.taken, span);
        }
        Ok(span)
    }

    /// After an instruction that ended its block in any other way than by a branch.
    #[inline(never)]
    pub(crate) fn left(&mut self, flow: Flow, insn: &Insn, start: *const Insn, rip: u64) -> End {
        let at = std::ptr::from_ref(insn);
        let own = rip.wrapping_add(u64::from(insn.off));
        match flow {
            Flow::Again => {
                self.retire(at, start);
                self.cpu.rip = self.wrap_ip(own);
                if self.budget == 0 { End::Limit } else { End::Boundary }
            }
            Flow::LeaveJump => {
                self.retire(at.wrapping_add(1), start);
                End::FarJump
            }
            _ => {
                self.retire(at.wrapping_add(1), start);
                self.cpu.rip = self.wrap_ip(own.wrapping_add(u64::from(insn.len)));
                End::Boundary
            }
        }
    }

    /// Counts the instructions from `start` up to `at`.
    #[inline(always)]
    pub(crate) fn retire(&mut self, at: *const Insn, start: *const Insn) {
        let done = (at as usize - start as usize) / size_of::<Insn>();
        self.budget -= done as u64;
        self.cpu.icount += done as u64;
    }

    #[inline(always)]
    fn wrap_ip(&self, ip: u64) -> u64 {
        if self.cpu.code_size == CodeSize::Bits64 { ip } else { ip & 0xffff_ffff }
    }

    #[cold]
    pub(crate) fn blame_stack(&mut self, insn: &Insn) {
        self.noncanonical = false;
        if insn.prefix & STACK != 0 {
            if let Some(Pending::Exception(Exception { vector: vector @ GP, .. })) = &mut self.fault {
                *vector = SS;
            }
        }
    }

    /// Iterations that a REP instruction may do now (at least 1).
    #[inline]
    pub(crate) fn iterations_left(&self, i: &Insn) -> u64 {
        let before = (std::ptr::from_ref(i) as usize - self.block_at as usize) / size_of::<Insn>();
        self.budget - before as u64
    }

    /// Counts `extra` iterations of the running REP instruction besides the one that the loop counts (or not, for `Again`).
    #[inline]
    pub(crate) fn count_iterations(&mut self, i: &Insn, extra: u64) {
        self.budget -= extra;
        self.cpu.icount += extra;
        if !self.stop_at.is_null() {
            let before = (std::ptr::from_ref(i) as usize - self.block_at as usize) / size_of::<Insn>();
            let last = self.block_at.wrapping_add(self.budget.min(before as u64 + 1 + MAX_INSNS as u64) as usize);
            self.stop_at = self.stop_at.min(last);
        }
    }

    /// Finds or decodes the block at `linear` (= RIP).
    #[cold]
    #[inline(never)]
    fn lookup(&mut self, cache: &mut Cache, linear: u64) -> Result<Span, Fault> {
        let size = self.cpu.code_size;
        if size != CodeSize::Bits64 && self.cpu.rip > u64::from(self.cpu.seg[CS].limit) {
            return Err(self.raise(GP, Some(0)));
        }
        let phys = self.fetch(linear)?;
        let key = Key::new(phys, size);
        let span = match cache.find(key) {
            Some((span, u64::MAX)) => span,
            // An instruction that crosses into the next page depends on where that is now.
            Some((span, second)) if self.fetch(next_page(linear))? == second => return Ok(span),
            _ => match self.decode(cache, key, linear, phys)? {
                (span, u64::MAX) => span,
                (span, _) => return Ok(span),
            },
        };
        self.tlb.note_fetch(linear);
        let global = self.tlb.is_global(linear, self.half);
        self.jumps.put(linear, if global { self.jump_key_global } else { self.jump_key }, span);
        Ok(span)
    }

    /// Decodes the block at `linear`, which is at `phys`, and stores it. Also gives the second page of an instruction that crosses.
    #[inline(never)]
    fn decode(&mut self, cache: &mut Cache, key: Key, linear: u64, phys: u64) -> Result<(Span, u64), Fault> {
        let size = self.cpu.code_size;
        let mut bytes = [0u8; MAX_INSNS * MAX_LEN];
        let rest = (PAGE_SIZE - (phys & (PAGE_SIZE - 1))) as usize;
        let have = rest.min(bytes.len());
        self.read_code(phys, &mut bytes[..have])?;
        let mut insns = std::mem::take(&mut self.scratch);
        let mut second = u64::MAX;
        let mut decoded = decode::block(&bytes[..have], size, &mut insns);
        if decoded == Decoded::Short {
            second = self.fetch(next_page(linear))?;
            self.read_code(second, &mut bytes[rest..rest + MAX_LEN])?;
            decoded = decode::block(&bytes[..rest + MAX_LEN], size, &mut insns);
            insns.truncate(1);
        }
        let (Decoded::Block(len), Some(first)) = (decoded, insns.first()) else {
            return Err(self.raise(GP, Some(0)));
        };
        let len = if second == u64::MAX { len } else { u32::from(first.len) };
        let span = cache.insert(&self.shared.memory, key, &insns, len, second);
        self.scratch = insns;
        self.follow(cache);
        Ok((span, second))
    }

    fn fetch(&mut self, linear: u64) -> Result<u64, Fault> {
        self.translate(linear, Kind::Fetch, Rights::Current)
    }

    fn read_code(&mut self, phys: u64, bytes: &mut [u8]) -> Result<(), Fault> {
        match self.shared.memory.read(phys, bytes) {
            Ok(()) => Ok(()),
            Err(MemoryError::NotRam { .. }) => {
                Err(self.unsupported(format!("the guest jumped to physical address {phys:#x}, where there is no RAM")))
            }
            Err(error) => {
                self.fault = Some(Pending::Memory(error));
                Err(Fault)
            }
        }
    }
}

fn next_page(linear: u64) -> u64 {
    (linear & !(PAGE_SIZE - 1)).wrapping_add(PAGE_SIZE)
}

/// Stands where a dead block began, for jump caches and branches that still point there.
pub(crate) fn stale(_: &mut Core, _: &Insn) -> Result<Flow, Fault> {
    Ok(Flow::Stale)
}

fn memory_failure(error: &MemoryError) -> EngineError {
    let code = if matches!(error, MemoryError::Host { .. }) { "host" } else { "damaged" };
    EngineError::new(code, error.to_string())
}
