# Starts all other CPUs, again and again, and counts them: each adds one, and marks its x2APIC id. A Multiboot kernel.
.section .header, "a"
.align 4
    .long 0x1badb002
    .long 0
    .long -0x1badb002

.section .start, "ax"
.code16
# Where a start-up message sends a CPU, copied to 0x8000: counts at 0x9000, marks at 0x9100.
trampoline:
    cli
    xorw %ax, %ax
    movw %ax, %ds
    movl $0xb, %eax
    xorl %ecx, %ecx
    cpuid
    movw %dx, %bx
    movb $1, 0x9100(%bx)
    lock
    incw 0x9000
parked:
    hlt
    jmp parked
trampoline_end:

.code32
.globl entry
entry:
    xorl %ebp, %ebp
    movl $stack_end, %esp
    movb $0xff, %al                     # both 8259s
    outb %al, $0x21
    outb %al, $0xa1
    movl $trampoline, %esi
    movl $0x8000, %edi
    movl $(trampoline_end - trampoline), %ecx
    rep movsb
    movl $1, %eax
    cpuid
    shrl $16, %ebx
    movzbl %bl, %ebx                    # the number of CPUs
    movl $0x1ff, 0xfee000f0             # the local APIC works
round:
    movl $0x9000, %edi
    xorl %eax, %eax
    movl $0x80, %ecx
    rep stosl
    movl $0xc4500, 0xfee00300           # INIT to all others
    movl $1000, %ecx
after_init:
    inb $0x80, %al
    loop after_init
start_up:
    movl $0xc4608, 0xfee00300           # start-up, at 0x8000; does nothing to one that runs
    movl $20000, %ecx
count:
    inb $0x80, %al
    movzwl 0x9000, %eax
    incl %eax
    cmpl %ebx, %eax
    je all
    loop count
    jmp start_up
all:
    movl $text_cpus, %esi
    call print
    movb %bl, %al
    call print_hex
    xorl %edi, %edi                     # how many other ids there are, below the number of CPUs
    movl $1, %ecx
next_id:
    cmpl %ebx, %ecx
    jae ids
    movzbl 0x9100(%ecx), %eax
    addl %eax, %edi
    incl %ecx
    jmp next_id
ids:
    movl $text_ids, %esi
    call print
    movl %edi, %eax
    call print_hex
    call newline
    call wait_for_key
    cmpb $'r', %al
    je round
    xorl %ecx, %ecx
    jmp exit

# Prints al in hexadecimal.
print_hex:
    pushl %eax
    shrb $4, %al
    call print_digit
    popl %eax
    andb $15, %al
print_digit:
    addb $'0', %al
    cmpb $'9', %al
    jbe print_byte
    addb $('a' - '0' - 10), %al
    jmp print_byte

text_cpus: .asciz "CPUS "
text_ids: .asciz " OTHERS "
