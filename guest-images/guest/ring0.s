// Ring 0: all of it, in integer instructions that every KVM emulates. It enters through PVH, maps memory
// one to one for ring 3, and serves interrupts and one system call (int3). See ../src/lib.rs.
    .section .note.pvh, "a", @note
    .align 4
    .long 4, 4, 18          // name size, desc size, XEN_ELFNOTE_PHYS32_ENTRY
    .asciz "Xen"
    .long entry32

    .section .ring0, "ax"
    .code32
    .global entry32
entry32:
    mov dx, 0x3f8           // the first byte, as early as can be: start-up time ends here
    mov al, 0x46
    out dx, al
    cli
    cld
    mov [start_info], ebx
    mov esp, offset boot_stack_top
    mov al, 0xff            // both 8259s: KVM raises every line there as well as at the IOAPIC
    out 0x21, al
    out 0xa1, al
    xor eax, eax
    jmp long_mode32

// Application processors come here in real mode: SIPI vector 8 is 0x8000, where this is copied.
    .code16
    .global ap_trampoline
ap_trampoline:
    cli
    cld
    xor ax, ax
    mov ds, ax
    .byte 0x0f, 0x01, 0x16  // lgdt, at the copy's address
    .word 0x8000 + (ap_gdtr - ap_trampoline)
    mov eax, cr0
    or eax, 1
    mov cr0, eax
    .byte 0x66, 0xea        // jmp 0x08:ap32
    .long ap32
    .word 0x08
ap_gdtr:
    .word 10*8+16*8-1
    .long gdt
    .global ap_trampoline_end
ap_trampoline_end:

    .code32
ap32:
    mov ax, 0x10
    mov ds, ax
    mov es, ax
    mov ss, ax
    mov eax, 1
    lock xadd [cpu_count], eax
    cmp eax, 8
    jae halt32
    // eax: this CPU's number
long_mode32:
    mov ebp, eax
    lgdt [gdtr]
    mov eax, 0x20 | 0x600   // PAE, OSFXSR, OSXMMEXCPT
    mov cr4, eax
    mov eax, 1
    xor ecx, ecx
    cpuid
    test ecx, 1 << 26       // XSAVE
    jz 1f
    mov eax, cr4
    or eax, 1 << 18         // OSXSAVE
    mov cr4, eax
    mov eax, 0xd
    xor ecx, ecx
    cpuid
    and eax, 0xe7           // x87, SSE, AVX, AVX-512
    xor edx, edx
    xor ecx, ecx
    xsetbv
1:  mov eax, offset pml4
    mov cr3, eax
    mov ecx, 0xc0000080
    rdmsr
    or eax, 1 << 8          // LME
    wrmsr
    mov eax, 0x80000023     // PG, NE, MP, PE
    mov cr0, eax
    .byte 0xea              // jmp 0x18:entry64
    .long entry64
    .word 0x18
halt32:
    hlt
    jmp halt32

    .code64
entry64:
    mov ax, 0x10
    mov ds, ax
    mov es, ax
    mov ss, ax
    // TSS of this CPU: descriptor at gdt + 0x50 + 16 n, TSS at tss + 0x2100 n, stack at stacks.
    mov eax, ebp
    imul rax, rax, 0x2100
    lea rbx, tss[rax]
    mov ecx, ebp
    shl ecx, 4
    lea rdi, gdt[rcx + 0x50]
    mov rax, rbx
    mov word ptr [rdi], 0x206b      // limit: 0x68 + 0x2000 + 4 - 1
    mov [rdi + 2], ax
    shr rax, 16
    mov [rdi + 4], al
    mov byte ptr [rdi + 5], 0x89
    mov byte ptr [rdi + 6], 0
    mov [rdi + 7], ah
    mov dword ptr [rdi + 8], 0
    mov dword ptr [rdi + 12], 0
    mov word ptr [rbx + 0x66], 0x68 // I/O bitmap follows at once, all zero: every port is open
    mov byte ptr [rbx + 0x68 + 0x2000], 0xff
    lea rax, [rbp + 1]
    shl rax, 12
    lea rax, kernel_stacks[rax]
    mov [rbx + 4], rax              // rsp0
    mov rsp, rax
    add ecx, 0x50
    ltr cx
    test ebp, ebp
    jnz 2f
    call make_idt
2:  lidt [idtr]
    // Down to ring 3: ss, rsp, rflags, cs, rip.
    push 0x33
    lea rax, [rbp + 1]
    shl rax, 16
    lea rax, user_stacks[rax]
    and rax, -16
    sub rax, 8
    push rax
    push 2
    push 0x2b
    mov rdi, rbp
    mov esi, [start_info]
    mov rax, offset guest_main
    push rax
    iretq

// Fills the 64 gates from `stubs`, 16 bytes each; int3 may be called from ring 3.
make_idt:
    lea rdi, idt
    mov rsi, offset stubs
    mov ecx, 64
3:  mov rax, rsi
    mov [rdi], ax
    mov word ptr [rdi + 2], 0x18
    mov word ptr [rdi + 4], 0x8e00
    shr rax, 16
    mov [rdi + 6], ax
    mov dword ptr [rdi + 8], 0
    add rdi, 16
    add rsi, 16
    dec ecx
    jnz 3b
    mov byte ptr idt[3 * 16 + 5], 0xee
    mov rax, offset service
    mov word ptr idt[3 * 16], ax
    shr rax, 16
    mov word ptr idt[3 * 16 + 6], ax
    ret

// int3 from ring 3, by rdi: 0 sleeps until an interrupt, which may be pending already; 1 is wrmsr; 2 is
// wrmsr, then sleep; 3 is cpuid (in ring 3 it may tell of the host), 4 a triple fault. Registers are those
// of wrmsr and cpuid.
service:
    cmp edi, 3
    je 3f
    ja 4f
    test edi, edi
    jz 1f
    wrmsr
    cmp edi, 2
    jb 2f
1:  sti
    hlt
    cli
2:  iretq
3:  cpuid
    iretq
4:  lidt [no_idt]
    ud2

interrupt:                          // [rsp]: vector
    push rax
    mov rax, [rsp + 8]
    lock inc qword ptr interrupt_counts[rax * 8]
    mov rax, 0xfee000b0             // EOI
    mov dword ptr [rax], 0
    pop rax
    add rsp, 8
    iretq

fault:                              // [rsp]: vector, then what the CPU pushed
    mov rax, [rsp]
    mov fault_vector, rax
    mov rax, cr2
    mov fault_address, rax
    mov rax, [rsp + 8]              // error code and rip, or rip and cs: the vector tells
    mov fault_words, rax
    mov rax, [rsp + 16]
    mov fault_words + 8, rax
    mov rax, 1
    lock xadd fault_count, rax
    test rax, rax
    jnz 6f
    push 0x33
    mov rax, offset user_stacks + 0xfff8
    push rax
    push 2
    push 0x2b
    mov rax, offset guest_fault
    push rax
    iretq
6:  mov al, 0x7e                    // a fault while reporting a fault
    out 0xf4, al
7:  hlt
    jmp 7b

    .align 16
stubs:
    .set vector, 0
    .rept 32
    .align 16
    push vector
    jmp fault
    .set vector, vector + 1
    .endr
    .rept 32
    .align 16
    push vector
    jmp interrupt
    .set vector, vector + 1
    .endr

    .section .ring0.data, "aw"
    .align 16
    .global gdt
gdt:
    .quad 0
    .quad 0x00cf9b000000ffff        // 0x08 ring 0, 32-bit code
    .quad 0x00cf93000000ffff        // 0x10 ring 0, data
    .quad 0x00af9b000000ffff        // 0x18 ring 0, 64-bit code
    .quad 0
    .quad 0x00affb000000ffff        // 0x28 ring 3, 64-bit code
    .quad 0x00cff3000000ffff        // 0x30 ring 3, data
    .quad 0, 0, 0
    .fill 16, 8, 0                  // 0x50 TSS descriptors
gdtr:
    .word 10*8+16*8-1
    .quad gdt
idtr:
    .word 64*16-1
    .quad idt
no_idt:
    .word 0
    .quad 0
    .align 8
cpu_count: .quad 1
start_info: .quad 0

// Page tables for 16 GiB of 2 MiB pages, made by the assembler: in ring 0 every instruction is dear.
    .align 4096
pml4:
    .quad pdpt + 7
    .fill 511, 8, 0
pdpt:
    .set index, 0
    .rept 16
    .quad page_directories + index * 4096 + 7
    .set index, index + 1
    .endr
    .fill 496, 8, 0
page_directories:
    .set address, 0
    .rept 16 * 512
    .quad address + 0x87
    .set address, address + 0x200000
    .endr

    .section .ring0.bss, "aw", @nobits
    .align 16
idt: .skip 64 * 16
    .global interrupt_counts, fault_vector, fault_address, fault_words
interrupt_counts: .skip 64 * 8
fault_vector: .skip 8
fault_address: .skip 8
fault_words: .skip 16
fault_count: .skip 8
    .align 256
tss: .skip 0x2100 * 8
    .align 4096
boot_stack: .skip 4096
boot_stack_top:
kernel_stacks: .skip 4096 * 9
user_stacks: .skip 65536 * 9
    .text
    .code64
