# PVH as a 32-bit ELF: ebx at the start info.
.section .note.pvh, "a", @note
.align 4
    .long 4, 4, 18                      # sizes of name and value; the 32-bit entry
    .asciz "Xen"
    .long entry

.section .start, "ax"
.code32
.globl entry
entry:
    xorl %ebp, %ebp
    movl $stack_end, %esp
    cmpl $0x336ec578, (%ebx)
    jne fail
    cmpl $0, zeroed                     # the loader has to clear what follows the file
    jne fail
    cmpl $0, 48(%ebx)                   # entries of the memory map
    je fail
    movl $text_cmdline, %esi
    call print
    movl 24(%ebx), %esi
    call print
    call newline
    movl $text_initrd, %esi
    call print
    movl 12(%ebx), %ecx                 # number of modules
    xorl %esi, %esi
    xorl %edi, %edi
    jecxz no_module
    movl 16(%ebx), %eax                 # their list
    movl (%eax), %esi
    movl 8(%eax), %edi
    addl %esi, %edi
no_module:
    call print_range
    movl 24(%ebx), %esi
    jmp finish
