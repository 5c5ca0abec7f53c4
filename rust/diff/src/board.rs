//! A bare machine for small system programs: CPUs, RAM, I/O APIC, a serial port that is heard, and the few test devices that the
//! kvm-unit-tests suite wants (exit port, fw_cfg numbers, latches, interrupt lines). Images are ELF, entered in 32-bit
//! protected mode at `e_entry` with EBX at a multiboot information block.

use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Condvar, Mutex};
use std::time::Duration;

use memory::{GuestMemory, RegionLayout};
use vcpu::ioapic::Ioapic;
use vcpu::{Bus, Clock, Control, Device, Engine, EngineError, Space, Stop};
use x86::state::{Activity, CS, CodeSize, DS, ES, FS, GS, RBX, SS, Segment};
use x86::{EngineConfig, SoftwareEngine};

const MEMORY_MAP: u64 = 0x7_0000;
const INFO: u64 = 0x7_0500;
const COMMAND_LINE: u64 = 0x7_1000;
const MODULE: u64 = 0x7_2000;

pub struct BoardConfig<'a> {
    pub image: &'a [u8],
    pub cpus: usize,
    /// Bytes of RAM from address 0, a multiple of 4 KiB.
    pub memory: u64,
    pub command_line: &'a str,
    /// The one multiboot module, if any.
    pub module: Option<&'a [u8]>,
}

/// Why [`Board::run`] came back.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Ended {
    /// The guest wrote this to port 0xf4.
    Exit(u32),
    /// The awaited text was printed.
    Text,
    Timeout,
    Reset,
    Failed(String),
}

#[derive(Default)]
struct Heard {
    text: String,
    await_text: Option<String>,
    divisor: bool,
}

struct Serial {
    heard: Mutex<Heard>,
    control: Arc<Control>,
}

impl Device for Serial {
    fn read(&self, offset: u64, data: &mut [u8]) {
        data.fill(if offset == 5 { 0x60 } else { 0 });
    }
    fn write(&self, offset: u64, data: &[u8]) {
        let mut heard = self.heard.lock().expect("serial");
        match (offset, data.first()) {
            (0, Some(&byte)) if !heard.divisor => {
                heard.text.push(byte as char);
                if heard.await_text.as_ref().is_some_and(|t| heard.text.ends_with(t.as_str())) {
                    self.control.request_stop(Stop::Paused);
                }
            }
            (3, Some(&lcr)) => heard.divisor = lcr & 0x80 != 0,
            _ => {}
        }
    }
}

/// 0xf4: the guest ends.
struct Exit {
    value: AtomicU32,
    done: AtomicBool,
    control: Arc<Control>,
}

impl Device for Exit {
    fn read(&self, _: u64, data: &mut [u8]) {
        data.fill(0);
    }
    fn write(&self, _: u64, data: &[u8]) {
        self.value.store(data.iter().rev().fold(0, |v, &b| v << 8 | u32::from(b)), Ordering::Relaxed);
        self.done.store(true, Ordering::Relaxed);
        self.control.request_stop(Stop::PowerOff);
    }
}

/// 0x510: QEMU's configuration port, as far as numbers go: NB_CPUS, RAM_SIZE, MAX_RAM.
struct Numbers {
    cpus: u64,
    memory: u64,
    at: Mutex<(u16, u32)>,
}

impl Device for Numbers {
    fn read(&self, _: u64, data: &mut [u8]) {
        let mut at = self.at.lock().expect("numbers");
        let value = match at.0 {
            3 => self.memory,
            5 => self.cpus,
            _ => 0,
        };
        for b in data {
            *b = value.checked_shr(8 * at.1).unwrap_or(0) as u8;
            at.1 += 1;
        }
    }
    fn write(&self, _: u64, data: &[u8]) {
        if let [low, high] = *data {
            *self.at.lock().expect("numbers") = (u16::from_le_bytes([low, high]), 0);
        }
    }
}

/// Keeps what is written.
struct Latch(Mutex<Vec<u8>>);

impl Device for Latch {
    fn read(&self, offset: u64, data: &mut [u8]) {
        let bytes = self.0.lock().expect("latch");
        for (i, b) in data.iter_mut().enumerate() {
            *b = bytes.get(offset as usize + i).copied().unwrap_or(0xff);
        }
    }
    fn write(&self, offset: u64, data: &[u8]) {
        let mut bytes = self.0.lock().expect("latch");
        for (i, b) in data.iter().enumerate() {
            if let Some(at) = bytes.get_mut(offset as usize + i) {
                *at = *b;
            }
        }
    }
}

/// 0x2000 + n: level of interrupt line n.
struct Lines(Arc<Ioapic>);

impl Device for Lines {
    fn read(&self, _: u64, data: &mut [u8]) {
        data.fill(0);
    }
    fn write(&self, offset: u64, data: &[u8]) {
        self.0.set_line(offset as u32, data.first().is_some_and(|&b| b != 0));
    }
}

pub struct Board {
    engine: SoftwareEngine,
    control: Arc<Control>,
    serial: Arc<Serial>,
    exit: Arc<Exit>,
}

impl Board {
    /// Loads the image; `Err` says what is wrong with it.
    pub fn new(config: &BoardConfig) -> Result<Self, String> {
        let memory = Arc::new(GuestMemory::new(&[RegionLayout { gpa: 0, size: config.memory }]).map_err(|e| e.to_string())?);
        let put = |at: u64, bytes: &[u8]| memory.write(at, bytes).map_err(|e| e.to_string());
        let entry = load_elf(config.image, put)?;
        let words = |at: u64, list: &[u32]| put(at, &list.iter().flat_map(|w| w.to_le_bytes()).collect::<Vec<_>>());
        let upper = (config.memory - 0x10_0000) / 1024;
        // Two entries of the memory map: below 640 KiB, above 1 MiB.
        words(MEMORY_MAP, &[20, 0, 0, 0x9_fc00, 0, 1, 20, 0x10_0000, 0, (config.memory - 0x10_0000) as u32, 0, 1])?;
        let mut info = [0u32; 22];
        info[0] = 1 | 4 | 8 | 0x40;
        info[1] = 639;
        info[2] = upper as u32;
        info[4] = COMMAND_LINE as u32;
        put(COMMAND_LINE, format!("guest {}\0", config.command_line).as_bytes())?;
        if let Some(module) = config.module {
            (info[5], info[6]) = (1, INFO as u32 + 0x100);
            words(INFO + 0x100, &[MODULE as u32, MODULE as u32 + module.len() as u32, COMMAND_LINE as u32, 0])?;
            put(MODULE, module)?;
        }
        (info[11], info[12]) = (48, MEMORY_MAP as u32);
        words(INFO, &info)?;

        let (bus, control) = (Arc::new(Bus::default()), Arc::new(Control::default()));
        let ioapic = Arc::new(Ioapic::default());
        let serial = Arc::new(Serial { heard: Mutex::default(), control: control.clone() });
        let exit = Arc::new(Exit { value: AtomicU32::new(0), done: AtomicBool::new(false), control: control.clone() });
        let numbers = Arc::new(Numbers { cpus: config.cpus as u64, memory: config.memory, at: Mutex::default() });
        let add = |space, base, len, device: Arc<dyn Device>| bus.insert(space, base, len, device).map_err(|e| e.to_string());
        add(Space::Pio, 0x3f8, 8, serial.clone())?;
        add(Space::Pio, 0xf4, 4, exit.clone())?;
        add(Space::Pio, 0x510, 2, numbers)?;
        add(Space::Pio, 0xe0, 4, Arc::new(Latch(Mutex::new(vec![0; 4]))))?;
        add(Space::Pio, 0x2000, 24, Arc::new(Lines(ioapic.clone())))?;
        add(Space::Mmio, 0xff00_0000, 0x1_0000, Arc::new(Latch(Mutex::new(vec![0; 0x1_0000]))))?;
        add(Space::Mmio, 0xfec0_0000, 0x1000, ioapic.clone())?;

        let clock = Arc::new(Clock::new(1_000_000, 0));
        let eoi = Some(ioapic.clone() as Arc<dyn vcpu::EoiListener>);
        let parts = EngineConfig { memory, bus, clock, control: control.clone(), vcpus: config.cpus, phys_bits: 40, eoi };
        let mut engine = SoftwareEngine::new(parts, x86::Tier::default()).map_err(|e| e.to_string())?;
        ioapic.connect(Arc::downgrade(&engine.irq_sink()));
        let core = engine.core(0);
        let flat = |selector, attr| Segment { base: 0, limit: u32::MAX, selector, attr };
        for i in [ES, SS, DS, FS, GS] {
            core.cpu.seg[i] = flat(0x18, 0xc093);
        }
        core.cpu.seg[CS] = flat(0x10, 0xc09b);
        core.cpu.cr0 = 0x11;
        core.cpu.cr4 = 0;
        core.cpu.efer = 0;
        core.cpu.rip = entry;
        core.cpu.gpr[RBX] = INFO;
        core.cpu.gpr[0] = 0x2bad_b002;
        core.cpu.set_rflags(2);
        core.cpu.code_size = CodeSize::Bits32;
        core.cpu.cpl = 0;
        core.cpu.activity = Activity::Running;
        core.refresh();
        core.flush_tlb_all();
        Ok(Self { engine, control, serial, exit })
    }

    /// All that was printed.
    pub fn output(&self) -> String {
        self.serial.heard.lock().expect("serial").text.clone()
    }

    pub fn engine(&mut self) -> &mut SoftwareEngine {
        &mut self.engine
    }

    /// Runs until the guest exits, prints `text`, or `limit` has passed.
    pub fn run(&mut self, text: Option<&str>, limit: Duration) -> Ended {
        self.serial.heard.lock().expect("serial").await_text = text.map(str::to_string);
        let over = Arc::new((Mutex::new(false), Condvar::new()));
        let watch = {
            let (over, control) = (over.clone(), self.control.clone());
            std::thread::spawn(move || {
                let guard = over.0.lock().expect("watch");
                let (guard, timeout) = over.1.wait_timeout_while(guard, limit, |over| !*over).expect("watch");
                drop(guard);
                if timeout.timed_out() {
                    control.request_stop(Stop::Failed(EngineError::new("timeout", "timeout")));
                }
            })
        };
        let stop = self.engine.run();
        *over.0.lock().expect("watch") = true;
        over.1.notify_all();
        watch.join().expect("watch");
        match stop {
            Stop::Paused => Ended::Text,
            Stop::PowerOff if self.exit.done.load(Ordering::Relaxed) => Ended::Exit(self.exit.value.load(Ordering::Relaxed)),
            Stop::PowerOff | Stop::Reset => Ended::Reset,
            Stop::Failed(e) if e.code == "timeout" => Ended::Timeout,
            Stop::Failed(e) => Ended::Failed(e.message),
        }
    }
}

/// Loads the PT_LOAD segments of an ELF32 or ELF64 image by physical address; its entry.
fn load_elf(image: &[u8], put: impl Fn(u64, &[u8]) -> Result<(), String>) -> Result<u64, String> {
    let number = |at: usize, len: usize| -> Result<u64, String> {
        let bytes = image.get(at..at + len).ok_or("the image is cut short")?;
        Ok(bytes.iter().rev().fold(0, |v, &b| v << 8 | u64::from(b)))
    };
    if image.get(..4) != Some(b"\x7fELF") {
        return Err("not an ELF image".into());
    }
    let wide = image[4] == 2;
    let word = if wide { 8 } else { 4 };
    let (entry, table) = (number(24, word)?, number(24 + word, word)?);
    let (size, count) = if wide { (number(54, 2)?, number(56, 2)?) } else { (number(42, 2)?, number(44, 2)?) };
    for n in 0..count {
        let at = (table + n * size) as usize;
        if number(at, 4)? != 1 {
            continue;
        }
        let (offset, to, file, total) = if wide {
            (number(at + 8, 8)?, number(at + 24, 8)?, number(at + 32, 8)?, number(at + 40, 8)?)
        } else {
            (number(at + 4, 4)?, number(at + 12, 4)?, number(at + 16, 4)?, number(at + 20, 4)?)
        };
        let bytes = image.get(offset as usize..(offset + file) as usize).ok_or("the image is cut short")?;
        put(to, bytes)?;
        put(to + file, &vec![0; total.saturating_sub(file) as usize])?;
    }
    Ok(entry)
}
