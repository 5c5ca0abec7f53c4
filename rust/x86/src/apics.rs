//! What joins the LAPICs of a machine: each vCPU's mailbox, and the resolution of destinations (SDM vol. 3, 11.6.2).
//! Any thread may post; the vCPU's own thread empties its mailbox at an instruction boundary.

use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};

use vcpu::irq::{IntrAcknowledge, IntrLine};
use vcpu::{Control, EoiListener, IrqSink};

/// Delivery modes of ICR, LVT, MSI and I/O APIC.
pub const FIXED: u8 = 0;
pub const LOWEST: u8 = 1;
pub const NMI: u8 = 4;
pub const INIT: u8 = 5;
pub const SIPI: u8 = 6;

/// Bits of [`Mailbox::signals`].
pub const SIGNAL_IRR: u32 = 1;
pub const SIGNAL_NMI: u32 = 2;
pub const SIGNAL_INIT: u32 = 4;
/// With the vector in bits 8–15.
pub const SIGNAL_SIPI: u32 = 8;
/// The 8259s' output has changed.
pub const SIGNAL_INTR: u32 = 16;

/// Interrupts on their way to one vCPU, and the identity that its LAPIC has published.
#[derive(Default)]
pub struct Mailbox {
    signals: AtomicU32,
    nmis: AtomicU32,
    irr: [AtomicU32; 8],
    /// Which of `irr` came level-triggered.
    level: [AtomicU32; 8],
    /// Bits 0–31 id, 32 hardware-enabled, 33 x2APIC mode, 34 software-enabled.
    identity: AtomicU64,
    /// LDR in bits 0–31, DFR above.
    logical: AtomicU64,
}

/// What a vCPU takes out of its mailbox at once.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub struct Mail {
    pub signals: u32,
    pub nmis: u32,
    pub irr: [u32; 8],
    pub level: [u32; 8],
}

impl Mail {
    pub fn sipi_vector(&self) -> u8 {
        (self.signals >> 8) as u8
    }
}

impl Mailbox {
    /// One relaxed load.
    pub fn posted(&self) -> bool {
        self.signals.load(Ordering::Relaxed) != 0
    }

    pub fn take(&self) -> Mail {
        let signals = self.signals.swap(0, Ordering::AcqRel);
        let mut mail = Mail { signals, ..Mail::default() };
        if signals & SIGNAL_NMI != 0 {
            mail.nmis = self.nmis.swap(0, Ordering::AcqRel);
        }
        if signals & SIGNAL_IRR != 0 {
            for i in 0..8 {
                if self.irr[i].load(Ordering::Relaxed) != 0 {
                    mail.irr[i] = self.irr[i].swap(0, Ordering::AcqRel);
                    mail.level[i] = self.level[i].fetch_and(!mail.irr[i], Ordering::AcqRel) & mail.irr[i];
                }
            }
        }
        mail
    }

    fn post_vector(&self, vector: u8, level: bool) {
        let (word, bit) = (usize::from(vector >> 5), 1u32 << (vector & 31));
        if level {
            self.level[word].fetch_or(bit, Ordering::Relaxed);
        } else {
            self.level[word].fetch_and(!bit, Ordering::Relaxed);
        }
        self.irr[word].fetch_or(bit, Ordering::Relaxed);
        self.signals.fetch_or(SIGNAL_IRR, Ordering::Release);
    }

    fn post_sipi(&self, vector: u8) {
        let _ = self
            .signals
            .fetch_update(Ordering::AcqRel, Ordering::Relaxed, |s| Some(s & !0xff00 | SIGNAL_SIPI | u32::from(vector) << 8));
    }

    /// Called by the owner whenever one of these changes.
    pub fn publish(&self, id: u32, enabled: bool, x2apic: bool, software: bool, ldr: u32, dfr: u32) {
        let bits = u64::from(id) | u64::from(enabled) << 32 | u64::from(x2apic) << 33 | u64::from(software) << 34;
        self.identity.store(bits, Ordering::Release);
        self.logical.store(u64::from(ldr) | u64::from(dfr) << 32, Ordering::Release);
    }
}

/// Where a message goes: `wide` tells 32-bit x2APIC destinations from 8-bit ones.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Destination {
    pub id: u32,
    pub logical: bool,
    pub wide: bool,
}

/// A message between APICs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Message {
    pub vector: u8,
    pub mode: u8,
    pub level: bool,
}

/// All LAPICs of a machine, as the outside sees them.
pub struct Apics {
    boxes: Vec<Mailbox>,
    control: Arc<Control>,
    eoi: Option<Arc<dyn EoiListener>>,
    pic: OnceLock<(Arc<IntrLine>, IntrAcknowledge)>,
}

impl Apics {
    pub fn new(vcpus: usize, control: Arc<Control>, eoi: Option<Arc<dyn EoiListener>>) -> Self {
        Self { boxes: (0..vcpus).map(|_| Mailbox::default()).collect(), control, eoi, pic: OnceLock::new() }
    }

    pub fn count(&self) -> usize {
        self.boxes.len()
    }

    pub fn mailbox(&self, vcpu: usize) -> &Mailbox {
        &self.boxes[vcpu]
    }

    /// The 8259s of the machine, for vCPU 0; `false` when there are some already.
    pub fn connect_pic(self: &Arc<Self>, line: Arc<IntrLine>, acknowledge: IntrAcknowledge) -> bool {
        if self.pic.set((line.clone(), acknowledge)).is_err() {
            return false;
        }
        let apics = Arc::downgrade(self);
        line.connect(Box::new(move || {
            if let Some(apics) = apics.upgrade() {
                apics.boxes[0].signals.fetch_or(SIGNAL_INTR, Ordering::Release);
                apics.control.wake();
            }
        }));
        true
    }

    /// Level of the 8259s' output.
    pub fn intr(&self) -> bool {
        self.pic.get().is_some_and(|(line, _)| line.level())
    }

    /// The acknowledge cycle: the vector of the 8259s.
    pub fn acknowledge_intr(&self) -> Option<u8> {
        self.pic.get().map(|(_, acknowledge)| acknowledge())
    }

    /// End of a level-triggered interrupt.
    pub fn eoi(&self, vector: u8) {
        if let Some(listener) = &self.eoi {
            listener.eoi(vector);
        }
    }

    fn matches(&self, vcpu: usize, to: Destination) -> bool {
        let mailbox = &self.boxes[vcpu];
        let identity = mailbox.identity.load(Ordering::Acquire);
        if identity >> 32 & 1 == 0 {
            return false;
        }
        let x2apic = identity >> 33 & 1 != 0;
        let broadcast = if to.wide { to.id == u32::MAX } else { to.id == 0xff };
        if broadcast {
            return true;
        }
        let id = identity as u32;
        if !to.logical {
            return to.id == id;
        }
        let logical = mailbox.logical.load(Ordering::Acquire);
        let (ldr, dfr) = (logical as u32, (logical >> 32) as u32);
        if x2apic {
            return ldr >> 16 == to.id >> 16 && ldr & to.id & 0xffff != 0;
        }
        let (own, mda) = (ldr >> 24, to.id);
        match dfr >> 28 {
            15 => own & mda & 0xff != 0,
            0 => own >> 4 == mda >> 4 & 15 && own & mda & 15 != 0,
            _ => false,
        }
    }

    fn accepts_fixed(&self, vcpu: usize) -> bool {
        self.boxes[vcpu].identity.load(Ordering::Acquire) >> 34 & 1 != 0
    }

    fn post(&self, vcpu: usize, m: Message) {
        let mailbox = &self.boxes[vcpu];
        match m.mode {
            FIXED | LOWEST => {
                if m.vector < 16 || !self.accepts_fixed(vcpu) {
                    return;
                }
                mailbox.post_vector(m.vector, m.level);
            }
            NMI => {
                mailbox.nmis.fetch_add(1, Ordering::Relaxed);
                mailbox.signals.fetch_or(SIGNAL_NMI, Ordering::Release);
            }
            INIT => {
                // A SIPI that came before is void.
                let _ = mailbox
                    .signals
                    .fetch_update(Ordering::AcqRel, Ordering::Relaxed, |s| Some(s & !(SIGNAL_SIPI | 0xff00) | SIGNAL_INIT));
            }
            SIPI => mailbox.post_sipi(m.vector),
            // SMI: there is no SMM. ExtINT: an 8259 reaches the boot CPU by its own wire only.
            _ => return,
        }
        self.control.wake();
    }

    /// Sends to all that match. Lowest priority goes to one of them, chosen by the vector (as KVM's vector hashing), so
    /// that a run can be repeated.
    pub fn send(&self, to: Destination, m: Message) {
        if m.mode == LOWEST {
            let fits = |&v: &usize| self.matches(v, to) && self.accepts_fixed(v);
            let n = (0..self.boxes.len()).filter(fits).count();
            if n > 0 {
                if let Some(vcpu) = (0..self.boxes.len()).filter(fits).nth(usize::from(m.vector) % n) {
                    self.post(vcpu, m);
                }
            }
            return;
        }
        for vcpu in 0..self.boxes.len() {
            if self.matches(vcpu, to) {
                self.post(vcpu, m);
            }
        }
    }

    pub fn send_self(&self, vcpu: usize, m: Message) {
        self.post(vcpu, m);
    }

    /// `except`: the sender, for "all excluding self".
    pub fn send_all(&self, m: Message, except: Option<usize>) {
        for vcpu in 0..self.boxes.len() {
            if Some(vcpu) != except && self.boxes[vcpu].identity.load(Ordering::Acquire) >> 32 & 1 != 0 {
                self.post(vcpu, m);
            }
        }
    }
}

impl IrqSink for Apics {
    fn msi(&self, address: u64, data: u32) {
        if address >> 20 & 0xfff != 0xfee {
            return;
        }
        let to = Destination { id: (address >> 12 & 0xff) as u32, logical: address & 4 != 0, wide: false };
        let mode = (data >> 8 & 7) as u8;
        let level = data >> 15 & 1 != 0;
        // A level message announces both edges; only "asserted" is an interrupt.
        if level && data >> 14 & 1 == 0 {
            return;
        }
        self.send(to, Message { vector: data as u8, mode, level });
    }
}
