# As little as a machine can do while it lives, for timings: `UP`, a byte in each page of SIZE bytes at BASE, `READY`, and then a line
# `T` at each interrupt of the LAPIC's timer, every PERIOD ns. The other CPUs are started and stand. Parameters: CPUS, X2APIC,
# BASE, SIZE, PERIOD.
.set EARLY, 1
.include "long.inc"

.equ TIMER, 0x40

.section .text
.if CPUS > 1
other64:
    jmp stop
.endif

on_timer:
    push rax
    push rcx
    push rdx
    apic_eoi
    pop rdx
    pop rcx
    pop rax
    iretq

main64:
    mov eax, TIMER
    mov rdx, offset on_timer
    call set_gate
    mov eax, BASE
1:  inc byte ptr [rax]
    add eax, 4096
    cmp eax, BASE + SIZE
    jb 1b
.if CPUS > 1
    call start_cpus
.endif
    mov eax, 0xb
    apic_put APIC_DIVIDE
    mov eax, 0x20000 + TIMER
    apic_put APIC_LVT_TIMER
    mov eax, PERIOD
    apic_put APIC_INITIAL
    say "READY\n"
    sti
2:  hlt
    say "T\n"
    jmp 2b
