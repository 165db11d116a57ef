// 32-bit protected mode without paging, in integer instructions that every KVM emulates. Here: the choice of what to do,
// the ways to end, the storage of the test device and the debug console.
    .section .text, "ax"
    .code32
    .globl entry
entry:
    cmp eax, 0x2badb002
    jne fail
    cld
    mov esp, offset stack_end
    lgdt [gdt_pointer]
    .byte 0xea              // jmp 8:flat
    .long flat
    .word 8
flat:
    mov ax, 0x10
    mov ds, ax
    mov es, ax
    mov ss, ax
    mov esi, [ebx + 16]     // the command line
6:  cmp byte ptr [esi], 0
    je fail
    mov eax, [esi]
    and eax, 0xffffff
    cmp eax, 0x3d6f64       // "do="
    je 2f
    inc esi
    jmp 6b
2:  add esi, 3
    cmp byte ptr [esi], 'q' // at a key
    jne 5f
    inc esi
    mov dx, 0x3fd
7:  in al, dx
    test al, 1
    jz 7b
5:  mov al, [esi]
    mov ebp, esi
    mov esi, offset choices
3:  cmp byte ptr [esi], 0
    je fail
    cmp al, [esi]
    je 4f
    add esi, 5
    jmp 3b
4:  mov eax, [esi + 1]
    call eax
passed:
    xor eax, eax
    jmp exit
fail:
    mov eax, 0x7f
exit:
    mov dx, 0xf4
    out dx, eax
halt:
    hlt
    jmp halt

choices:
    .byte 'a'
    .long real_mode
    .byte 'b'
    .long debug_console
    .byte 'c'
    .long crash_loaded
    .byte 'd'
    .long fw_cfg_by_dma
    .byte 'e'
    .long end_elsewhere
    .byte 'f'
    .long fw_cfg
    .byte 'i'
    .long interrupts
    .byte 'm'
    .long storage
    .byte 'n'
    .long nothing_there
    .byte 'o'
    .long power_off
    .byte 'p'
    .long guest_panic
    .byte 'r'
    .long fast_reset
    .byte 's'
    .long start_cpus
    .byte 't'
    .long triple_fault
    .byte 'v'
    .long vectors
    .byte 'x'
    .long end_with_code
    .byte 0

// Takes some 50 ms, most of them in exits: several moves, if there are any. Changes nothing.
delay:
    push eax
    push ecx
    mov ecx, 12000
6:  in al, 0x92
    dec ecx
    jnz 6b
    pop ecx
    pop eax
    ret

// Prints the string at esi. Changes eax, edx and esi.
print:
    mov al, [esi]
    test al, al
    jz 6f
    call print_byte
    inc esi
    jmp print
6:  ret

// Prints eax as 8 digits. Changes eax, ecx and edx.
print_number:
    push ebx
    mov ebx, eax
    mov ecx, 8
6:  rol ebx, 4
    mov al, bl
    and al, 15
    add al, '0'
    cmp al, '9'
    jbe 2f
    add al, 'a' - '0' - 10
2:  call print_byte
    dec ecx
    jnz 6b
    pop ebx
    ret

guest_panic:
    call delay
    mov dx, 0x505
    in al, dx
    cmp al, 3               // both events
    jne fail
    mov al, 1
    out dx, al
    jmp halt

crash_loaded:
    mov dx, 0x505
    mov al, 2
    out dx, al
    call delay
    mov al, 2
    out dx, al
    ret

end_elsewhere:
    call delay
    mov al, 5
    mov dx, 0x501
    out dx, al
    jmp halt

// Ends with the two digits behind the letter, after that many moments of a millisecond or so.
end_with_code:
    movzx ebx, byte ptr [ebp + 1]
    sub ebx, '0'
    imul ebx, ebx, 10
    movzx eax, byte ptr [ebp + 2]
    lea ebx, [ebx + eax - '0']
    imul ecx, ebx, 250
    inc ecx
6:  in al, 0x92
    dec ecx
    jnz 6b
    mov eax, ebx
    jmp exit

fast_reset:
    call delay
    in al, 0x92
    cmp al, 2               // A20 is on
    jne fail
    mov al, 3
    out 0x92, al
    jmp halt

triple_fault:
    call delay
    lidt [no_idt]
    ud2

power_off:
    call delay
    mov dx, 0x604
    mov ax, 0x2000
    out dx, ax
    jmp halt

// The test device's register, byte by byte and whole, and its memory, before and after some moves.
storage:
    mov eax, 0x12345678
    out 0xe0, eax
    mov al, 0xaa
    out 0xe1, al
    mov dword ptr [0xff000000], 0x11223344
    mov word ptr [0xff007ffe], 0x5566
    mov byte ptr [0xff00ffff], 0x77
    call delay
    in eax, 0xe0
    cmp eax, 0x1234aa78
    jne fail
    in ax, 0xe2
    cmp ax, 0x1234
    jne fail
    cmp dword ptr [0xff000000], 0x11223344
    jne fail
    cmp dword ptr [0xff007ffc], 0x55660000
    jne fail
    cmp byte ptr [0xff00ffff], 0x77
    jne fail
    mov eax, offset stack_end
    out 0xe4, eax           // flushes a page
    mov al, 0
    out 0x92, al            // A20 off, and back
    call delay
    in al, 0x92
    cmp al, 0
    jne fail
    ret

// Numbers on the debug console.
debug_console:
    in al, 0xe9
    cmp al, 0xe9
    jne fail
    xor esi, esi
6:  mov ebx, esi
    mov ecx, 4
2:  rol ebx, 4
    mov al, bl
    and al, 15
    add al, 'a'
    out 0xe9, al
    dec ecx
    jnz 2b
    mov al, 10
    out 0xe9, al
    test esi, 0x1ff0000     // every 512 lines
    jnz 3f
    call delay
3:  add esi, 0x10000
    cmp esi, 0x7ff0000
    jbe 6b
    ret

// Ports and memory where nothing is, twice.
nothing_there:
    mov ecx, 2
6:  in al, 0x70
    cmp al, 0xff
    jne fail
    out 0x80, al
    mov eax, [0xfed000f0]
    cmp eax, -1
    jne fail
    dec ecx
    jnz 6b
    ret

    .align 8
gdt:
    .quad 0
    .quad 0x00cf9b000000ffff
    .quad 0x00cf93000000ffff
gdt_pointer:
    .word 23
    .long gdt
no_idt:
    .word 0
    .long 0

    .section .bss, "aw", @nobits
    .align 16
    .skip 4096
stack_end:
