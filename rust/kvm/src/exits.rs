//! What a vCPU thread does when the guest needs us.

use kvm_bindings::{
    KVM_EXIT_FAIL_ENTRY, KVM_EXIT_INTERNAL_ERROR, KVM_EXIT_INTR, KVM_EXIT_IO, KVM_EXIT_IO_OUT, KVM_EXIT_IOAPIC_EOI,
    KVM_EXIT_IRQ_WINDOW_OPEN, KVM_EXIT_MMIO, KVM_EXIT_SHUTDOWN, KVM_INTERNAL_ERROR_EMULATION, kvm_run,
};
use kvm_ioctls::VcpuFd;
use memory::GuestMemory;
use vcpu::{Bus, EngineError, EoiListener, Space, Stop};

/// What the exits of all vCPUs work on.
pub(crate) struct Outside<'a> {
    pub bus: &'a Bus,
    pub memory: &'a GuestMemory,
    pub eoi: Option<&'a dyn EoiListener>,
}

/// Serves the exit that the vCPU's run area describes. `Err`: the machine stops.
pub(crate) fn serve(fd: &mut VcpuFd, number: usize, out: &Outside) -> Result<(), Stop> {
    let run = fd.get_kvm_run();
    match run.exit_reason {
        KVM_EXIT_IO => port(run, out.bus),
        KVM_EXIT_MMIO => {
            // SAFETY: the exit reason says that this member of the union was written.
            let mmio = unsafe { &mut run.__bindgen_anon_1.mmio };
            let len = (mmio.len as usize).min(mmio.data.len());
            let data = &mut mmio.data[..len];
            if mmio.is_write != 0 {
                out.bus.write(Space::Mmio, mmio.phys_addr, data);
            } else {
                out.bus.read(Space::Mmio, mmio.phys_addr, data);
            }
        }
        KVM_EXIT_IOAPIC_EOI => {
            // SAFETY: as above.
            let vector = unsafe { run.__bindgen_anon_1.eoi.vector };
            if let Some(eoi) = out.eoi {
                eoi.eoi(vector);
            }
        }
        KVM_EXIT_INTR | KVM_EXIT_IRQ_WINDOW_OPEN => {}
        KVM_EXIT_SHUTDOWN => return Err(Stop::Reset),
        KVM_EXIT_INTERNAL_ERROR => {
            // SAFETY: as above.
            let internal = unsafe { run.__bindgen_anon_1.internal };
            return Err(Stop::Failed(if internal.suberror == KVM_INTERNAL_ERROR_EMULATION {
                unsupported(fd, number, out.memory, (internal.ndata, &internal.data))
            } else {
                let what = format!("vCPU {number}: internal error {}", internal.suberror);
                EngineError::new("host", format!("KVM cannot go on: {what}; try --engine software"))
            }));
        }
        KVM_EXIT_FAIL_ENTRY => {
            // SAFETY: as above.
            let reason = unsafe { run.__bindgen_anon_1.fail_entry.hardware_entry_failure_reason };
            let what = format!("vCPU {number}: the processor refuses its state, reason {reason:#x}");
            return Err(Stop::Failed(EngineError::new("host", format!("KVM cannot go on: {what}; try --engine software"))));
        }
        other => {
            let what = format!("vCPU {number}: exit reason {other} is not expected");
            return Err(Stop::Failed(EngineError::new("host", format!("KVM cannot go on: {what}; try --engine software"))));
        }
    }
    Ok(())
}

/// IN, OUT and their string forms: `count` accesses of `size` bytes at one port.
fn port(run: &mut kvm_run, bus: &Bus) {
    // SAFETY: the exit reason says that this member of the union was written.
    let io = unsafe { run.__bindgen_anon_1.io };
    let (size, count) = (usize::from(io.size), io.count as usize);
    if !matches!(size, 1 | 2 | 4) {
        return;
    }
    let start = std::ptr::from_mut(run).cast::<u8>();
    // SAFETY: KVM puts the data into the vCPU's run area, which is mapped with the pages behind the structure, and nothing
    // else uses these bytes until the next KVM_RUN.
    let data = unsafe { std::slice::from_raw_parts_mut(start.add(io.data_offset as usize), size * count) };
    for item in data.chunks_exact_mut(size) {
        if u32::from(io.direction) == KVM_EXIT_IO_OUT {
            bus.write(Space::Pio, io.port.into(), item);
        } else {
            bus.read(Space::Pio, io.port.into(), item);
        }
    }
}

/// An instruction that KVM's interpreter does not know.
fn unsupported(fd: &VcpuFd, number: usize, memory: &GuestMemory, (ndata, data): (u32, &[u64; 16])) -> EngineError {
    let rip = fd.get_regs().map_or(0, |r| r.rip);
    let given: Vec<u8> = data[1..3].iter().flat_map(|w| w.to_le_bytes()).collect();
    let size = usize::from(given[0]);
    let bytes = if ndata >= 3 && data[0] & 1 != 0 && (1..=15).contains(&size) {
        given[1..=size].to_vec()
    } else {
        let base = fd.get_sregs().map_or(0, |s| if s.efer & 1 << 10 != 0 && s.cs.l != 0 { 0 } else { s.cs.base });
        let mut found = Vec::new();
        for at in (0..15).map(|n| rip.wrapping_add(base).wrapping_add(n)) {
            let mut byte = [0];
            match fd.translate_gva(at) {
                Ok(t) if t.valid != 0 && memory.read(t.physical_address, &mut byte).is_ok() => found.push(byte[0]),
                _ => break,
            }
        }
        found
    };
    let hex: Vec<_> = bytes.iter().map(|b| format!("{b:02x}")).collect();
    let what = if hex.is_empty() { "(its bytes cannot be read)".into() } else { hex.join(" ") };
    EngineError::new(
        "unsupported-instruction",
        format!("vCPU {number} at {rip:#x}: this host's KVM cannot run the instruction {what}; use --engine software"),
    )
}
