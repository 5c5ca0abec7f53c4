"""Side-by-side timings against QEMU's TCG on the same machine in the same run. Ratios count; absolute times do not travel."""
