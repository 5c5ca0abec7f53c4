# Page tables of the guest's own, in 64-bit mode: faults of every cause are answered by their handler, pages are remapped, and user
# code runs behind the same tables. Each part prints its name once it is right; BAD and a halt otherwise; at the end the
# machine is switched off. Parameters: X2APIC.
.set CPUS, 1
.include "long.inc"

.equ HERE, 0x8000000000         # the second entry of the top level: nothing is mapped there at first
.equ P, 1
.equ W, 2
.equ U, 4
.equ A, 0x20
.equ D, 0x40
.equ FRAME_1, 0x600000
.equ FRAME_2, 0x601000
.equ FRAME_3, 0x602000
.equ USER_CODE_SELECTOR, 0x33
.equ USER_DATA_SELECTOR, 0x2b
.equ TSS_SELECTOR, 0x38

.section .bss
    .balign 4096
my_pdpt:    .skip 4096
my_pd:      .skip 4096
my_pt:      .skip 4096
my_pml4:    .skip 4096
kernel_stack: .skip 4096
kernel_stack_top:
    .balign 8
faults:     .skip 8
fault_code: .skip 8
fault_at:   .skip 8
fix_entry:  .skip 8             # page-table entry that the handler writes, and with what
fix_value:  .skip 8
resume_at:  .skip 8             # where the handler goes on instead of trying again, if not zero

.section .data
    .balign 8
my_gdt:
    .quad 0
    .quad 0x00cf9b000000ffff    # CODE32
    .quad 0x00cf93000000ffff    # DATA
    .quad 0x00af9b000000ffff    # CODE64
    .quad 0
    .quad 0x00cff3000000ffff    # 0x28: user data
    .quad 0x00affb000000ffff    # 0x30: user code, 64 bit
tss_entry:
    .quad 0x0000890000000067    # 0x38: TSS, its base filled in
    .quad 0
my_gdt_end:
my_gdt_pointer:
    .word my_gdt_end - my_gdt - 1
    .quad my_gdt
    .balign 8
tss:
    .long 0
    .quad kernel_stack_top      # RSP0
    .skip 92

.section .text
on_fault:
    push rax
    mov rax, [rsp + 8]
    mov [fault_code], rax
    mov rax, cr2
    mov [fault_at], rax
    inc qword ptr [faults]
    mov rax, [fix_entry]
    test rax, rax
    jz 1f
    push rcx
    mov rcx, [fix_value]
    mov [rax], rcx
    pop rcx
    mov rax, cr2
    invlpg [rax]
1:  mov rax, [resume_at]
    test rax, rax
    jz 2f
    mov [rsp + 16], rax
2:  pop rax
    add rsp, 8
    iretq

# The next fault is answered by this entry of `my_pt`.
.macro fix number, value
    mov qword ptr [faults], 0
    mov qword ptr [fix_entry], offset my_pt + 8 * \number
    mov rax, \value
    mov [fix_value], rax
.endm

# That there was one fault, of this cause, at this address.
.macro faulted code, address
    cmp qword ptr [faults], 1
    jne bad
    cmp qword ptr [fault_code], \code
    jne bad
    mov rax, \address
    cmp [fault_at], rax
    jne bad
.endm

main64:
    say "READY\n"
    lgdt [my_gdt_pointer]
    mov rax, offset tss
    mov rcx, rax
    and eax, 0xffffff
    shl rax, 16
    or [tss_entry], rax
    shr rcx, 24
    shl rcx, 56
    or [tss_entry], rcx
    mov eax, TSS_SELECTOR
    ltr ax
    mov eax, 14
    mov rdx, offset on_fault
    call set_gate
    mov dword ptr [FRAME_1], 0x11111111
    mov dword ptr [FRAME_1 + 0xff8], 0x1111ffff
    mov dword ptr [FRAME_2], 0x22222222
    mov dword ptr [FRAME_3], 0xc3   # ret
    mov dword ptr [my_pdpt], offset my_pd + 7
    mov dword ptr [my_pd], offset my_pt + 7
    mov dword ptr [pml4 + 8], offset my_pdpt + 7
    mov rdi, HERE

    # Not present, read: mapped by the handler, and the accessed bit is set.
    fix 0, FRAME_1+P
    mov eax, [rdi + 0xff8]
    cmp eax, 0x1111ffff
    jne bad
    faulted 0, HERE+0xff8
    test dword ptr [my_pt], A
    jz bad
    test dword ptr [my_pt], D
    jnz bad
    say "not present\n"

    # Read-only, written: made writable, and the dirty bit is set.
    fix 0, FRAME_1+P+W
    mov dword ptr [rdi + 8], 0x1234
    faulted 3, HERE+8
    cmp dword ptr [FRAME_1 + 8], 0x1234
    jne bad
    test dword ptr [my_pt], D
    jz bad
    say "read-only\n"

    # Not present, written.
    fix 1, FRAME_2+P+W
    add dword ptr [rdi + 4096], 1
    mov rcx, 0x1000 + HERE
    mov rax, [fault_code]
    cmp [fault_at], rcx
    jne bad
    cmp dword ptr [FRAME_2], 0x22222223
    jne bad
    say "written\n"

    # The same page on another frame, after INVLPG; then back, after CR3 is written.
    mov qword ptr [my_pt], FRAME_2 + P + W
    invlpg [rdi]
    cmp dword ptr [rdi], 0x22222223
    jne bad
    mov qword ptr [my_pt], FRAME_1 + P + W
    mov rax, cr3
    mov cr3, rax
    cmp dword ptr [rdi], 0x11111111
    jne bad
    mov qword ptr [my_pt], 0
    invlpg [rdi]
    fix 0, FRAME_2+P+W
    cmp dword ptr [rdi], 0x22222223
    jne bad
    faulted 0, HERE
    say "remapped\n"

    # Another top level: there the same address is something else.
    mov rax, [pml4]
    mov [my_pml4], rax
    mov rax, [my_pt]
    mov rsi, HERE
    mov rax, offset my_pml4
    mov cr3, rax
    mov qword ptr [faults], 0
    mov qword ptr [fix_entry], offset my_pml4 + 8
    mov qword ptr [fix_value], offset my_pdpt + 7
    cmp dword ptr [rsi], 0x22222223
    jne bad
    faulted 0, HERE
    mov rax, offset pml4
    mov cr3, rax
    say "another space\n"

    # An entry with a reserved bit.
    mov rax, 0x0008000000000000 + FRAME_1 + P
    mov [my_pt + 16], rax
    fix 2, FRAME_1+P
    cmp dword ptr [rdi + 2 * 4096], 0x11111111
    jne bad
    faulted 9, HERE+2*4096
    say "reserved\n"

    # No execution.
    mov rax, 0x8000000000000000 + FRAME_3 + P
    mov [my_pt + 24], rax
    fix 3, FRAME_3+P
    lea rax, [rdi + 3 * 4096]
    call rax
    faulted 0x11, HERE+3*4096
    say "no execution\n"

    # A large page, split into small ones of other frames.
    mov qword ptr [my_pd + 8], 0x600000 + 0x80 + P + W
    lea rsi, [rdi + 0x200000]
    cmp dword ptr [rsi + 0x1000], 0x22222223
    jne bad
    mov qword ptr [my_pd + 8], offset my_pt + 7
    invlpg [rsi]
    invlpg [rsi + 0x1000]
    cmp dword ptr [rsi + 0x2000], 0x11111111
    jne bad
    say "split\n"

    # User code: its page, its fault, and back by an exception.
    mov esi, offset user_code
    mov edi, FRAME_3
    mov ecx, offset user_code_end - user_code
    rep movsb
    mov rdi, HERE
    mov qword ptr [my_pt + 3 * 8], FRAME_3 + P + U
    mov qword ptr [my_pt + 4 * 8], FRAME_2 + P + W + U
    mov qword ptr [my_pt + 5 * 8], FRAME_1 + P + W
    mov rax, cr3
    mov cr3, rax
    mov eax, 6                  # #UD: how it comes back
    mov rdx, offset on_call
    call set_gate
    fix 5, FRAME_1+P+W+U
    lea rax, [rdi + 4 * 4096]
    lea rcx, [rdi + 3 * 4096]
    push USER_DATA_SELECTOR
    add rax, 4096
    push rax
    push 2
    push USER_CODE_SELECTOR
    push rcx
    iretq
on_call:
    cmp qword ptr [rsp + 8], USER_CODE_SELECTOR
    jne bad
    mov rsp, offset stack_top
    cmp rax, 77
    jne bad
    faulted 5, HERE+5*4096
    cmp rbx, 0x11111111
    jne bad
    say "user\n"
    say "DONE\n"
    jmp power_off

# Runs at HERE + 3 pages: reads the page after next.
user_code:
    mov ebx, [rip + user_code + 2 * 4096]
    push rbx
    pop rbx
    mov eax, 77
    ud2
user_code_end:

bad:
    say "BAD fault "
    mov rax, [fault_code]
    call say_hex
    say " at "
    mov rax, [fault_at]
    call say_hex
    say " count "
    mov rax, [faults]
    call say_dec
    say "\n"
    jmp stop
