# The LAPIC's timer in all its modes. Each part prints its name once it is right; BAD and a halt otherwise; at the end the
# machine is switched off. Parameters: X2APIC.
.set CPUS, 1
.include "long.inc"

.equ TIMER, 0x40
.equ DIVIDE_1, 0xb
.equ ONE_SHOT, 0
.equ PERIODIC, 0x20000
.equ DEADLINE, 0x40000
.equ MASKED, 0x10000
.equ MS, 1000000                # the bus runs at 1 GHz

.section .bss
    .balign 8
khz:        .skip 8             # TSC ticks a millisecond
fired:      .skip 8
fired_at:   .skip 8             # TSC of the last interrupt
began:      .skip 8

.section .text
on_timer:
    push rax
    push rcx
    push rdx
    read_tsc
    mov [fired_at], rax
    inc qword ptr [fired]
    apic_eoi
    pop rdx
    pop rcx
    pop rax
    iretq

# Halts until `fired` is at least RBX.
await:
    cli
    cmp [fired], rbx
    jae 1f
    sti
    hlt
    jmp await
1:  sti
    ret

# RAX = ticks from `began` to the last interrupt.
took:
    mov rax, [fired_at]
    sub rax, [began]
    ret

# Spins for RAX ticks with interrupts on.
spin:
    mov rbx, rax
    read_tsc
    add rbx, rax
1:  pause
    read_tsc
    cmp rax, rbx
    jb 1b
    ret

.macro start_timer mode, count
    mov qword ptr [fired], 0
    mov eax, \mode + TIMER
    apic_put APIC_LVT_TIMER
    mov eax, DIVIDE_1
    apic_put APIC_DIVIDE
    read_tsc
    mov [began], rax
    mov eax, \count
    apic_put APIC_INITIAL
.endm

.macro stop_timer
    xor eax, eax
    apic_put APIC_INITIAL
    mov eax, MASKED + TIMER
    apic_put APIC_LVT_TIMER
.endm

main64:
    mov eax, 0x40000010
    cpuid
    mov [khz], rax
    mov eax, TIMER
    mov rdx, offset on_timer
    call set_gate
    say "READY\n"

    # One shot: once, not before its time, and the count stays at zero.
    start_timer ONE_SHOT, 5*MS
    apic_get APIC_CURRENT
    test eax, eax
    jz bad
    cmp eax, 5 * MS
    ja bad
    mov ebx, 1
    call await
    call took
    imul rbx, [khz], 5
    cmp rax, rbx
    jb bad
    apic_get APIC_CURRENT
    test eax, eax
    jnz bad
    mov rax, [khz]
    shl rax, 3
    call spin
    cmp qword ptr [fired], 1
    jne bad
    say "one-shot\n"

    # Divided by 16: the same count lasts 16 times as long.
    mov qword ptr [fired], 0
    mov eax, 3
    apic_put APIC_DIVIDE
    read_tsc
    mov [began], rax
    mov eax, MS
    apic_put APIC_INITIAL
    mov ebx, 1
    call await
    call took
    mov rbx, [khz]
    shl rbx, 4
    cmp rax, rbx
    jb bad
    say "divided\n"

    # Periodic: ten of them take at least ten periods, and they go on.
    start_timer PERIODIC, 2*MS
    mov ebx, 10
    call await
    call took
    imul rbx, [khz], 19         # interrupts are on time each, so ten of 2 ms cannot be here before 19 ms
    cmp rax, rbx
    jb bad
    mov rbx, [fired]
    add rbx, 5
    call await
    say "periodic\n"

    # Masked: time goes on, no interrupt comes.
    mov eax, PERIODIC + MASKED + TIMER
    apic_put APIC_LVT_TIMER
    mov rax, [khz]
    call spin
    mov rcx, [fired]
    push rcx
    imul rax, [khz], 8
    call spin
    pop rcx
    cmp rcx, [fired]
    jne bad
    say "masked\n"
    stop_timer

    # By deadline: once, not before it, and the register is zero afterwards.
    mov qword ptr [fired], 0
    mov eax, DEADLINE + TIMER
    apic_put APIC_LVT_TIMER
    mfence
    imul rbp, [khz], 5
    read_tsc
    add rbp, rax
    call arm
    mov ecx, MSR_TSC_DEADLINE
    rdmsr
    shl rdx, 32
    or rax, rdx
    cmp qword ptr [fired], 0    # (a very busy host: it has passed already)
    jne 1f
    cmp rax, rbp
    jne bad
1:  mov ebx, 1
    call await
    cmp [fired_at], rbp
    jb bad
    mov ecx, MSR_TSC_DEADLINE
    rdmsr
    or eax, edx
    jnz bad
    say "deadline\n"

    # In the past: at once.
    mov qword ptr [fired], 0
    read_tsc
    mov rbp, rax
    sub rbp, [khz]
    call arm
    mov ebx, 1
    call await
    say "past deadline\n"

    # Zero takes a deadline back.
    mov qword ptr [fired], 0
    imul rbp, [khz], 20
    read_tsc
    add rbp, rax
    call arm
    xor ebp, ebp
    call arm
    imul rax, [khz], 30
    call spin
    cmp qword ptr [fired], 0
    jne bad
    say "no deadline\n"

    # A hundred in a row, one millisecond apart.
    read_tsc
    mov rbp, rax
    mov r12d, 100
2:  mov qword ptr [fired], 0
    add rbp, [khz]
    call arm
    mov ebx, 1
    call await
    cmp [fired_at], rbp
    jb bad
    dec r12d
    jnz 2b
    say "deadlines\nDONE\n"
    jmp power_off

# RBP becomes the deadline.
arm:
    mov rax, rbp
    mov rdx, rbp
    shr rdx, 32
    mov ecx, MSR_TSC_DEADLINE
    wrmsr
    ret

bad:
    say "BAD\n"
    jmp stop
