# All CPUs: started by INIT/SIPI, each with its own timer interrupt, answering IPIs, checking its own page of memory.
# Parameters (--defsym): CPUS, X2APIC (0: registers by MMIO, 1: by MSR), DEADLINE (0: periodic timer, 1: TSC deadline),
# PERIOD (bus clocks or TSC ticks between timer interrupts), IRET (0: interrupts are left without that instruction).
.include "common.inc"

.equ LAPIC, 0xfee00000
.equ ID, 0x20
.equ EOI, 0xb0
.equ SVR, 0xf0
.equ ICR, 0x300
.equ LVT_TIMER, 0x320
.equ INITIAL_COUNT, 0x380
.equ DIVIDE, 0x3e0
.equ MSR_APIC_BASE, 0x1b
.equ MSR_X2APIC, 0x800
.equ MSR_TSC_DEADLINE, 0x6e0
.equ TIMER, 0x40
.equ PING, 0x41
.equ SPURIOUS, 0xff
.equ TRAMPOLINE, 0x8000
.equ PAGES, 0x200000            # one 4 KiB page for each CPU
.equ MAX_CPUS, 64

# EAX to a LAPIC register. Uses ECX, EDX.
.macro lapic_put register
.if X2APIC
    mov ecx, MSR_X2APIC + \register / 16
    xor edx, edx
    wrmsr
.else
    mov [LAPIC + \register], eax
.endif
.endm

# EAX = this CPU's APIC id. Uses ECX, EDX.
.macro lapic_id
.if X2APIC
    mov ecx, MSR_X2APIC + ID / 16
    rdmsr
.else
    mov eax, [LAPIC + ID]
    shr eax, 24
.endif
.endm

# Sends EAX to the CPU with APIC id EBX. Uses ECX, EDX.
.macro lapic_send
    mov edx, ebx
.if X2APIC
    mov ecx, MSR_X2APIC + ICR / 16
    wrmsr
.else
    shl edx, 24
    mov [LAPIC + ICR + 0x10], edx
    mov [LAPIC + ICR], eax
.endif
.endm

.section .bss
    .balign 16
idt:        .skip 256 * 8
online:     .skip 4             # CPUs other than the first that have arrived
wrong:      .skip 4             # what a CPU found wrong: its number + 1
round:      .skip 4
ticks:      .skip 4 * MAX_CPUS  # timer interrupts by CPU
seen_ticks: .skip 4 * MAX_CPUS  # the same as of the last check
asked:      .skip 4 * MAX_CPUS  # round that a CPU is asked to confirm
answered:   .skip 4 * MAX_CPUS
stacks:     .skip 1024 * MAX_CPUS

.section .data
idt_pointer:
    .word 256 * 8 - 1
    .long idt

.section .text
.code16
trampoline:
    cli
    xor ax, ax
    mov ds, ax
    lgdtd [TRAMPOLINE + trampoline_gdt - trampoline]
    mov eax, cr0
    or al, 1
    mov cr0, eax
    .byte 0x66, 0xea            # jmp far CODE32:other, 32-bit offset
    .long other
    .word CODE32
trampoline_gdt:
    .word gdt_end - gdt - 1
    .long gdt
trampoline_end:

.code32
# Vector EAX goes to EDX.
set_gate:
    mov word ptr [idt + eax * 8], dx
    mov word ptr [idt + eax * 8 + 2], CODE32
    mov word ptr [idt + eax * 8 + 4], 0x8e00
    shr edx, 16
    mov word ptr [idt + eax * 8 + 6], dx
    ret

# Everything a CPU does for itself: LAPIC on, timer running. Uses EAX, ECX, EDX.
start_lapic:
    lidt [idt_pointer]
.if X2APIC
    mov ecx, MSR_APIC_BASE
    rdmsr
    or eax, 0xc00
    wrmsr
.endif
    mov eax, 0x100 + SPURIOUS
    lapic_put SVR
.if DEADLINE
    mov eax, 0x40000 + TIMER
    lapic_put LVT_TIMER
    mfence
    call arm
.else
    mov eax, 0xb                # divide by 1
    lapic_put DIVIDE
    mov eax, 0x20000 + TIMER
    lapic_put LVT_TIMER
    mov eax, PERIOD
    lapic_put INITIAL_COUNT
.endif
    ret

.if DEADLINE
arm:
    rdtsc
    add eax, PERIOD
    adc edx, 0
    mov ecx, MSR_TSC_DEADLINE
    wrmsr
    ret
.endif

# Back from an interrupt's handler that began with PUSHAD.
.macro leave_interrupt
.if IRET
    popad
    iretd
.else
    # EIP, CS and EFLAGS lie behind the eight registers. Interrupts stay off until the one shadow of STI is over.
    mov eax, [esp + 32]
    mov edx, [esp + 40]
    and edx, ~0x200
    mov [esp + 36], edx
    mov [esp + 40], eax
    popad
    lea esp, [esp + 4]
    popfd
    sti
    ret
.endif
.endm

on_timer:
    pushad
    lapic_id
    inc dword ptr [ticks + eax * 4]
.if DEADLINE
    call arm
.endif
    xor eax, eax
    lapic_put EOI
    leave_interrupt

on_ping:
    pushad
    lapic_id
    mov edx, [asked + eax * 4]
    mov [answered + eax * 4], edx
    xor eax, eax
    lapic_put EOI
    leave_interrupt

on_spurious:
    pushad
    leave_interrupt

# Vector is pushed by the stubs.
on_exception:
    print "BAD exception "
    pop eax
    call put_dec
    print " at "
    mov eax, [esp]
    call put_hex
    mov eax, [esp + 4]
    print " "
    call put_hex
    print "\n"
    jmp halt

.set vector, 0
exceptions:
.rept 32
    .balign 8
    .byte 0x6a, vector          # push
    jmp on_exception
    .set vector, vector + 1
.endr

# The other CPUs.
other:
    mov eax, DATA
    mov ds, eax
    mov es, eax
    mov ss, eax
.if X2APIC
    mov ecx, MSR_APIC_BASE
    rdmsr
    or eax, 0xc00
    wrmsr
.endif
    lapic_id
    mov ebx, eax
    shl eax, 10
    lea esp, [stacks + 1024 + eax]
    call start_lapic
    mov edi, ebx
    shl edi, 12
    add edi, PAGES
    xor ebp, ebp
    lock inc dword ptr [online]
    sti
1:  mov ecx, 1024
    mov esi, edi
2:  lea eax, [esi + ebp]
    test ebp, ebp               # the page is zero at first
    jz 3f
    cmp [esi], eax
    jne 4f
3:  inc eax
    mov [esi], eax
    add esi, 4
    dec ecx
    jnz 2b
    inc ebp
    hlt
    jmp 1b
4:  lea eax, [ebx + 1]
    mov [wrong], eax
    jmp halt

main:
    mov al, 0xff                # a machine with legacy interrupt controllers: none of theirs
    out 0x21, al
    out 0xa1, al
    xor ebx, ebx
1:  mov eax, ebx
    lea edx, [exceptions + ebx * 8]
    call set_gate
    inc ebx
    cmp ebx, 32
    jb 1b
    mov eax, TIMER
    mov edx, offset on_timer
    call set_gate
    mov eax, PING
    mov edx, offset on_ping
    call set_gate
    mov eax, SPURIOUS
    mov edx, offset on_spurious
    call set_gate
    mov edi, PAGES
    mov ecx, 1024 * MAX_CPUS
    xor eax, eax
    rep stosd
    mov esi, offset trampoline
    mov edi, TRAMPOLINE
    mov ecx, offset trampoline_end - trampoline
    rep movsb
    call start_lapic
    print "READY\n"
    sti

.if CPUS > 1
    xor ebx, ebx
    mov eax, 0xc4500            # INIT, all but this one
    lapic_send
    mov eax, [ticks]
1:  cmp eax, [ticks]
    je 1b
    mov eax, 0xc4600 + TRAMPOLINE / 4096
    lapic_send
1:  pause
    cmp dword ptr [online], CPUS - 1
    jb 1b
.endif
    print "CPUS "
    mov eax, [online]
    inc eax
    call put_dec
    print "\n"

again:
    inc dword ptr [round]
    mov ebx, 1
1:  cmp ebx, CPUS
    jae 3f
    mov eax, [round]
    mov [asked + ebx * 4], eax
    mov eax, 0x4000 + PING
    lapic_send
2:  pause
    cmp dword ptr [wrong], 0
    jne bad_memory
    mov eax, [answered + ebx * 4]
    cmp eax, [round]
    jne 2b
    inc ebx
    jmp 1b

3:  mov eax, [ticks]
4:  cli
    cmp eax, [ticks]
    jne 5f
    sti
    hlt
    jmp 4b
5:  sti
    print "T "
    mov eax, [round]
    call put_dec
    print "\n"

    # Every 64 rounds (as many timer interrupts here at least) the others' timers must have gone on as well.
    test dword ptr [round], 63
    jnz again
    xor ebx, ebx
6:  mov eax, [ticks + ebx * 4]
    cmp eax, [seen_ticks + ebx * 4]
    je bad_timer
    mov [seen_ticks + ebx * 4], eax
    inc ebx
    cmp ebx, CPUS
    jb 6b
    jmp again

bad_memory:
    cli
    print "BAD memory of cpu "
    mov eax, [wrong]
    dec eax
    call put_dec
    print "\n"
    jmp halt

bad_timer:
    cli
    print "BAD timer of cpu "
    mov eax, ebx
    call put_dec
    print "\n"
    jmp halt
