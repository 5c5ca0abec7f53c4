# An entropy device, asked for 64 bytes again and again; prints a checksum of each answer. It never ends.
# Parameters: X2APIC.
.set CPUS, 1
.include "long.inc"
.include "virtio.inc"

.equ RNG_BAR, 0xc4200000
.equ RNG_VECTOR, 0x53
.equ VIRTIO_RNG, 0x10441af4
.equ WANTED, 64
.equ BUFFER, 0x800000

.section .bss
    .balign 4096
rng_ring:   .skip 4096
rng:        .skip DEV_SIZE
    .balign 8
rng_irqs:   .skip 8

.section .text
on_rng:
    push rax
    push rcx
    push rdx
    inc qword ptr [rng_irqs]
    apic_eoi
    pop rdx
    pop rcx
    pop rax
    iretq

main64:
    say "READY\n"
    sti
    mov eax, RNG_VECTOR
    mov rdx, offset on_rng
    call set_gate
    mov edi, offset rng
    mov esi, VIRTIO_RNG
    mov ebp, RNG_BAR
    call open_device
    xor eax, eax
    call start_device
    xor eax, eax
    mov esi, offset rng_ring
    mov ecx, RNG_VECTOR
    xor edx, edx
    call start_queue
    call finish_device
    xor r12d, r12d
1:  mov esi, offset rng_ring
    mov ebx, BUFFER
    mov ecx, WANTED
    describe 0, rbx, ecx, DESC_WRITE, 0
    xor eax, eax
    call offer
    inc r12d
2:  cli
    cmp [rng_irqs], r12
    jae 3f
    sti
    hlt
    jmp 2b
3:  sti
    ja bad
    call take_used
    jc bad
    cmp ecx, WANTED
    jne bad
    mov esi, BUFFER
    mov eax, 0x811c9dc5
    call checksum
    mov r14d, eax
    say "E "
    mov eax, r14d
    call say_hex
    say "\n"
    jmp 1b

bad:
    say "BAD entropy\n"
    jmp stop
