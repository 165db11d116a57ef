# Multiboot header of a flat binary: it says itself where it goes.
.section .header, "a"
.align 4
header:
    .long 0x1badb002
    .long 0x00010003                    # the same, and addresses
    .long -(0x1badb002 + 0x00010003)
    .long header
    .long image_start
    .long image_end
    .long bss_end
    .long entry
