# Everything at once and for ever, for machines that are moved while they work: memory, registers, x87 and SSE, a disk, all kinds of
# timer and interrupts between processors. `READY`, then a line `T <round> <checksum>` each round; BAD and a halt on
# anything that is not what it was. Parameters: CPUS, X2APIC, BLOCKS (of 4 KiB on the disk), BASE and SIZE (of the memory
# that is worked on), PERIOD (of timers, in ns and TSC ticks).
# CPU i's timer: by deadline (i modulo 3 = 0), periodic (1), one-shot (2).
.include "long.inc"
.include "virtio.inc"
.include "block.inc"

.equ TIMER, 0x40
.equ PING, 0x41
.equ BUFFER, 0x800000
.equ PAGES, 0x900000            # one 4 KiB page for each CPU
.equ MARK, 0x0123456789abcdef

.section .bss
    .balign 64
fpu_in:     .skip 512
fpu_out:    .skip 512
ticks:      .skip 8 * CPUS      # timer interrupts by CPU
seen_ticks: .skip 8 * CPUS
asked:      .skip 8 * CPUS      # round that a CPU is asked to confirm
answered:   .skip 8 * CPUS
rounds:     .skip 8 * CPUS      # what each other CPU has done
wrong:      .skip 8             # number + 1 of a CPU that found something
saved_round: .skip 8
last_tsc:   .skip 8
sum:        .skip 8
written:    .skip 4 * BLOCKS    # round in which a block was written, 0: never

.section .text
on_timer:
    push rax
    push rbx
    push rcx
    push rdx
    apic_id
    mov ebx, eax
    inc qword ptr [ticks + rbx * 8]
    call arm
    apic_eoi
    pop rdx
    pop rcx
    pop rbx
    pop rax
    iretq

on_ping:
    push rax
    push rcx
    push rdx
    apic_id
    mov rcx, [asked + rax * 8]
    mov [answered + rax * 8], rcx
    apic_eoi
    pop rdx
    pop rcx
    pop rax
    iretq

# EAX = kind of timer of CPU EBX. Uses EDX.
kind:
    mov eax, ebx
1:  cmp eax, 3
    jb 2f
    sub eax, 3
    jmp 1b
2:  ret

# The next interrupt of CPU EBX's timer; a periodic one needs nothing. Uses RAX, RCX, RDX.
arm:
    call kind
    cmp eax, 1
    je 2f
    ja 1f
    rdtsc
    add eax, PERIOD
    adc edx, 0
    mov ecx, MSR_TSC_DEADLINE
    wrmsr
    ret
1:  mov eax, PERIOD
    apic_put APIC_INITIAL
2:  ret

# Starts CPU EBX's timer. Uses RAX, RCX, RDX.
start_timer:
    mov eax, 0xb
    apic_put APIC_DIVIDE
    call kind
    cmp eax, 1
    je 2f
    ja 1f
    mov eax, 0x40000 + TIMER
    apic_put APIC_LVT_TIMER
    mfence
    jmp arm
1:  mov eax, TIMER
    apic_put APIC_LVT_TIMER
    jmp arm
2:  mov eax, 0x20000 + TIMER
    apic_put APIC_LVT_TIMER
    mov eax, PERIOD
    apic_put APIC_INITIAL
    ret

# EAX = what doubleword ECX of something holds in round EDX.
.macro pattern
    imul eax, edx, 0x9e3779b1
    xor eax, ecx
    imul eax, eax, 0x85ebca6b
.endm

# Checks that ECX doublewords at RDI are those of round EDX - 1 (round 0: whatever they are) and makes them those of round EDX.
# The carry flag says that one was not. Uses RAX, RCX, RSI.
advance:
    lea esi, [rdx - 1]
    test esi, esi
    jz 3f
1:  dec ecx
    mov eax, esi
    imul eax, eax, 0x9e3779b1
    xor eax, ecx
    imul eax, eax, 0x85ebca6b
    cmp eax, [rdi + rcx * 4]
    jne 4f
    pattern
    mov [rdi + rcx * 4], eax
    test ecx, ecx
    jnz 1b
    clc
    ret
3:  dec ecx
    pattern
    mov [rdi + rcx * 4], eax
    test ecx, ecx
    jnz 3b
    clc
    ret
4:  stc
    ret

.if CPUS > 1
# The others: a page each, a round each time that an interrupt comes.
other64:
    mov r12d, ebx
    call start_timer
    sti
1:  inc qword ptr [rounds + r12 * 8]
    mov rdx, [rounds + r12 * 8]
    mov rdi, r12
    shl rdi, 12
    add rdi, PAGES
    mov ecx, 1024
    call advance
    jc 2f
    hlt
    jmp 1b
2:  lea eax, [r12 + 1]
    mov [wrong], rax
    jmp stop
.endif

main64:
    mov eax, TIMER
    mov rdx, offset on_timer
    call set_gate
    mov eax, PING
    mov rdx, offset on_ping
    call set_gate

    # x87 and SSE registers that nobody touches from here on.
    mov rax, cr4
    or eax, 0x600               # OSFXSR, OSXMMEXCPT
    mov cr4, rax
    fninit
    fxsave [fpu_in]
    mov byte ptr [fpu_in + 4], 0xff
    xor ebx, ebx
1:  mov rax, MARK
    imul rcx, rbx, 0x1357
    add rax, rcx
    mov rcx, 0x8000000000000000
    or rax, rcx
    mov edx, ebx
    shl edx, 4
    mov [fpu_in + 32 + rdx], rax
    lea eax, [rbx + 0x3fff]
    mov [fpu_in + 40 + rdx], rax
    inc ebx
    cmp ebx, 8
    jb 1b
    xor ebx, ebx
2:  mov rax, MARK
    imul rcx, rbx, 0x2468ace
    xor rax, rcx
    mov [fpu_in + 160 + rbx * 8], rax
    inc ebx
    cmp ebx, 32
    jb 2b
    fxrstor [fpu_in]

    sti
    call start_block
    xor ebx, ebx
    call start_timer
.if CPUS > 1
    call start_cpus
.endif
    say "READY\n"
    mov dword ptr [sum], 0x811c9dc5
    xor r12d, r12d
    mov r15, MARK
    xor r13d, r13d
    mov r14, -1

again:
    inc r12
    mov rdx, r12
    mov edi, BASE
    mov ecx, SIZE / 4
    call advance
    jc bad_memory

    # One block is written, another one read and compared with what it was given last.
    call pick
    mov [written + rbx * 4], r12d
    mov rdx, r12
    xor ecx, ecx
1:  pattern
    mov [BUFFER + rcx * 4], eax
    inc ecx
    cmp ecx, 1024
    jb 1b
    shl ebx, 3
    mov eax, BLOCK_OUT
    mov ecx, 4096
    mov edx, BUFFER
    call block_request
    test eax, eax
    jnz bad_disk
    mov rax, r12
    shr eax, 1
    inc eax
    call pick_of
    mov ebp, [written + rbx * 4]
    test ebp, ebp
    jz 3f
    shl ebx, 3
    mov eax, BLOCK_IN
    mov ecx, 4096
    mov edx, BUFFER
    call block_request
    test eax, eax
    jnz bad_disk
    cmp ecx, 4097
    jne bad_disk
    mov edx, ebp
    xor ecx, ecx
2:  pattern
    cmp eax, [BUFFER + rcx * 4]
    jne bad_disk
    inc ecx
    cmp ecx, 1024
    jb 2b
3:  xor ebp, [sum]
    xor ebp, r12d
    imul ebp, ebp, 0x01000193
    mov [sum], ebp
    test r12d, 7
    jnz 4f
    mov eax, 4                  # flush
    xor ebx, ebx
    xor ecx, ecx
    call block_request
    test eax, eax
    jnz bad_disk

    # The others answer.
4:
.if CPUS > 1
    mov ebx, 1
5:  mov [asked + rbx * 8], r12
    mov eax, 0x4000 + PING
    apic_send
6:  pause
    cmp qword ptr [wrong], 0
    jne bad_other
    cmp [answered + rbx * 8], r12
    jne 6b
    inc ebx
    cmp ebx, CPUS
    jb 5b
.endif

    # This CPU's timer comes; each one's has come after 32 rounds.
    mov rax, [ticks]
7:  cli
    cmp rax, [ticks]
    jne 8f
    sti
    hlt
    jmp 7b
8:  sti
    test r12d, 31
    jnz 10f
    xor ebx, ebx
9:  mov rax, [ticks + rbx * 8]
    cmp rax, [seen_ticks + rbx * 8]
    je bad_timer
    mov [seen_ticks + rbx * 8], rax
    inc ebx
    cmp ebx, CPUS
    jb 9b

    # Registers, and time.
10: add r13, r15
    mov rax, r12
    imul rax, r15
    cmp rax, r13
    jne bad_register
    dec r14
    lea rax, [r12 + 1]
    not rax
    inc rax
    cmp rax, r14
    jne bad_register
    mov rax, [saved_round]
    inc rax
    mov [saved_round], rax
    cmp rax, r12
    jne bad_register
    fxsave [fpu_out]
    mov esi, offset fpu_in + 32
    mov edi, offset fpu_out + 32
    mov ecx, (416 - 32) / 8
    repe cmpsq
    jne bad_fpu
    read_tsc
    cmp rax, [last_tsc]
    jbe bad_time
    mov [last_tsc], rax

    say "T "
    mov eax, r12d
    call say_dec
    say " "
    mov eax, [sum]
    call say_hex
    say "\n"
    jmp again

# RBX = the block that is written in round R12, or in round EAX. Uses RAX, RDX.
pick:
    mov eax, r12d
pick_of:
    imul eax, eax, 7
    xor edx, edx
    mov ebx, BLOCKS
    div ebx
    mov ebx, edx
    ret

.macro complain what
    cli
    say "BAD \what in round "
    mov eax, r12d
    call say_dec
    say "\n"
    jmp stop
.endm
bad_memory:
    complain memory
bad_disk:
    complain disk
bad_other:
    complain "memory of another processor"
bad_timer:
    complain timer
bad_register:
    complain register
bad_fpu:
    complain "x87 or SSE register"
bad_time:
    complain time
