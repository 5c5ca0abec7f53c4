//! x87 and SSE: the FXSAVE image at the start of the XSAVE area.

use kvm_bindings::Xsave;
use kvm_ioctls::{Cap, VcpuFd, VmFd};
use vcpu::state::Fpu;

use crate::convert::{Checked, refuse, set};
use crate::failed;

/// 32-bit words of the part that every area has.
const WORDS: usize = 1024;

/// The XSAVE areas of a virtual machine's vCPUs. They are as large as this host's processor and KVM make them, whatever the
/// guest is shown: what is beyond x87 and SSE is in its initial state, because the CPU profile has none of it.
#[derive(Debug, Clone, Copy)]
pub(crate) struct XsaveArea {
    /// Words beyond the first [`WORDS`]; `None` where KVM knows but the fixed size.
    extra: Option<usize>,
}

impl XsaveArea {
    pub fn of(vm: &VmFd) -> Self {
        let bytes = usize::try_from(vm.check_extension_int(Cap::Xsave2)).unwrap_or(0);
        Self { extra: (bytes > 0).then(|| bytes.div_ceil(4).saturating_sub(WORDS)) }
    }

    fn empty(self) -> Checked<Xsave> {
        Xsave::new(self.extra.unwrap_or(0)).map_err(|e| failed("memory for an XSAVE area", format!("{e:?}")))
    }

    pub fn get(self, fd: &VcpuFd) -> Checked<Fpu> {
        if self.extra.is_none() {
            return Ok(save(&fd.get_xsave().map_err(|e| failed("KVM_GET_XSAVE", e))?.region));
        }
        let mut area = self.empty()?;
        // SAFETY: the area has the size that KVM_CAP_XSAVE2 asks for.
        unsafe { fd.get_xsave2(&mut area) }.map_err(|e| failed("KVM_GET_XSAVE2", e))?;
        Ok(save(&area.as_fam_struct_ref().xsave.region))
    }

    pub fn set(self, fd: &VcpuFd, fpu: &Fpu) -> Checked<()> {
        let mut area = self.empty()?;
        // SAFETY: only the fixed part is written, and the length stays.
        load(unsafe { &mut area.as_mut_fam_struct().xsave.region }, fpu)?;
        // SAFETY: as in `get`.
        set("fpu", unsafe { fd.set_xsave2(&area) })
    }
}

/// Reads `N` bytes at `at` of an area of 32-bit words.
fn bytes<const N: usize>(area: &[u32], at: usize) -> [u8; N] {
    std::array::from_fn(|i| (area[(at + i) / 4] >> ((at + i) % 4 * 8)) as u8)
}

fn put(area: &mut [u32], at: usize, data: &[u8]) {
    for (at, &byte) in (at..).zip(data) {
        let shift = at % 4 * 8;
        area[at / 4] = area[at / 4] & !(0xff << shift) | u32::from(byte) << shift;
    }
}

const XSTATE_BV: usize = 512;

fn save(a: &[u32; WORDS]) -> Fpu {
    let u16_at = |at| u16::from_le_bytes(bytes(a, at));
    let u64_at = |at| u64::from_le_bytes(bytes(a, at));
    Fpu {
        fpr: std::array::from_fn(|i| format!("{:04x}{:016x}", u16_at(32 + 16 * i + 8), u64_at(32 + 16 * i))),
        fcw: u16_at(0),
        fsw: u16_at(2),
        ftwx: bytes::<1>(a, 4)[0],
        last_opcode: u16_at(6),
        last_ip: u64_at(8),
        last_dp: u64_at(16),
        xmm: std::array::from_fn(|i| format!("{:032x}", u128::from_le_bytes(bytes(a, 160 + 16 * i)))),
        mxcsr: u32::from_le_bytes(bytes(a, 24)),
    }
}

fn hex(field: &str, text: &str, digits: usize) -> Checked<u128> {
    if text.len() != digits || !text.bytes().all(|b| b.is_ascii_digit() || (b'a'..=b'f').contains(&b)) {
        return refuse(field, format!("expected {digits} lower-case hexadecimal digits"));
    }
    u128::from_str_radix(text, 16).or_else(|e| refuse(field, e))
}

fn load(a: &mut [u32; WORDS], f: &Fpu) -> Checked<()> {
    put(a, 0, &f.fcw.to_le_bytes());
    put(a, 2, &f.fsw.to_le_bytes());
    put(a, 4, &[f.ftwx]);
    put(a, 6, &f.last_opcode.to_le_bytes());
    put(a, 8, &f.last_ip.to_le_bytes());
    put(a, 16, &f.last_dp.to_le_bytes());
    put(a, 24, &f.mxcsr.to_le_bytes());
    for (i, r) in f.fpr.iter().enumerate() {
        put(a, 32 + 16 * i, &hex(&format!("fpu.fpr[{i}]"), r, 20)?.to_le_bytes()[..10]);
    }
    for (i, r) in f.xmm.iter().enumerate() {
        put(a, 160 + 16 * i, &hex(&format!("fpu.xmm[{i}]"), r, 32)?.to_le_bytes());
    }
    // Both components are in the area: without these bits the processor would take their initial values.
    put(a, XSTATE_BV, &[3]);
    Ok(())
}
