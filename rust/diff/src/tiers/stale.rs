//! Whether a case may differ because of old translations: after a change of page tables without a flush, or with tables that are no
//! tables, how long one lives depends on what else was looked up, as it does in silicon.

use x86::core::Core;

use super::case::Case;
use super::machine::{Side, Slices};
use super::{tables, world};
use crate::rng::Rng;

/// CR0.PG.
const PAGING: u64 = 1 << 31;
const ADDRESS: u64 = 0x000f_ffff_ffff_f000;

/// Whether guest memory holds page tables that did not come with a flush, or a vCPU uses other memory as its tables.
pub fn now(case: &Case, ram: &[u8], cores: &[Core]) -> bool {
    let foreign = |core: &Core| core.cpu.cr0 & PAGING != 0 && !tables::ROOTS.contains(&(core.cpu.cr3 & ADDRESS));
    cores.iter().any(foreign) || tables::spoiled(&case.ram, ram, &case.changes)
}

/// Whether that was so at any time of the first `most` instructions: an entry may have been changed and put back. `side` executes the
/// case again, one instruction at a time.
pub fn ever(case: &Case, side: &mut Side, most: u64) -> bool {
    let mut ram = vec![0; world::RAM];
    side.reset(&case.ram, &case.cpus, (case.interrupts, case.counted), Slices::Whole, Rng::new(0, 0));
    let mut left = most;
    for turn in &case.turns {
        for _ in 0..turn.length.min(left) {
            let early = side.run(turn.vcpu, 1).is_some();
            side.ram(&mut ram);
            if now(case, &ram, &side.cores) {
                return true;
            }
            if early {
                break;
            }
        }
        left -= turn.length.min(left);
        if left == 0 {
            break;
        }
        side.outside(turn);
    }
    false
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tiers::case::{self, Turn};
    use crate::tiers::program::Item;
    use crate::tiers::world::{CODE, Focus, Frame};

    const MARK: u64 = 1 << 52;

    /// A supervisor's program at [`CODE`]: the bytes, then NOPs.
    fn case(code: &[u8]) -> Case {
        let mut rng = Rng::new(1, 1);
        let frame = Frame { cpl: 0, base: 0, global: false, focus: Focus::None, vcpus: 1 };
        let mut ram = world::memory(&mut rng, frame);
        case::place(&mut ram, CODE, &[0x90; 64]);
        case::place(&mut ram, CODE, code);
        let mut cpu = world::registers(&mut rng, frame, 0);
        cpu.set_rflags(2);
        cpu.dr[7] = 0x400;
        cpu.rip = CODE;
        cpu.gpr[6] = MARK;
        Case {
            number: 0,
            frame,
            ram,
            cpus: vec![cpu],
            items: vec![Item::fixed(code, CODE)],
            turns: vec![Turn::quiet(4), Turn::quiet(4)],
            changes: Vec::new(),
            interrupts: false,
            counted: false,
            slices: [Slices::Whole; 2],
            threshold: 0,
            rng,
        }
    }

    /// What [`ever`] says, and [`now`] at the end.
    fn judged(code: &[u8]) -> (bool, bool) {
        let (case, mut side) = (case(code), Side::new());
        let ever = ever(&case, &mut side, 8);
        side.reset(&case.ram, &case.cpus, (false, false), Slices::Whole, Rng::new(0, 0));
        assert_eq!(side.run(0, 8), None);
        let mut ram = vec![0; world::RAM];
        side.ram(&mut ram);
        (ever, now(&case, &ram, &side.cores))
    }

    #[test]
    fn nothing_happens() {
        assert_eq!(judged(&[0x90]), (false, false));
    }

    #[test]
    fn an_entry_is_changed_and_put_back() {
        let xor = [0x48, 0x31, 0x34, 0x25, 0xb8, 0x40, 0, 0]; // xor [0x40b8], rsi
        assert_eq!(judged(&xor), (true, true));
        assert_eq!(judged(&[xor, xor].concat()), (true, false));
    }

    #[test]
    fn another_page_becomes_the_tables_for_a_while() {
        let to = |root: u32| [&[0xb8][..], &root.to_le_bytes(), &[0x0f, 0x22, 0xd8]].concat(); // mov eax, imm32; mov cr3, rax
        // A copy of the first root where the stack is, reached by the same code.
        let [root, ..] = tables::ROOTS;
        let copy = [0xf3, 0x48, 0xa5]; // rep movsq, of one page
        let setup = [&[0xbe][..], &(root as u32).to_le_bytes(), &[0xbf, 0, 0xa0, 1, 0, 0xb9, 0, 2, 0, 0], &copy].concat();
        let code = [setup, to(0x1_a000), to(root as u32)].concat();
        let mut case = case(&code);
        let length = 3 + 0x200 + 4;
        case.turns = vec![Turn::quiet(length)];
        assert!(ever(&case, &mut Side::new(), length));
        assert!(ever(&case, &mut Side::new(), length - 2));
        assert!(!ever(&case, &mut Side::new(), length - 3));
    }
}
