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
    movl 12(%ebx), %ecx                 # number of modules
    movl %ecx, left
    movl 16(%ebx), %edi                 # their list
next_module:
    cmpl $0, left
    je no_more
    decl left
    movl 16(%edi), %esi                 # the module's string
    testl %esi, %esi
    jz ramdisk
    pushl %esi
    movl $text_module, %esi
    call print
    popl %esi
    call print
    movl $text_holds, %esi
    call print
    jmp content
ramdisk:
    movl $text_initrd, %esi
    call print
content:
    pushl %edi
    movl (%edi), %esi
    movl 8(%edi), %edi
    addl %esi, %edi
    call print_range
    popl %edi
    addl $32, %edi
    jmp next_module
no_more:
    movl 24(%ebx), %esi
    jmp finish

.section .bss, "aw", @nobits
.align 4
left: .skip 4
