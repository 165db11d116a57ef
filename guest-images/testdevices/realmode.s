// Real mode: where the other CPUs start, which fw_cfg counts, and where the boot CPU goes and comes back from.
    .section .text, "ax"
    .code32
    .equ REAL, 0x8000               // where code of real mode is copied; it is SIPI vector 8
    .equ REAL_VECTORS, 0x7000       // how often each of these was taken there: int, keyboard, divide
    .equ WAKE_VECTOR, 0x42
    .equ KEY_MAX_CPUS, 0x0f
    .equ INIT_OTHERS, 0xc4500
    .equ START_OTHERS, 0xc4600 | REAL >> 12
    .equ WAKE_OTHERS, 0xc4000 | WAKE_VECTOR
    .equ STACK_BYTES, 128

// Copies code of real mode that begins at esi and ends at ecx. Changes ecx, esi and edi.
copy_to_real:
    sub ecx, esi
    mov edi, REAL
    rep movsb
    ret

// Where the copy of real_start has what is at eax.
in_copy:
    sub eax, offset real_start
    add eax, REAL
    ret

// Starts all CPUs, and wakes them several times as the guest moves.
start_cpus:
    mov al, 0xff
    out 0x21, al
    out 0xa1, al
    mov ax, KEY_CPUS
    call select
    call next_number
    movzx ebp, ax
    mov ax, KEY_MAX_CPUS
    call select
    call next_number
    cmp ax, bp
    jne fail
    dec ebp                 // the others
    mov eax, WAKE_VECTOR
    mov ecx, offset on_wake
    call set_gate
    mov esi, offset other_start
    mov ecx, offset other_end
    call copy_to_real
    mov dword ptr [LAPIC + 0xf0], 0x1ff
    mov dword ptr [LAPIC + 0x310], 0
    mov dword ptr [LAPIC + 0x300], INIT_OTHERS
    mov dword ptr [LAPIC + 0x300], START_OTHERS
    mov eax, ebp
    mov edi, offset started
    call wait_for
    mov ebx, 5
    mov edi, offset woken
6:  call delay
    mov dword ptr [edi], 0
    mov dword ptr [LAPIC + 0x300], WAKE_OTHERS
    mov eax, ebp
    call wait_for
    dec ebx
    jnz 6b
    mov esi, offset text_others
    call print
    mov eax, [started]
    call print_number
    jmp newline

on_wake:
    lock inc dword ptr [woken]
    mov dword ptr [LAPIC + 0xb0], 0
    end_of_interrupt

    .code16
other_start:
    cli
    xor ax, ax
    mov ds, ax
    .byte 0x0f, 0x01, 0x16  // lgdt, at the copy's address
    .word REAL + (other_gdt_pointer - other_start)
    mov eax, cr0
    or eax, 1
    mov cr0, eax
    .byte 0x66, 0xea        // jmp 8:other_flat
    .long other_flat
    .word 8
other_gdt_pointer:
    .word 23
    .long gdt
other_end:

    .code32
other_flat:
    mov ax, 0x10
    mov ds, ax
    mov es, ax
    mov ss, ax
    mov eax, 1
    lock xadd [stacks_used], eax
    inc eax
    imul eax, eax, STACK_BYTES
    lea esp, [stacks + eax]
    lidt [idt_pointer]
    mov dword ptr [LAPIC + 0xf0], 0x1ff
    lock inc dword ptr [started]
6:  sti
    hlt
    jmp 6b

// The boot CPU goes to real mode, takes an interrupt of each kind through the vectors at address 0, and moves there.
real_mode:
    mov dword ptr [REAL_VECTORS], 0
    mov word ptr [REAL_VECTORS + 4], 0
    mov esi, offset real_start
    mov ecx, offset real_end
    call copy_to_real
    mov eax, offset on_real_divide
    call in_copy
    mov [0], eax
    mov eax, offset on_real_keyboard
    call in_copy
    mov [9 * 4], eax
    mov eax, offset on_real_int
    call in_copy
    mov [0x20 * 4], eax
    mov [stack_of_flat], esp
    lgdt [real_gdt_pointer]
    lidt [real_idt_pointer]
    .byte 0xea              // jmp 0x18:REAL
    .long REAL
    .word 0x18
back:
    mov ax, 0x10
    mov ds, ax
    mov es, ax
    mov ss, ax
    mov esp, [stack_of_flat]
    mov esi, offset text_real
    call print
    movzx eax, word ptr [REAL_VECTORS]
    call print_number
    mov esi, offset text_keyboards
    call print
    movzx eax, word ptr [REAL_VECTORS + 2]
    call print_number
    mov esi, offset text_divides
    call print
    movzx eax, word ptr [REAL_VECTORS + 4]
    call print_number
    jmp newline

    .code16
real_start:
    mov ax, 0x20            // limits of 64 KiB
    mov ds, ax
    mov es, ax
    mov ss, ax
    mov eax, cr0
    and eax, -2
    mov cr0, eax
    .byte 0xea              // jmp 0:in_real_mode
    .word REAL + (in_real_mode - real_start), 0
in_real_mode:
    xor ax, ax
    mov ds, ax
    mov es, ax
    mov ss, ax
    mov sp, REAL_VECTORS
    call real_delay
    int 0x20
    sti
    mov dx, LINES + 1       // the 8259 as a BIOS leaves it: vector 9
    mov al, 1
    out dx, al
    call real_delay
    mov al, 0
    out dx, al
    cli
    call real_delay
    xor cx, cx
    div cx
    mov eax, cr0
    or eax, 1
    mov cr0, eax
    .byte 0x66, 0xea        // jmp 8:back
    .long back
    .word 8
real_delay:
    push ax
    mov cx, 12000
6:  in al, 0x92
    dec cx
    jnz 6b
    pop ax
    ret
on_real_int:
    inc word ptr [REAL_VECTORS]
    iret
on_real_keyboard:
    push ax
    inc word ptr [REAL_VECTORS + 2]
    mov al, 0x20
    out 0x20, al
    pop ax
    iret
on_real_divide:             // a fault: on with what is behind the instruction of 2 bytes
    push bp
    mov bp, sp
    inc word ptr [REAL_VECTORS + 4]
    add word ptr [bp + 2], 2
    pop bp
    iret
real_end:

    .code32
text_others: .asciz "CPUS others="
text_real: .asciz "REAL ints="
text_keyboards: .asciz " keyboards="
text_divides: .asciz " divides="
    .align 8
real_gdt:
    .quad 0
    .quad 0x00cf9b000000ffff
    .quad 0x00cf93000000ffff
    .quad 0x00009b000000ffff        // 16 bits
    .quad 0x000093000000ffff
real_gdt_pointer:
    .word 39
    .long real_gdt
real_idt_pointer:
    .word 0x3ff
    .long 0

    .section .bss, "aw", @nobits
    .align 16
started: .skip 4
woken: .skip 4
stacks_used: .skip 4
stack_of_flat: .skip 4
    .equ MAX_OTHERS, 255
stacks: .skip STACK_BYTES * (MAX_OTHERS + 1)
