//! What a Linux boot executes decodes and has a function behind it.
#![cfg(all(target_arch = "x86_64", target_os = "linux"))]

use x86::decode;
use x86::insn::Handler;
use x86::state::CodeSize;

fn encodings() -> impl Iterator<Item = (&'static str, Vec<u8>)> {
    include_str!("data/linux-boot.txt").lines().filter(|l| !l.starts_with('#')).flat_map(|line| {
        let (code, rest) = line.split_once(' ').expect("a code and its encodings");
        rest.split(' ').map(move |hex| {
            let byte = |i| u8::from_str_radix(&hex[i..i + 2], 16).expect("hexadecimal");
            (code, (0..hex.len()).step_by(2).map(byte).collect())
        })
    })
}

#[test]
fn every_instruction_of_a_linux_boot_has_a_function() {
    let same = |a: Handler, b: Handler| std::ptr::fn_addr_eq(a, b);
    let mut lacking = std::collections::BTreeSet::new();
    let mut block = Vec::new();
    for (code, bytes) in encodings() {
        let decoded = decode::block(&bytes, CodeSize::Bits64, &mut block);
        assert_eq!(decoded, decode::Decoded::Block(bytes.len() as u32), "{code} {bytes:02x?}");
        let instr = iced_x86::Decoder::new(64, &bytes, iced_x86::DecoderOptions::NONE).decode();
        let invalid = same(block[0].f, decode::invalid) && !code.starts_with("Ud") && x86::exec::claimed(&instr);
        if same(block[0].f, decode::missing) || invalid {
            lacking.insert(code);
        }
    }
    assert!(lacking.is_empty(), "{lacking:?}");
}
