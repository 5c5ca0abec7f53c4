//! Alone in its process, because it looks at the resident size.

use memory::{GuestMemory, RegionLayout};

#[test]
fn a_large_machine_costs_nothing() {
    let resident = || -> u64 {
        let statm = std::fs::read_to_string("/proc/self/statm").unwrap();
        statm.split(' ').nth(1).unwrap().parse().unwrap()
    };
    let before = resident();
    let memory =
        GuestMemory::new(&[RegionLayout { gpa: 0, size: 3 << 30 }, RegionLayout { gpa: 4 << 30, size: 61 << 30 }]).unwrap();
    memory.write(5 << 30, b"x").unwrap();
    // Its page flags alone would be 4096 pages.
    assert!(resident() < before + 256, "{before} -> {}", resident());
}
