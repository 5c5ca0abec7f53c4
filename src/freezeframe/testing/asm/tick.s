# Counts, and proves that memory and registers are what it left there. Parameters (--defsym): BASE, SIZE, SPIN.
.include "common.inc"

.section .bss
    .balign 16
saved_round: .skip 4

# EAX = what the doubleword at EDI holds in round EBP.
.macro pattern
    imul eax, ebp, 0x9e3779b1
    xor eax, edi
    imul eax, eax, 0x85ebca6b
.endm

.section .text
main:
    xor ebp, ebp
    mov edi, BASE
1:  pattern
    mov [edi], eax
    add edi, 4
    cmp edi, BASE + SIZE
    jb 1b
    print "READY\n"

round:
    mov ebx, ebp
    mov edi, BASE
2:  mov ebp, ebx
    pattern
    mov edx, eax
    cmp [edi], eax
    jne bad_memory
    inc ebp
    pattern
    mov [edi], eax
    add edi, 4
    cmp edi, BASE + SIZE
    jb 2b

    lea eax, [ebx + 1]
    cmp eax, ebp
    jne bad_register
    cmp ebx, [saved_round]
    jne bad_register
    mov [saved_round], ebp
    print "T "
    mov eax, ebp
    call put_dec
    print "\n"

    mov ecx, SPIN
    jecxz round
3:  dec ecx
    jnz 3b
    jmp round

bad_memory:
    print "BAD "
    mov eax, edi
    call put_hex
    print " is "
    mov eax, [edi]
    call put_hex
    print " wants "
    mov eax, edx
    call put_hex
    print "\n"
    jmp halt

bad_register:
    print "BAD register\n"
    jmp halt
