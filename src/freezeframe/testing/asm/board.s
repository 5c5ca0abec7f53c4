# A multiboot 1 image that looks at everything `freezeframe run --multiboot --test-devices` gives it, then counts ticks of
# the PIT, which come through the 8259s, and ends by isa-debug-exit. Parameter (--defsym): TICKS.
# The last character of the command line is the digit that it ends with.
.section .text
    .balign 4
    .long 0x1badb002, 3, -(0x1badb002 + 3)
.include "common.inc"

.equ VECTOR, 0x40
.equ PERIOD, 11932              # 100 Hz

.section .bss
    .balign 16
idt: .skip 8 * 256
ticks: .skip 4
status: .skip 4
value: .skip 8

.section .data
idt_pointer:
    .word 8 * 256 - 1
    .long idt

# Reads \count bytes of item \item of the firmware configuration to `value`.
.macro item item, count
    mov dx, 0x510
    mov ax, \item
    out dx, ax
    mov ecx, \count
    mov edi, offset value
    mov dx, 0x511
    rep insb
    mov eax, [value]
.endm

.section .text
main:
    print "FLAGS "
    mov eax, [ebx]
    call put_hex
    print "\nUPPER "
    mov eax, [ebx + 8]
    call put_dec
    print "\nCMDLINE "
    mov esi, [ebx + 16]
    call puts
1:  lodsb
    test al, al
    jnz 1b
    movzx eax, byte ptr [esi - 2]
    sub eax, '0'
    mov [status], eax
    print "\nMODULE "
    cmp dword ptr [ebx + 20], 0
    je 2f
    mov edx, [ebx + 24]
    mov esi, [edx]
    mov edx, [edx + 4]
3:  cmp esi, edx
    jae 2f
    lodsb
    call putc
    jmp 3b
2:  print "\nCPUS "
    item 5, 2
    call put_dec
    print "\nRAM "
    item 3, 8
    call put_hex

    print "\nLATCH "
    mov dx, 0xe0
    mov eax, 0x11223344
    out dx, eax
    mov dx, 0xe2
    mov al, 0xaa
    out dx, al
    mov dx, 0xe0
    in eax, dx
    call put_hex
    print "\nWINDOW "
    mov edi, 0xff000100
    mov dword ptr [edi], 0x55667788
    mov byte ptr [edi + 1], 0x99
    mov eax, [edi]
    call put_hex
    print "\n"

    # The timer's interrupt, and line 11 of pc-testdev.
    mov edi, VECTOR
    mov eax, offset timer
    call gate
    mov edi, VECTOR + 8 + 3
    mov eax, offset line
    call gate
    lidt [idt_pointer]
    mov al, 0x11
    out 0x20, al
    out 0xa0, al
    mov al, VECTOR
    out 0x21, al
    mov al, VECTOR + 8
    out 0xa1, al
    mov al, 4
    out 0x21, al
    mov al, 2
    out 0xa1, al
    mov al, 1
    out 0x21, al
    out 0xa1, al
    mov al, 0xfb                # the cascade alone
    out 0x21, al
    mov al, 0xf7                # line 11
    out 0xa1, al
    mov dx, 0x200b
    mov al, 1
    out dx, al
    mov al, 0
    out dx, al
    sti
    nop
    nop
    cli
    mov al, 0x34                # channel 0, low then high byte, mode 2
    out 0x43, al
    mov al, PERIOD & 0xff
    out 0x40, al
    mov al, PERIOD >> 8
    out 0x40, al
    mov al, 0xfa
    out 0x21, al

    xor ebp, ebp
4:  sti
    hlt
    cli
    cmp ebp, [ticks]
    je 4b
    inc ebp
    print "TICK "
    mov eax, ebp
    call put_dec
    print "\n"
    cmp ebp, TICKS
    jne 4b
    mov eax, [status]
    mov dx, 0xf4
    out dx, eax
    print "NOT REACHED\n"
    jmp halt

timer:
    push eax
    inc dword ptr [ticks]
    mov al, 0x20
    out 0x20, al
    pop eax
    iretd

line:
    push eax
    print "LINE 11\n"
    mov al, 0x20
    out 0xa0, al
    out 0x20, al
    pop eax
    iretd

# Interrupt gate EDI to the code at EAX.
gate:
    mov word ptr idt[edi * 8], ax
    mov word ptr idt[edi * 8 + 2], CODE32
    mov word ptr idt[edi * 8 + 4], 0x8e00
    shr eax, 16
    mov word ptr idt[edi * 8 + 6], ax
    ret
