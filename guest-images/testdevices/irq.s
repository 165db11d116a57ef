// Interrupts that the test device raises: edges and levels at the IOAPIC, some of them held while the guest moves, and the
// 8259s as a BIOS leaves them.
    .section .text, "ax"
    .code32
    .equ LINES, 0x2000
    .equ IOAPIC, 0xfec00000
    .equ LAPIC, 0xfee00000
    .equ EDGE_PIN, 14
    .equ EDGE_VECTOR, 0x40
    .equ LEVEL_PIN, 11
    .equ LEVEL_VECTOR, 0x41
    .equ LEVEL, 1 << 15
    .equ MASKED, 1 << 16
    .equ ROUNDS, 300

// Sets the low half of an IOAPIC pin's redirection entry; CPU 0 is in the high one already.
    .macro redirect pin, value
    mov dword ptr [IOAPIC], 0x10 + 2 * \pin
    mov dword ptr [IOAPIC + 0x10], \value
    .endm

// Sets the level of a line. Changes eax and edx.
    .macro line pin, level
    mov dx, LINES + \pin
    mov al, \level
    out dx, al
    .endm

// As iretd at one privilege level, in instructions that a KVM emulates which runs this mode by emulation.
    .macro end_of_interrupt
    push eax                // above it: eip, cs, eflags
    mov eax, [esp + 12]
    xchg eax, [esp + 4]
    mov [esp + 12], eax
    pop eax                 // above it: eflags, cs, eip
    popfd
    lea esp, [esp + 4]
    ret
    .endm

// Lets vector eax come to the code at ecx. Changes eax and ecx.
set_gate:
    push edx
    mov edx, ecx
    and edx, 0xffff
    or edx, 8 << 16
    mov [idt + eax * 8], edx
    and ecx, 0xffff0000
    or ecx, 0x8e00          // present, interrupt gate
    mov [idt + eax * 8 + 4], ecx
    pop edx
    ret

// Waits until the number at edi is eax; after a second or so it fails.
wait_for:
    push ecx
    push eax
    mov ecx, 200000
6:  cmp [edi], eax
    je 2f
    in al, 0x92
    mov eax, [esp]
    dec ecx
    jnz 6b
    jmp wrong
2:  pop eax
    pop ecx
    ret

on_edge:
    inc dword ptr [edges]
    mov dword ptr [LAPIC + 0xb0], 0
    end_of_interrupt

// Lowers the line, unless it is to be taken again; then the next interrupt comes at the end of this one. A KVM that
// emulates this mode ends an interrupt as it delivers it, and so delivers one more while the line is high: such a
// one finds the line low, and is not counted.
on_level:
    push eax
    push edx
    cmp dword ptr [high], 0
    je 2f
    inc dword ptr [levels]
    cmp dword ptr [again], 0
    je 6f
    dec dword ptr [again]
    call delay
    jmp 2f
6:  mov dword ptr [high], 0
    line LEVEL_PIN, 0
2:  mov dword ptr [LAPIC + 0xb0], 0
    pop edx
    pop eax
    end_of_interrupt

interrupts:
    mov al, 0xff            // both 8259s: KVM raises lines there, too
    out 0x21, al
    out 0xa1, al
    mov dword ptr [LAPIC + 0xf0], 0x1ff
    mov eax, EDGE_VECTOR
    mov ecx, offset on_edge
    call set_gate
    mov eax, LEVEL_VECTOR
    mov ecx, offset on_level
    call set_gate
    lidt [idt_pointer]
    redirect EDGE_PIN, EDGE_VECTOR
    redirect LEVEL_PIN, LEVEL_VECTOR | LEVEL
    sti
    mov ebx, 1
6:  line EDGE_PIN, 1
    mov eax, ebx
    mov edi, offset edges
    call wait_for
    line EDGE_PIN, 0
    mov dword ptr [high], 1
    line LEVEL_PIN, 1
    mov eax, ebx
    mov edi, offset levels
    call wait_for
    inc ebx
    cmp ebx, ROUNDS
    jbe 6b
    // An edge that stays high is taken once, however often the guest moves.
    line EDGE_PIN, 1
    mov eax, ROUNDS + 1
    mov edi, offset edges
    call wait_for
    call delay
    call delay
    cmp dword ptr [edges], ROUNDS + 1
    jne wrong
    line EDGE_PIN, 0
    // A level that was raised while it was masked is taken when it no longer is.
    redirect LEVEL_PIN, LEVEL_VECTOR | LEVEL | MASKED
    mov dword ptr [high], 1
    line LEVEL_PIN, 1
    call delay
    cmp dword ptr [levels], ROUNDS
    jne wrong
    redirect LEVEL_PIN, LEVEL_VECTOR | LEVEL
    mov eax, ROUNDS + 1
    mov edi, offset levels
    call wait_for
    // One that stays high is taken until it is low.
    mov dword ptr [again], 3
    mov dword ptr [high], 1
    line LEVEL_PIN, 1
    mov eax, ROUNDS + 5
    call wait_for
    call delay
    cmp dword ptr [levels], ROUNDS + 5
    jne wrong

print_counts:
    mov esi, offset text_edges
    call print
    mov eax, [edges]
    call print_number
    mov esi, offset text_levels
    call print
    mov eax, [levels]
    call print_number
    jmp newline

wrong:
    cli
    call print_counts
    jmp fail

on_keyboard:
    push eax
    inc dword ptr [keyboards]
    mov al, 0x20
    out 0x20, al
    pop eax
    end_of_interrupt

on_mouse:
    push eax
    inc dword ptr [mice]
    mov al, 0x20
    out 0xa0, al
    out 0x20, al
    pop eax
    end_of_interrupt

// The 8259s as a BIOS leaves them: masks, vectors 8 and 0x70.
vectors:
    in al, 0x21
    cmp al, 0xb8
    jne fail
    in al, 0xa1
    cmp al, 0x8e
    jne fail
    mov eax, 9
    mov ecx, offset on_keyboard
    call set_gate
    mov eax, 0x74
    mov ecx, offset on_mouse
    call set_gate
    lidt [idt_pointer]
    sti
    line 1, 1
    mov eax, 1
    mov edi, offset keyboards
    call wait_for
    line 1, 0
    call delay
    line 12, 1
    mov edi, offset mice
    call wait_for
    line 12, 0
    ret

text_edges: .asciz "IRQ edges="
text_levels: .asciz " levels="
    .align 8
idt_pointer:
    .word 256 * 8 - 1
    .long idt

    .section .bss, "aw", @nobits
    .align 8
idt: .skip 256 * 8
edges: .skip 4
levels: .skip 4
again: .skip 4
high: .skip 4
keyboards: .skip 4
mice: .skip 4
