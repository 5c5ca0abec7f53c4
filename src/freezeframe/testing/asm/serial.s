# The first serial port: its registers, and bytes that come by a level-triggered interrupt of the I/O APIC. BAD and a halt on what is
# wrong; at the end the machine is switched off. Parameters: X2APIC, INPUT (bytes that are typed each time).
.set CPUS, 1
.include "long.inc"

.equ SERIAL_VECTOR, 0x60
.equ IOAPIC, 0xfec00000
.equ PIN, 4
.equ LEVEL, 0x8000
.equ PIN_MASKED, 0x10000
.equ RX_TX, COM1
.equ IER, COM1 + 1
.equ IIR, COM1 + 2
.equ LCR, COM1 + 3
.equ MCR, COM1 + 4
.equ LSR, COM1 + 5
.equ SCRATCH, COM1 + 7

.section .bss
    .balign 8
interrupts: .skip 8
received:   .skip 8
sum:        .skip 8
empty:      .skip 8             # interrupts because the transmitter is empty

.section .text
.macro out8 port, value
    mov edx, \port
    mov al, \value
    out dx, al
.endm

.macro in8 port
    mov edx, \port
    in al, dx
.endm

.macro pin_put value
    mov edx, IOAPIC
    mov dword ptr [rdx], 0x10 + 2 * PIN
    mov dword ptr [rdx + 0x10], \value
.endm

on_serial:
    push rax
    push rcx
    push rdx
    inc qword ptr [interrupts]
1:  in8 IIR
    test al, 1
    jnz 4f
    and al, 0xe
    cmp al, 2
    je 3f
    cmp al, 4
    je 2f
    cmp al, 0xc
    jne 5f
2:  in8 RX_TX
    movzx eax, al
    xor eax, [sum]
    imul eax, eax, 0x01000193
    mov [sum], eax
    inc qword ptr [received]
    jmp 1b
3:  inc qword ptr [empty]
    out8 IER, 1
    jmp 1b
4:  apic_eoi
    pop rdx
    pop rcx
    pop rax
    iretq
5:  say "BAD cause\n"
    jmp stop

# Waits for all that is typed, and prints its checksum.
listen:
    mov qword ptr [received], 0
    mov dword ptr [sum], 0x811c9dc5
    say "TYPE\n"
1:  cli
    cmp qword ptr [received], INPUT
    jae 2f
    sti
    hlt
    jmp 1b
2:  sti
    say "INPUT "
    mov eax, [sum]
    call say_hex
    say "\n"
    ret

main64:
    say "READY\n"
    out8 SCRATCH, 0x5a
    in8 SCRATCH
    cmp al, 0x5a
    jne bad
    out8 MCR, 0x10              # loop back: what is sent is received
    out8 RX_TX, 0xa7
    in8 LSR
    test al, 1
    jz bad
    in8 RX_TX
    cmp al, 0xa7
    jne bad
    out8 MCR, 0xb
    out8 LCR, 0x83              # the divisor
    out8 RX_TX, 0x0c
    in8 RX_TX
    cmp al, 0x0c
    jne bad
    out8 LCR, 3
    say "registers\n"

    mov eax, SERIAL_VECTOR
    mov rdx, offset on_serial
    call set_gate
    mov edx, IOAPIC             # to the CPU with APIC id 0
    mov dword ptr [rdx], 0x11 + 2 * PIN
    mov dword ptr [rdx + 0x10], 0
    pin_put SERIAL_VECTOR+LEVEL
    out8 IIR, 1                 # FIFO on
    out8 IER, 1
    sti
    call listen
    cmp qword ptr [interrupts], 0
    je bad
    call listen

    # Masked at the I/O APIC: nothing comes; then the level is still there.
    pin_put SERIAL_VECTOR+LEVEL+PIN_MASKED
    mov rax, [interrupts]
    push rax
    mov qword ptr [received], 0
    mov dword ptr [sum], 0x811c9dc5
    say "MASKED\n"
1:  in8 LSR
    test al, 1
    jz 1b
    pop rax
    cmp [interrupts], rax
    jne bad
    pin_put SERIAL_VECTOR+LEVEL
2:  cli
    cmp qword ptr [received], 1
    jae 3f
    sti
    hlt
    jmp 2b
3:  sti
    say "level\n"

    # The transmitter's interrupt: at once, because it is empty.
    out8 IER, 3
4:  cli
    cmp qword ptr [empty], 1
    jae 5f
    sti
    hlt
    jmp 4b
5:  sti
    say "transmitter\nDONE\n"
    jmp power_off

bad:
    say "BAD\n"
    jmp stop
