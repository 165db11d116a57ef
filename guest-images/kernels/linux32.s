# Linux' 32-bit boot protocol, version 2.6 (Linux, Documentation/arch/x86/boot.rst): esi at the zero page.
.section .header, "a"
    .skip 0x1f1
    .byte 1                             # setup sectors
    .word 0
    .long paragraphs                    # syssize, from the linker script
    .word 0, 0, 0
    .word 0xaa55
    .word 0
    .ascii "HdrS"
    .word 0x0206
    .long 0
    .word 0, 0
    .byte 0
    .byte 1                             # loaded high
    .word 0
    .long 0x100000                      # code32_start
    .long 0, 0, 0
    .word 0
    .byte 0, 0
    .long 0
    .long 0x37ffffff                    # initrd_addr_max
    .long 0, 0
    .long 2047                          # cmdline_size
    .skip 0x400 - 0x23c

.section .start, "ax"
.code32
.globl entry
entry:
    orl %ebx, %ebp                      # all of them are zero
    orl %edi, %ebp
    jnz fail
    movl $stack_end, %esp
    movl %cs, %eax
    cmpw $0x10, %ax
    jne fail
    movl %ds, %eax
    cmpw $0x18, %ax
    jne fail
    movl %esi, %ebx
    cmpl $0x53726448, 0x202(%ebx)       # "HdrS"
    jne fail
    cmpb $0, 0x1e8(%ebx)                # e820_entries
    je fail
    movl $text_cmdline, %esi
    call print
    movl 0x228(%ebx), %esi              # cmd_line_ptr
    call print
    call newline
    movl $text_initrd, %esi
    call print
    movl 0x218(%ebx), %esi              # ramdisk_image
    movl 0x21c(%ebx), %edi              # ramdisk_size
    addl %esi, %edi
    call print_range
    movl 0x21c(%ebx), %ecx
    movl 0x228(%ebx), %esi
    jmp finish
