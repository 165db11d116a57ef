// fw_cfg, byte by byte and by DMA: CPUs, RAM, a file of the user's, the initrd.
    .section .text, "ax"
    .code32
    .equ SELECTOR, 0x510
    .equ KEY_SIGNATURE, 0
    .equ KEY_RAM, 3
    .equ KEY_CPUS, 5
    .equ KEY_INITRD_SIZE, 0x0b
    .equ KEY_INITRD, 0x12
    .equ KEY_DIRECTORY, 0x19

// Selects item ax.
select:
    mov dx, SELECTOR
    out dx, ax
    ret

// The next byte in al. Changes edx.
next:
    mov dx, SELECTOR + 1
    in al, dx
    ret

// The next 4 bytes in eax, as a little-endian number. Changes ecx and edx.
next_number:
    push ebx
    mov ecx, 4
6:  call next
    shrd ebx, eax, 8
    dec ecx
    jnz 6b
    mov eax, ebx
    pop ebx
    ret

// The same of a big-endian one.
next_big_number:
    call next_number
    bswap eax
    ret

fw_cfg:
    mov ax, KEY_SIGNATURE
    call select
    call next_number
    cmp eax, 0x554d4551     // "QEMU"
    jne fail
    mov esi, offset text_cpus
    call print
    mov ax, KEY_CPUS
    call select
    call next_number
    call print_number
    mov esi, offset text_ram
    call print
    mov ax, KEY_RAM
    call select
    call next_number
    call print_number
    mov esi, offset text_file
    call print
    call print_file
    mov ax, KEY_INITRD_SIZE
    call select
    call next_number
    mov ebp, eax
    mov ax, KEY_INITRD
    call select
    xor ebx, ebx
    mov esi, ebp
6:  test esi, esi
    jz 2f
    call next
    movzx eax, al
    rol ebx, 1
    add ebx, eax
    dec esi
    jmp 6b
2:  jmp print_initrd

// Prints the initrd's length, in ebp, and checksum, in ebx.
print_initrd:
    mov esi, offset text_initrd
    call print
    mov eax, ebp
    call print_number
    mov esi, offset text_sum
    call print
    mov eax, ebx
    call print_number
    jmp newline

// Prints the file "opt/test", which must be there.
print_file:
    mov ax, KEY_DIRECTORY
    call select
    call next_big_number
    mov edi, eax            // entries
6:  test edi, edi
    jz fail
    call next_big_number
    mov ebp, eax            // length
    call next_big_number
    shr eax, 16
    mov ebx, eax            // number
    xor esi, esi            // equal so far
    mov ecx, 0
2:  call next
    cmp ecx, 9
    jae 3f
    cmp al, [ecx + file_name]
    je 3f
    inc esi
3:  inc ecx
    cmp ecx, 56
    jb 2b
    dec edi
    test esi, esi
    jnz 6b
    mov eax, ebx
    call select
4:  test ebp, ebp
    jz 5f
    call next
    call print_byte
    dec ebp
    jmp 4b
5:  ret

// Starts the operation eax, of ecx bytes at edi; eax is what is left of it. Changes edx.
dma:
    bswap eax
    mov [control_block], eax
    mov edx, ecx
    bswap edx
    mov [control_block + 4], edx
    mov dword ptr [control_block + 8], 0
    mov edx, edi
    bswap edx
    mov [control_block + 12], edx
    xor eax, eax
    mov dx, SELECTOR + 4
    out dx, eax
    mov eax, offset control_block
    bswap eax
    mov dx, SELECTOR + 8
    out dx, eax
    mov eax, [control_block]
    bswap eax
    ret

// The first 4 bytes of item ax, as a number in eax. Changes ecx, edx and edi.
number_by_dma:
    shl eax, 16
    or eax, 8 | 2           // select, read
    mov ecx, 4
    mov edi, offset buffer
    mov dword ptr [buffer], 0
    call dma
    test eax, eax
    jnz fail
    mov eax, [buffer]
    ret

fw_cfg_by_dma:
    mov dx, SELECTOR + 4
    in eax, dx
    cmp eax, 0x554d4551     // "QEMU"
    jne fail
    mov dx, SELECTOR + 8
    in eax, dx
    cmp eax, 0x47464320     // " CFG"
    jne fail
    mov esi, offset text_cpus
    call print
    mov ax, KEY_CPUS
    call number_by_dma
    movzx eax, ax
    call print_number
    mov esi, offset text_ram
    call print
    mov ax, KEY_RAM
    call number_by_dma
    call print_number
    mov ax, KEY_INITRD_SIZE
    call number_by_dma
    mov ebp, eax
    mov eax, KEY_INITRD << 16 | 8
    call dma
    xor ebx, ebx
    mov esi, ebp            // bytes left
6:  test esi, esi
    jz 4f
    mov ecx, esi
    cmp ecx, 16384
    jbe 2f
    mov ecx, 16384
2:  sub esi, ecx
    mov edi, offset buffer
    mov eax, 2              // read
    call dma
    test eax, eax
    jnz fail
    call delay
3:  movzx eax, byte ptr [edi]
    rol ebx, 1
    add ebx, eax
    inc edi
    dec ecx
    jnz 3b
    jmp 6b
4:  call print_initrd
    mov ecx, 4              // what is refused: a write, and memory that is not there
    mov edi, offset buffer
    mov eax, 16
    call dma
    cmp eax, 1
    jne fail
    mov edi, 0xf0000000
    mov eax, 2
    call dma
    cmp eax, 1
    jne fail
    ret

text_cpus: .asciz "FWCFG cpus="
text_ram: .asciz " ram="
text_file: .asciz " file="
text_initrd: .asciz " initrd="
text_sum: .asciz " sum="
file_name: .asciz "opt/test"

    .section .bss, "aw", @nobits
    .align 4096
control_block: .skip 16
    .align 4096
buffer: .skip 16384
