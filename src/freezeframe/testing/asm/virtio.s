# A block device and a console, driven through their queues, with an MSI-X interrupt for every answer. It checks what it can and
# prints checksums for who knows what is on the disk and what was typed; at the end the machine is switched off.
# Parameters: X2APIC, BLOCKS (of 4 KiB on the disk), INPUT (bytes that are typed on the console).
.set CPUS, 1
.include "long.inc"
.include "virtio.inc"
.include "block.inc"

.equ CONSOLE_BAR, 0xc4100000
.equ INPUT_VECTOR, 0x51
.equ OUTPUT_VECTOR, 0x52
.equ CHUNK, 512                 # bytes of a console buffer
.equ BUFFERS, 8
.equ BUFFER, 0x800000           # 4 KiB of disk
.equ INPUT_BUFFERS, 0x810000
.equ OUTPUT_BUFFER, 0x820000
.equ LINES, 16                  # chunks of output

.section .bss
    .balign 4096
input_ring: .skip 4096
output_ring: .skip 4096
console:    .skip DEV_SIZE
    .balign 8
input_irqs: .skip 8
output_irqs: .skip 8

.section .text
.macro counts what, label
\label:
    push rax
    push rcx
    push rdx
    inc qword ptr [\what]
    apic_eoi
    pop rdx
    pop rcx
    pop rax
    iretq
.endm
    counts input_irqs, on_input
    counts output_irqs, on_output

# EAX = what doubleword ECX of the disk holds after it was written.
.macro pattern
    imul eax, ecx, 0x9e3779b1
    xor eax, 0x5bd1e995
.endm

main64:
    say "READY\n"
    sti
    call start_block
    say "SECTORS "
    mov rax, [block_sectors]
    call say_dec
    say "\n"

    # What is on the disk.
    mov r14d, 0x811c9dc5
    xor r12d, r12d
1:  mov eax, BLOCK_IN
    lea ebx, [r12 * 8]
    mov ecx, 4096
    mov edx, BUFFER
    call block_request
    test eax, eax
    jnz bad
    cmp ecx, 4097
    jne bad
    mov esi, BUFFER
    mov ecx, 4096
    mov eax, r14d
    call checksum
    mov r14d, eax
    inc r12d
    cmp r12d, BLOCKS
    jb 1b
    say "DISK "
    mov eax, r14d
    call say_hex
    say "\n"

    # All of it anew, and read again.
    xor r12d, r12d
2:  call fill
    mov eax, BLOCK_OUT
    lea ebx, [r12 * 8]
    mov ecx, 4096
    mov edx, BUFFER
    call block_request
    test eax, eax
    jnz bad
    cmp ecx, 1
    jne bad
    inc r12d
    cmp r12d, BLOCKS
    jb 2b
    mov eax, 4                  # flush
    xor ebx, ebx
    xor ecx, ecx
    call block_request
    test eax, eax
    jnz bad
    xor r12d, r12d
3:  mov eax, BLOCK_IN
    lea ebx, [r12 * 8]
    mov ecx, 4096
    mov edx, BUFFER
    call block_request
    test eax, eax
    jnz bad
    xor edi, edi
4:  mov ecx, r12d
    shl ecx, 10
    add ecx, edi
    pattern
    cmp eax, [BUFFER + rdi * 4]
    jne bad
    inc edi
    cmp edi, 1024
    jb 4b
    inc r12d
    cmp r12d, BLOCKS
    jb 3b
    say "WRITTEN\n"

    # Behind the end, and something that nobody knows.
    mov eax, BLOCK_IN
    mov rbx, [block_sectors]
    mov ecx, 512
    mov edx, BUFFER
    call block_request
    cmp eax, 1
    jne bad
    mov eax, 0x1234
    xor ebx, ebx
    mov ecx, 512
    mov edx, BUFFER
    call block_request
    cmp eax, 2
    jne bad
    say "REQUESTS "
    mov rax, [block_irqs]
    call say_dec
    say "\n"

    # The console: queue 0 brings input, queue 1 takes output.
    mov eax, INPUT_VECTOR
    mov rdx, offset on_input
    call set_gate
    mov eax, OUTPUT_VECTOR
    mov rdx, offset on_output
    call set_gate
    mov edi, offset console
    mov esi, VIRTIO_CONSOLE
    mov ebp, CONSOLE_BAR
    call open_device
    xor eax, eax
    call start_device
    xor eax, eax
    mov esi, offset input_ring
    mov ecx, INPUT_VECTOR
    xor edx, edx
    call start_queue
    mov eax, 1
    mov esi, offset output_ring
    mov ecx, OUTPUT_VECTOR
    xor edx, edx
    call start_queue
    call finish_device

    # Output: lines of one letter each.
    xor r12d, r12d
5:  mov edi, OUTPUT_BUFFER
    mov ecx, CHUNK - 1
    lea eax, [r12 + 'a']
    rep stosb
    mov byte ptr [rdi], 10
    mov esi, offset output_ring
    mov ebx, OUTPUT_BUFFER
    mov ecx, CHUNK
    describe 0, rbx, ecx, 0, 0
    xor eax, eax
    call offer
    inc r12d
6:  cli
    cmp [output_irqs], r12
    jae 7f
    sti
    hlt
    jmp 6b
7:  sti
    ja bad
    call take_used
    jc bad
    cmp r12d, LINES
    jb 5b
    say "PRINTED\n"

    # Input: all buffers are offered, each again once it was used.
    xor r12d, r12d
    mov esi, offset input_ring
8:  mov eax, r12d
    call give
    inc r12d
    cmp r12d, BUFFERS
    jb 8b
    say "TYPE\n"
    mov r14d, 0x811c9dc5
    xor r13d, r13d
9:  cli
    mov esi, offset input_ring
    call take_used
    jnc 10f
    sti
    hlt
    jmp 9b
10: sti
    mov r12d, eax
    mov ebx, ecx
    imul esi, eax, CHUNK
    add esi, INPUT_BUFFERS
    mov eax, r14d
    call checksum
    mov r14d, eax
    mov eax, r12d
    mov esi, offset input_ring
    add r13d, ebx
    call give
    cmp r13d, INPUT
    jb 9b
    cmp qword ptr [input_irqs], 0
    je bad
    say "INPUT "
    mov eax, r13d
    call say_dec
    say " "
    mov eax, r14d
    call say_hex
    say "\nDONE\n"
    jmp power_off

# Offers buffer EAX of the input queue (at RSI). Uses RAX, RBX, RCX.
give:
    imul ebx, eax, CHUNK
    add ebx, INPUT_BUFFERS
    mov ecx, eax
    shl ecx, 4
    mov [rsi + rcx], rbx
    mov dword ptr [rsi + rcx + 8], CHUNK
    mov dword ptr [rsi + rcx + 12], DESC_WRITE
    jmp offer

# The buffer as block R12 is to be. Uses RAX, RCX, RDI.
fill:
    xor edi, edi
1:  mov ecx, r12d
    shl ecx, 10
    add ecx, edi
    pattern
    mov [BUFFER + rdi * 4], eax
    inc edi
    cmp edi, 1024
    jb 1b
    ret

bad:
    say "BAD virtio: "
    call say_hex
    say " "
    mov eax, ecx
    call say_hex
    say " after "
    mov rax, [block_asked]
    call say_dec
    say " requests\n"
    jmp stop
