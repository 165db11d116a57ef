# What these kernels share, in 32-bit mode. ebp is the distance from where the image was linked to where it lies.

# Prints the string at esi. Changes eax, edx and esi, as the next does.
print:
    movb (%esi), %al
    testb %al, %al
    jz printed
    call print_byte
    incl %esi
    jmp print
printed:
    ret

# Prints what lies from esi to edi, and the end of a line.
print_range:
    cmpl %edi, %esi
    jae newline
    movb (%esi), %al
    call print_byte
    incl %esi
    jmp print_range

# Ends with the code in cl; if the command line, at esi, ends with "wait", after a key.
finish:
    lodsb
    testb %al, %al
    jnz finish
    cmpl $0x74696177, -5(%esi)
    jne exit
    leal text_waiting(%ebp), %esi
    call print
    call newline
    call wait_for_key
exit:
    movb %cl, %al
    outb %al, $0xf4
fail:
    movb $0x7f, %al
    outb %al, $0xf4
halt:
    hlt
    jmp halt

# Waits for a byte on the serial line; al is it.
wait_for_key:
    movw $0x3fd, %dx
    inb %dx, %al
    testb $1, %al
    jz wait_for_key
    movw $0x3f8, %dx
    inb %dx, %al
    ret

text_cmdline: .asciz "CMDLINE "
text_initrd: .asciz "INITRD "
text_module: .asciz "MODULE "
text_holds: .asciz " HOLDS "
text_waiting: .asciz "WAITING"

.section .bss, "aw", @nobits
.align 4
zeroed: .skip 4
.skip 4096
stack_end:
