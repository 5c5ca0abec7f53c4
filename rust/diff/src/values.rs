//! Values at which arithmetic changes its mind.

use crate::rng::Rng;

/// A 64-bit integer: boundaries of every width, small numbers, random bits.
pub fn integer(rng: &mut Rng) -> u64 {
    match rng.below(10) {
        0 => rng.below(4),
        1 => u64::MAX.wrapping_sub(rng.below(4)),
        2 => {
            let width = rng.pick(&[7, 8, 15, 16, 31, 32, 63]);
            (1u64 << width).wrapping_add(rng.below(3)).wrapping_sub(1)
        }
        3 => (1u64 << rng.pick(&[7, 15, 31, 63])).wrapping_neg().wrapping_add(rng.below(3)).wrapping_sub(1),
        4 => rng.below(256),
        5 => 1 << rng.below(64),
        6 => rng.bits() >> rng.below(64),
        _ => rng.bits(),
    }
}

pub fn float32(rng: &mut Rng) -> u32 {
    let sign = (rng.bits() as u32 & 1) << 31;
    sign | match rng.below(16) {
        0 => 0,
        1 => 0x7f80_0000,
        2 => 0x7fc0_0000 | rng.bits() as u32 & 0x3f_ffff,
        3 => 0x7f80_0001 | rng.bits() as u32 & 0x3f_ffff,
        4 => rng.bits() as u32 & 0x7f_ffff,
        5 => 0x0080_0000 | rng.below(2) as u32,
        6 => 0x7f7f_ffff - rng.below(2) as u32,
        7 => (rng.below(300) as f32).to_bits(),
        8 => (integer(rng) as f32).to_bits(),
        9 => (rng.below(1000) as f32 + 0.5).to_bits(),
        10 => 0x3f80_0000 + rng.below(3) as u32 - 1,
        11 | 12 => (127 - 30 + rng.below(60) as u32) << 23 | rng.bits() as u32 & 0x7f_ffff,
        13 => (rng.below(30) as u32) << 23 | rng.bits() as u32 & 0x7f_ffff,
        14 => (225 + rng.below(30) as u32) << 23 | rng.bits() as u32 & 0x7f_ffff,
        _ => rng.bits() as u32 & 0x7fff_ffff,
    }
}

pub fn float64(rng: &mut Rng) -> u64 {
    let sign = rng.bits() << 63;
    let fraction = rng.bits() & 0xf_ffff_ffff_ffff;
    sign | match rng.below(16) {
        0 => 0,
        1 => 0x7ff0_0000_0000_0000,
        2 => 0x7ff8_0000_0000_0000 | fraction >> 1,
        3 => 0x7ff0_0000_0000_0001 | fraction >> 1,
        4 => fraction,
        5 => 0x0010_0000_0000_0000 | rng.below(2),
        6 => 0x7fef_ffff_ffff_ffff - rng.below(2),
        7 => (rng.below(300) as f64).to_bits(),
        8 => (integer(rng) as f64).to_bits(),
        9 => (rng.below(1000) as f64 + 0.5).to_bits(),
        10 => 0x3ff0_0000_0000_0000 + rng.below(3) - 1,
        // Around what a float32 can hold, for conversions.
        11 => (1023 - 150 + rng.below(30)) << 52 | fraction,
        12 => (1023 + 110 + rng.below(30)) << 52 | fraction & !0x1fff_ffff | rng.pick(&[0, 0x1000_0000, 0x1fff_ffff]),
        13 => rng.below(60) << 52 | fraction,
        14 => (1023 - 60 + rng.below(130)) << 52 | fraction,
        _ => rng.bits() & 0x7fff_ffff_ffff_ffff,
    }
}

/// An 80-bit float: (mantissa, sign and exponent), invalid encodings among them.
pub fn float80(rng: &mut Rng) -> (u64, u16) {
    const ONE: u64 = 1 << 63;
    let sign = (rng.bits() as u16 & 1) << 15;
    let (mantissa, exp) = match rng.below(20) {
        0 => (0, 0),
        1 => (ONE, 0x7fff),
        2 => (ONE | 1 << 62 | rng.bits() >> 2, 0x7fff),
        3 => (ONE | 1 | rng.bits() >> 2, 0x7fff),
        4 => (rng.bits() >> 1, 0),
        5 => (ONE | rng.bits(), 0),
        6 => (rng.bits() >> 1, 1 + rng.below(0x7ffe) as u16),
        7 => (rng.bits() >> 1, 0x7fff),
        8 => (ONE, 0x3fff),
        9 | 10 => normalised(rng.below(2000)),
        11 => normalised(integer(rng)),
        // Integers with a fraction, at each width that FIST knows.
        12 => (ONE | rng.bits(), 0x3fff + rng.pick(&[14, 15, 30, 31, 62, 63, 0, 1])),
        13 => (u64::MAX - rng.below(2), 0x3fff + rng.pick(&[14, 15, 30, 31, 62, 63, 0])),
        14 => (ONE | rng.bits(), 0x3fff - 70 + rng.below(140) as u16),
        // The edges of float32 and float64.
        15 => (ONE | rng.bits(), 0x3fff + rng.pick(&[128, 127, 1024, 1023])),
        16 => (ONE | rng.bits(), 0x3fff - rng.pick(&[126, 127, 149, 150, 1022, 1023, 1074, 1075])),
        17 => (ONE | rng.bits() >> 40 << 39, rng.below(0x7fff) as u16),
        18 => (ONE | rng.bits(), 1 + rng.below(70) as u16),
        _ => (ONE | rng.bits(), rng.below(0x7fff) as u16),
    };
    (mantissa, exp | sign)
}

fn normalised(v: u64) -> (u64, u16) {
    if v == 0 {
        return (0, 0);
    }
    let shift = v.leading_zeros();
    (v << shift, 0x3fff + 63 - shift as u16)
}

/// What kind of data a case works on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Style {
    Integer,
    Float32,
    Float64,
    Float80,
    Bcd,
    Text,
}

/// Eight bytes of `style`.
pub fn lane(rng: &mut Rng, style: Style) -> u64 {
    match style {
        Style::Integer => match rng.below(4) {
            0 => {
                // The same small pattern in every byte, word or doubleword: saturation and comparisons.
                let v = rng.pick(&[0u64, 0x7f, 0x80, 0xff, 1, 0x7fff, 0x8000, 0xffff, 0x7fff_ffff, 0x8000_0000]);
                let w = rng.pick(&[8u32, 16, 32, 64]);
                let v = if w < 64 { v & ((1 << w) - 1) } else { v };
                (0..64 / w).fold(0, |all, i| all | v << (i * w))
            }
            1 => (0..8).fold(0, |all, i| all | (integer(rng) & 0xff) << (i * 8)),
            _ => integer(rng),
        },
        Style::Float32 => u64::from(float32(rng)) | u64::from(float32(rng)) << 32,
        Style::Float64 => float64(rng),
        Style::Float80 => float80(rng).0,
        Style::Bcd => (0..16).fold(0, |all, i| all | rng.below(10) << (i * 4)),
        Style::Text => {
            (0..8).fold(0, |all, i| all | rng.pick(&[0, b'a', b'b', b'c', b'z', 0x80, 0xff].map(u64::from)) << (i * 8))
        }
    }
}
