//! RFLAGS: the lazy form of the arithmetic flags and what "undefined" means here.
//!
//! `lf_res` holds the last result sign-extended to 64 bits; `lf_aux` the carries: bit 63 the carry out of the top bit, bit 62
//! the carry into it, bit 3 the carry out of bit 3. Bits 8–15 (parity) and 16 (sign) correct what `lf_res` says, so that any
//! of the 64 combinations can be stored (POPF, SAHF, ZF with SF). All other bits of `lf_aux` are without meaning.
//!
//! Undefined flags are what AMD Zen does (the profile's vendor), measured with the differential runner; each handler says what.

use crate::state::Cpu;
use crate::state::flags::*;

/// Meaningless bits of a raw carry vector that must be cleared before it becomes `lf_aux`.
pub const AUX_KEEP: u64 = !0x1ff00;
const TOP: u32 = 63;

impl Cpu {
    #[inline(always)]
    pub fn cf(&self) -> bool {
        self.lf_aux >> TOP != 0
    }
    #[inline(always)]
    pub fn of(&self) -> bool {
        (self.lf_aux ^ self.lf_aux << 1) >> TOP != 0
    }
    #[inline(always)]
    pub fn zf(&self) -> bool {
        self.lf_res == 0
    }
    #[inline(always)]
    pub fn sf(&self) -> bool {
        (self.lf_res >> TOP ^ self.lf_aux >> 16) & 1 != 0
    }
    #[inline(always)]
    pub fn pf(&self) -> bool {
        ((self.lf_res ^ self.lf_aux >> 8) as u8).count_ones() & 1 == 0
    }
    #[inline(always)]
    pub fn af(&self) -> bool {
        self.lf_aux & 8 != 0
    }

    /// The six arithmetic flags as RFLAGS bits.
    pub fn arith(&self) -> u64 {
        u64::from(self.cf())
            | u64::from(self.pf()) << 2
            | u64::from(self.af()) << 4
            | u64::from(self.zf()) << 6
            | u64::from(self.sf()) << 7
            | u64::from(self.of()) << 11
    }

    /// Sets the six arithmetic flags from RFLAGS bits; others in `bits` are ignored.
    pub fn set_arith(&mut self, bits: u64) {
        let zero = bits & ZF != 0;
        let sign = bits & SF != 0;
        // A nonzero result of even parity and positive sign, or zero; the corrections do the rest.
        self.lf_res = if zero { 0 } else { 3 };
        let carry = bits & CF;
        let overflow = bits >> 11 & 1;
        self.lf_aux = carry << 63
            | (carry ^ overflow) << 62
            | (bits >> 4 & 1) << 3
            | u64::from(bits & PF == 0) << 8
            | u64::from(sign) << 16;
    }

    /// Replaces CF only.
    #[inline(always)]
    pub fn set_cf(&mut self, carry: bool) {
        let change = (self.lf_aux >> TOP) ^ u64::from(carry);
        self.lf_aux ^= change << 63 | change << 62;
    }

    /// Replaces CF and OF only.
    #[inline(always)]
    pub fn set_cf_of(&mut self, carry: bool, overflow: bool) {
        let carry = u64::from(carry);
        self.lf_aux = self.lf_aux & !(3 << 62) | carry << 63 | (carry ^ u64::from(overflow)) << 62;
    }

    /// Complete RFLAGS.
    pub fn rflags(&self) -> u64 {
        self.flags & !ARITH | FIXED | self.arith()
    }

    /// Sets all of RFLAGS as given (no privilege rules; reserved bits are the caller's matter, bit 1 is forced).
    pub fn set_rflags(&mut self, value: u64) {
        self.flags = value & !ARITH | FIXED;
        self.set_arith(value);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_combination_survives() {
        let mut cpu = Cpu::default();
        for i in 0..64u64 {
            let bits = i & 1 | (i >> 1 & 1) << 2 | (i >> 2 & 1) << 4 | (i >> 3 & 3) << 6 | (i >> 5) << 11;
            cpu.set_arith(bits);
            assert_eq!(cpu.arith(), bits, "{bits:#x}");
            for c in [false, true] {
                let mut other = cpu.clone();
                other.set_cf(c);
                assert_eq!(other.arith(), bits & !CF | u64::from(c));
                for o in [false, true] {
                    other.set_cf_of(c, o);
                    assert_eq!(other.arith(), bits & !(CF | OF) | u64::from(c) | u64::from(o) << 11);
                }
            }
        }
    }
}
