//! Runs one test of the kvm-unit-tests suite (x86, `*.flat`) on the software engine and exits with its verdict.
//!
//! `kvm_unit_test FILE.flat [--smp N] [--memory MIB] [--append ARGS] [--env KEY=VALUE]… [--seconds N]`
//!
//! What the suite expects of a machine: a Multiboot 1 loader, a polled 16550, port 0xf4 to exit, fw_cfg, interrupt lines as ports
//! 0x2000 + n, an echo latch at 0xe0, and RAM-like MMIO at 0xff000000.

use std::io::Write;
use std::process::ExitCode;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use memory::{GuestMemory, RegionLayout};
use vcpu::ioapic::{IOAPIC_BASE, IOAPIC_SIZE};
use vcpu::{Bus, Clock, Control, Device, Engine, Ioapic, Space, Stop};
use x86::{EngineConfig, SoftwareEngine};

struct Arguments {
    file: String,
    vcpus: usize,
    memory_mib: u64,
    append: String,
    env: Vec<String>,
    seconds: u64,
}

fn arguments() -> Option<Arguments> {
    let mut args = std::env::args().skip(1);
    let mut a = Arguments { file: args.next()?, vcpus: 1, memory_mib: 128, append: String::new(), env: Vec::new(), seconds: 90 };
    while let Some(option) = args.next() {
        let value = args.next()?;
        match option.as_str() {
            "--smp" => a.vcpus = value.parse().ok()?,
            "--memory" => a.memory_mib = value.parse().ok()?,
            "--append" => a.append = value,
            "--env" => a.env.push(value),
            "--seconds" => a.seconds = value.parse().ok()?,
            _ => return None,
        }
    }
    Some(a)
}

/// 16550 as far as polling goes.
struct Uart;
impl Device for Uart {
    fn read(&self, offset: u64, data: &mut [u8]) {
        data.fill(if offset == 5 { 0x60 } else { 0 });
    }
    fn write(&self, offset: u64, data: &[u8]) {
        if offset == 0 {
            let _ = std::io::stdout().write_all(data);
        }
    }
}

struct Exit {
    control: Arc<Control>,
    code: AtomicU32,
}
impl Device for Exit {
    fn read(&self, _: u64, data: &mut [u8]) {
        data.fill(0);
    }
    fn write(&self, _: u64, data: &[u8]) {
        self.code.store(u32::from(data[0]), Ordering::SeqCst);
        self.control.request_stop(Stop::PowerOff);
    }
}

struct FwCfg {
    vcpus: u64,
    ram: u64,
    at: Mutex<(u16, usize)>,
}
impl Device for FwCfg {
    fn read(&self, offset: u64, data: &mut [u8]) {
        let mut at = self.at.lock().unwrap();
        let value = match at.0 {
            5 => self.vcpus,
            3 => self.ram,
            _ => 0,
        };
        data.fill(0);
        if offset == 1 {
            data[0] = value.to_le_bytes().get(at.1).copied().unwrap_or(0);
            at.1 += 1;
        }
    }
    fn write(&self, offset: u64, data: &[u8]) {
        if offset == 0 && data.len() == 2 {
            *self.at.lock().unwrap() = (u16::from_le_bytes([data[0], data[1]]), 0);
        }
    }
}

struct Lines(Arc<Ioapic>);
impl Device for Lines {
    fn read(&self, _: u64, data: &mut [u8]) {
        data.fill(0);
    }
    fn write(&self, offset: u64, data: &[u8]) {
        self.0.set_line(offset as u32, data[0] != 0);
    }
}

/// Bytes that read as they were written.
struct Bytes(Mutex<Vec<u8>>);
impl Device for Bytes {
    fn read(&self, offset: u64, data: &mut [u8]) {
        let bytes = self.0.lock().unwrap();
        for (n, to) in data.iter_mut().enumerate() {
            *to = bytes.get(offset as usize + n).copied().unwrap_or(0xff);
        }
    }
    fn write(&self, offset: u64, data: &[u8]) {
        let mut bytes = self.0.lock().unwrap();
        for (n, from) in data.iter().enumerate() {
            if let Some(to) = bytes.get_mut(offset as usize + n) {
                *to = *from;
            }
        }
    }
}

fn word(bytes: &[u8], at: usize, len: usize) -> u64 {
    bytes[at..at + len].iter().rev().fold(0, |v, &b| v << 8 | u64::from(b))
}

/// Loads the ELF32 program; gives entry and first free address.
fn load(memory: &GuestMemory, elf: &[u8]) -> (u64, u64) {
    let (headers, size, count) = (word(elf, 28, 4) as usize, word(elf, 42, 2) as usize, word(elf, 44, 2) as usize);
    let mut end = 0;
    for n in 0..count {
        let h = &elf[headers + n * size..][..32];
        if word(h, 0, 4) != 1 {
            continue;
        }
        let (offset, at) = (word(h, 4, 4) as usize, word(h, 12, 4));
        let (file, total) = (word(h, 16, 4) as usize, word(h, 20, 4));
        memory.write(at, &elf[offset..offset + file]).expect("program outside RAM");
        end = end.max(at + total);
    }
    (word(elf, 24, 4), end)
}

const MEMORY_MAP: u64 = 0x9000;
const MULTIBOOT_INFO: u64 = 0x9500;

fn multiboot(memory: &GuestMemory, free: u64, a: &Arguments) {
    let free = (free + 0xfff) & !0xfff;
    let ram = a.memory_mib << 20;
    let command = format!("{} {}\0", a.file, a.append);
    memory.write(free, command.as_bytes()).unwrap();
    let mut env: Vec<String> = vec![format!("NR_CPUS={}", a.vcpus), format!("MEMSIZE={}", a.memory_mib)];
    env.extend(a.env.iter().cloned());
    let env = env.join("\n") + "\n";
    let module = free + 0x1000;
    memory.write(module, env.as_bytes()).unwrap();
    let entry = module + 0x4000;
    for (n, value) in [module, module + env.len() as u64, 0, 0].into_iter().enumerate() {
        memory.write(entry + 4 * n as u64, &(value as u32).to_le_bytes()).unwrap();
    }
    let mut map = Vec::new();
    for (base, len, kind) in [(0u64, 0x9_fc00u64, 1u32), (0x10_0000, ram - 0x10_0000, 1)] {
        map.extend(20u32.to_le_bytes());
        map.extend(base.to_le_bytes());
        map.extend(len.to_le_bytes());
        map.extend(kind.to_le_bytes());
    }
    memory.write(MEMORY_MAP, &map).unwrap();
    let fields = [
        (0, 1 | 4 | 8 | 64),
        (4, 639),
        (8, ((ram >> 10) - 1024) as u32),
        (16, free as u32),
        (20, 1),
        (24, entry as u32),
        (44, map.len() as u32),
        (48, MEMORY_MAP as u32),
    ];
    for (at, value) in fields {
        memory.write(MULTIBOOT_INFO + at, &value.to_le_bytes()).unwrap();
    }
}

fn main() -> ExitCode {
    let Some(a) = arguments() else {
        eprintln!("usage: kvm_unit_test FILE.flat [--smp N] [--memory MIB] [--append ARGS] [--env KEY=VALUE]… [--seconds N]");
        return ExitCode::from(2);
    };
    let elf = std::fs::read(&a.file).unwrap_or_else(|e| panic!("{}: {e}", a.file));
    let memory = Arc::new(GuestMemory::new(&[RegionLayout { gpa: 0, size: a.memory_mib << 20 }]).unwrap());
    let (bus, control) = (Arc::new(Bus::default()), Arc::new(Control::default()));
    let clock = Arc::new(Clock::new(2_000_000, 0));
    let ioapic = Arc::new(Ioapic::default());
    let mut engine = SoftwareEngine::new(EngineConfig {
        memory: memory.clone(),
        bus: bus.clone(),
        clock,
        control: control.clone(),
        vcpus: a.vcpus,
        phys_bits: 46,
        eoi: Some(ioapic.clone()),
    })
    .unwrap();
    let sink = engine.irq_sink();
    ioapic.connect(Arc::downgrade(&sink));
    let exit = Arc::new(Exit { control: control.clone(), code: AtomicU32::new(u32::MAX) });
    let cfg = FwCfg { vcpus: a.vcpus as u64, ram: a.memory_mib << 20, at: Mutex::new((0, 0)) };
    let pio: [(u64, u64, Arc<dyn Device>); 5] = [
        (0x3f8, 8, Arc::new(Uart)),
        (0xf4, 4, exit.clone()),
        (0x510, 2, Arc::new(cfg)),
        (0xe0, 8, Arc::new(Bytes(Mutex::new(vec![0; 8])))),
        (0x2000, 24, Arc::new(Lines(ioapic.clone()))),
    ];
    for (base, len, device) in pio {
        bus.insert(Space::Pio, base, len, device).unwrap();
    }
    bus.insert(Space::Mmio, IOAPIC_BASE, IOAPIC_SIZE, ioapic).unwrap();
    bus.insert(Space::Mmio, 0xff00_0000, 0x1_0000, Arc::new(Bytes(Mutex::new(vec![0; 0x1_0000])))).unwrap();

    let (entry, free) = load(&memory, &elf);
    multiboot(&memory, free, &a);
    let mut state = engine.state(0).unwrap();
    state.sregs.cr0 = 0x11;
    state.regs.rip = entry;
    state.regs.rax = 0x2bad_b002;
    state.regs.rbx = MULTIBOOT_INFO;
    let s = &mut state.sregs;
    for segment in [&mut s.cs, &mut s.ds, &mut s.es, &mut s.fs, &mut s.gs, &mut s.ss] {
        (segment.base, segment.limit, segment.g, segment.db, segment.selector) = (0, u32::MAX, 1, 1, 16);
    }
    s.cs.selector = 8;
    engine.set_state(0, &state).unwrap();

    let watch = control.clone();
    let seconds = a.seconds;
    std::thread::spawn(move || {
        std::thread::sleep(Duration::from_secs(seconds));
        watch.request_stop(Stop::Paused);
    });
    let stop = engine.run();
    let _ = std::io::stdout().flush();
    match stop {
        Stop::PowerOff => {
            let code = exit.code.load(Ordering::SeqCst);
            eprintln!("exit {code}");
            ExitCode::from(code.min(255) as u8)
        }
        other => {
            eprintln!("stopped: {other:?}");
            for n in 0..a.vcpus {
                let s = engine.state(n).unwrap();
                eprintln!("vCPU {n}: rip {:#x} rsp {:#x} rflags {:#x} {:?}", s.regs.rip, s.regs.rsp, s.regs.rflags, s.mp_state);
            }
            ExitCode::from(if matches!(other, Stop::Paused) { 124 } else { 125 })
        }
    }
}
