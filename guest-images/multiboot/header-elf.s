# Multiboot header of an ELF: its segments say where it goes.
.section .header, "a"
.align 4
    .long 0x1badb002
    .long 0x00000003                    # modules on pages, memory information
    .long -(0x1badb002 + 0x00000003)
