# Prints al, or the end of a line, on COM1; the same in 32- and 64-bit mode. Changes ax and dx.
.section .text, "ax"
newline:
    movb $10, %al
print_byte:
    movb %al, %ah
    movw $0x3fd, %dx
not_ready:
    inb %dx, %al
    testb $0x20, %al
    jz not_ready
    movb %ah, %al
    movw $0x3f8, %dx
    outb %al, %dx
    ret
