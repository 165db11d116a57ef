# 32-bit protected mode, eax the magic number, ebx at the info structure; plain integer instructions.
.section .text, "ax"
.code32
.globl entry
entry:
    cmpl $0x2badb002, %eax
    jne fail
    movl $stack_end, %esp
    cmpl $0, zeroed                     # the loader has to clear what follows the file
    jne fail
    movl (%ebx), %ebp                   # flags
    testl $(1 << 6), %ebp               # memory map
    jz fail
    cmpl $0, 44(%ebx)
    je fail

    movl $text_cmdline, %esi
    call print
    movl 16(%ebx), %esi
    call print
    call newline

    movl 20(%ebx), %ecx                 # number of modules
    movl 24(%ebx), %edi                 # their list
next_module:
    jecxz done
    movl $text_module, %esi
    call print
    movl 8(%edi), %esi
    call print
    movl $text_holds, %esi
    call print
    movl (%edi), %esi
next_byte:
    cmpl 4(%edi), %esi
    jae module_end
    movb (%esi), %al
    call print_byte
    incl %esi
    jmp next_byte
module_end:
    call newline
    addl $16, %edi
    decl %ecx
    jmp next_module
done:
    movl 16(%ebx), %esi                 # a command line that ends with "wait": wait for a key
next_character:
    lodsb
    testb %al, %al
    jnz next_character
    cmpl $0x74696177, -5(%esi)
    jne exit
    movl $text_waiting, %esi
    call print
    call newline
wait_for_key:
    movw $0x3fd, %dx
    inb %dx, %al
    testb $1, %al
    jz wait_for_key
    movw $0x3f8, %dx
    inb %dx, %al
    cmpb $'r', %al
    jne exit
    movb $0xfe, %al                     # the i8042's reset
    outb %al, $0x64
    jmp halt
exit:
    movl 20(%ebx), %eax
    outb %al, $0xf4
fail:
    movb $0x7f, %al
    outb %al, $0xf4
halt:
    hlt
    jmp halt

# Prints the string at esi.
print:
    movb (%esi), %al
    testb %al, %al
    jz printed
    call print_byte
    incl %esi
    jmp print
printed:
    ret

text_cmdline: .asciz "CMDLINE "
text_module: .asciz "MODULE "
text_holds: .asciz " HOLDS "
text_waiting: .asciz "WAITING"

.section .bss, "aw", @nobits
.align 4
zeroed: .skip 4
.skip 4096
stack_end:
