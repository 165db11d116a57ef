# Multiboot 2: eax the magic number, ebx at the information. Wants to lie as high as it may, below 48 MiB.
.section .header, "a"
.align 8
header:
    .long 0xe85250d6
    .long 0                             # i386
    .long header_end - header
    .long -(0xe85250d6 + (header_end - header))
    .word 1, 0                          # asks for the command line, the memory map and the load base
    .long 20, 1, 6, 21, 0
    .word 5, 1                          # a framebuffer, optional: there is none
    .long 20, 1024, 768, 32, 0
    .word 6, 0                          # modules on pages
    .long 8
    .word 10, 0                         # relocatable, to the highest place
    .long 24, 0x200000, 0x3000000, 0x1000, 2
    .word 0, 0
    .long 8
header_end:

.section .start, "ax"
.code32
.globl entry
entry:
    cmpl $0x36d76289, %eax
    jne halted
    leal 8(%ebx), %edi
find_base:
    movl (%edi), %eax
    testl %eax, %eax
    jz halted
    cmpl $21, %eax                      # load base address
    je found_base
    movl 4(%edi), %ecx
    addl $7, %ecx
    andl $-8, %ecx
    addl %ecx, %edi
    jmp find_base
halted:
    hlt
    jmp halted
found_base:
    movl 8(%edi), %ebp
    subl $image_start, %ebp
    leal stack_end(%ebp), %esp
    call here
here:
    popl %eax
    leal here(%ebp), %ecx
    cmpl %ecx, %eax                     # it runs where the tag says
    jne fail
    cmpl $0x2000000, %eax               # and that is high
    jb fail
    cmpl $0, zeroed(%ebp)
    jne fail

    xorl %ecx, %ecx                     # number of modules
    leal 8(%ebx), %edi
    movl $0, zeroed(%ebp)               # from here on: the kinds of tags that were seen
next_tag:
    movl (%edi), %eax
    testl %eax, %eax
    jz end_of_tags
    btsl %eax, zeroed(%ebp)
    cmpl $1, %eax
    je cmdline_tag
    cmpl $3, %eax
    je module_tag
skip_tag:
    movl 4(%edi), %eax
    addl $7, %eax
    andl $-8, %eax
    addl %eax, %edi
    jmp next_tag
cmdline_tag:
    leal text_cmdline(%ebp), %esi
    call print
    leal 8(%edi), %esi
    movl %esi, cmdline(%ebp)
    call print
    call newline
    jmp skip_tag
module_tag:
    incl %ecx
    leal text_module(%ebp), %esi
    call print
    leal 16(%edi), %esi
    call print
    leal text_holds(%ebp), %esi
    call print
    pushl %edi
    movl 8(%edi), %esi
    movl 12(%edi), %edi
    testl $0xfff, %esi
    jnz fail
    call print_range
    popl %edi
    jmp skip_tag
end_of_tags:
    movl zeroed(%ebp), %eax
    notl %eax
    testl $(1 << 1 | 1 << 4 | 1 << 6 | 1 << 15 | 1 << 21), %eax # command line, memory, its map, ACPI, load base
    jnz fail
    movl cmdline(%ebp), %esi
    jmp finish

.section .bss, "aw", @nobits
.align 4
cmdline: .skip 4
