# 64-bit mode, rsi at the zero page (Linux, Documentation/arch/x86/boot.rst, "64-bit Boot Protocol"); plain integer
# instructions.
.section .text, "ax"
.code64
.globl entry
entry:
    movq %rsi, %rbx
    movl $0xc0000080, %ecx              # EFER: long mode is active
    rdmsr
    testl $(1 << 10), %eax
    jz fail
    cmpl $0, zeroed(%rip)               # the loader has to clear what follows the file
    jne fail
    leaq stack_end(%rip), %rsp
    cmpw $0xaa55, 0x1fe(%rbx)           # boot_flag
    jne fail
    cmpl $0x53726448, 0x202(%rbx)       # "HdrS"
    jne fail
    cmpb $0, 0x1e8(%rbx)                # e820_entries
    je fail

    leaq text_cmdline(%rip), %rsi
    call print
    movl 0x228(%rbx), %esi              # cmd_line_ptr
    call print
    call newline

    leaq text_initrd(%rip), %rsi
    call print
    movl 0x218(%rbx), %esi              # ramdisk_image
    movl 0x21c(%rbx), %edi              # ramdisk_size
    addq %rsi, %rdi
next_byte:
    cmpq %rdi, %rsi
    jae initrd_end
    movb (%rsi), %al
    call print_byte
    incq %rsi
    jmp next_byte
initrd_end:
    call newline
    movl 0x21c(%rbx), %eax
    outb %al, $0xf4
fail:
    movb $0x7f, %al
    outb %al, $0xf4
halt:
    hlt
    jmp halt

# Prints the string at rsi.
print:
    movb (%rsi), %al
    testb %al, %al
    jz printed
    call print_byte
    incq %rsi
    jmp print
printed:
    ret

text_cmdline: .asciz "CMDLINE "
text_initrd: .asciz "INITRD "

.section .bss, "aw", @nobits
.align 16
zeroed: .skip 16
.skip 4096
stack_end:
