//! The device as a guest sees it, through ports and by DMA; and that nothing a guest writes is too much for it.
#![allow(clippy::big_endian_bytes, clippy::little_endian_bytes, reason = "fw_cfg has both orders")]
#![allow(clippy::cast_possible_truncation, reason = "sizes and bytes of a test")]

use super::*;
use crate::ram::RamLayout;
use proptest::prelude::*;
use std::io;
use std::sync::Arc;

const RAM_BYTES: u64 = 2 << 20;

/// A file in memory that fails behind its end.
struct InMemory(Vec<u8>);

impl BootContent for InMemory {
    fn len_bytes(&self) -> u64 {
        self.0.len() as u64
    }

    fn read_at(&self, offset_bytes: u64, into: &mut [u8]) -> io::Result<()> {
        let from = usize::try_from(offset_bytes).unwrap();
        let bytes = self.0.get(from..from + into.len()).ok_or(io::ErrorKind::UnexpectedEof)?;
        into.copy_from_slice(bytes);
        Ok(())
    }
}

fn content(salt: u8, len: usize) -> Vec<u8> {
    (0..len).map(|at| (at % 251) as u8 ^ salt).collect()
}

fn boot_files() -> BootFiles {
    let file = |bytes| -> BootData { Arc::new(InMemory(bytes)) };
    BootFiles { kernel: Some(file(content(1, 10_000))), initrd: Some(file(content(2, 70_000))) }
}

const SIZES: BootSizes =
    BootSizes { entry: 0x10_0000, kernel_bytes: 9000, setup_bytes: 1000, initrd_bytes: 70_000 };

fn user() -> Vec<UserItem> {
    let item = |name: &str, content: &[u8]| UserItem { name: name.into(), content: content.into() };
    vec![item("opt/b", b"second"), item("opt/a", b"")]
}

fn items() -> Items {
    Items::new(&Facts {
        ram_bytes: 0x1_2345_6789,
        cpus: 3,
        cmdline: "a=b",
        usable: &[MemoryRange { base: 0x10_0000, len_bytes: 0x8000 }],
        user: &user(),
    })
}

fn ram() -> GuestRam {
    GuestRam::from_ranges(&RamLayout::for_size(RAM_BYTES).unwrap().ranges()).unwrap()
}

fn device() -> FwCfg {
    let mut device = FwCfg::new(ram(), items());
    device.set_boot(SIZES, boot_files());
    device
}

fn select(device: &mut FwCfg, key: u16) {
    device.write(0, &key.to_le_bytes());
}

fn read(device: &mut FwCfg, key: u16, count: usize) -> Vec<u8> {
    select(device, key);
    (0..count)
        .map(|_| {
            let mut byte = [0xaa];
            device.read(1, &mut byte);
            byte[0]
        })
        .collect()
}

/// Puts a control block at `block` and starts it; returns what is left in its control field.
fn dma(device: &mut FwCfg, block: u64, control: u32, length: u32, address: u64) -> u32 {
    let bytes = [&control.to_be_bytes()[..], &length.to_be_bytes(), &address.to_be_bytes()];
    device.ram.write_slice(&bytes.concat(), GuestAddress(block)).unwrap();
    start(device, block);
    let mut control = [0; 4];
    device.ram.read_slice(&mut control, GuestAddress(block)).unwrap();
    u32::from_be_bytes(control)
}

fn start(device: &mut FwCfg, block: u64) {
    device.write(4, &((block >> 32) as u32).to_be_bytes());
    device.write(8, &(block as u32).to_be_bytes());
}

fn in_ram(device: &FwCfg, address: u64, len: usize) -> Vec<u8> {
    let mut bytes = vec![0; len];
    device.ram.read_slice(&mut bytes, GuestAddress(address)).unwrap();
    bytes
}

#[test]
fn a_kernel_reads_its_machine_byte_by_byte() {
    let mut device = device();
    assert_eq!(read(&mut device, 0, 6), b"QEMU\0\0");
    assert_eq!(read(&mut device, 1, 4), [3, 0, 0, 0], "traditional and DMA");
    assert_eq!(read(&mut device, 3, 8), 0x1_2345_6789_u64.to_le_bytes());
    assert_eq!((read(&mut device, 5, 2), read(&mut device, 15, 2)), (vec![3, 0], vec![3, 0]));
    assert_eq!(read(&mut device, 0x14, 4), [4, 0, 0, 0]);
    assert_eq!(read(&mut device, 0x15, 5), b"a=b\0\0");
    assert_eq!(read(&mut device, 0x4005, 2), [3, 0], "the write channel's bit is ignored");
    for nothing in [6, 0x1a, 0x3fff, 0x8005, 0xffff] {
        assert_eq!(read(&mut device, nothing, 9), [0; 9], "{nothing:#x}");
    }
}

#[test]
fn the_directory_has_every_file_by_name_with_its_number() {
    let mut device = device();
    let directory = read(&mut device, 0x19, 4 + 3 * 64 + 1);
    assert_eq!(directory[..4], [0, 0, 0, 3]);
    let entry = |index: usize| &directory[4 + index * 64..][..64];
    for (index, (len, name)) in
        [(20, &b"etc/e820\0"[..]), (0, b"opt/a\0"), (6, b"opt/b\0")].into_iter().enumerate()
    {
        let key = 0x20 + index as u8;
        assert_eq!(entry(index)[..8], [0, 0, 0, len, 0, key, 0, 0]);
        assert_eq!(&entry(index)[8..][..name.len()], name);
    }
    assert_eq!(read(&mut device, 0x22, 7), b"second\0");
    let e820 = read(&mut device, 0x20, 20);
    let fields = [&0x10_0000_u64.to_le_bytes()[..], &0x8000_u64.to_le_bytes(), &[1, 0, 0, 0]];
    assert_eq!(e820, fields.concat());
}

#[test]
fn boot_files_are_read_in_any_way_and_end_where_they_end() {
    let mut device = device();
    let (kernel, initrd) = (content(1, 10_000), content(2, 70_000));
    assert_eq!(read(&mut device, 0x18, 1001), [&kernel[..1000], &[0]].concat(), "setup");
    assert_eq!(read(&mut device, 0x11, 9001), [&kernel[1000..], &[0]].concat());
    assert_eq!(read(&mut device, 0x12, 70_001), [&initrd[..], &[0]].concat());
    assert_eq!(read(&mut device, 0x0b, 4), 70_000_u32.to_le_bytes());
    assert_eq!(read(&mut device, 0x10, 4), 0x10_0000_u32.to_le_bytes());
    let control = CONTROL_READ | CONTROL_SELECT | 0x12 << 16;
    assert_eq!(dma(&mut device, 0x1000, control, 80_000, 0x1_0000), 0);
    let copied = in_ram(&device, 0x1_0000, 80_000);
    assert_eq!((&copied[..70_000], &copied[70_000..]), (&initrd[..], &[0; 10_000][..]));
}

#[test]
fn dma_reads_skips_and_selects_and_marks_what_it_writes() {
    use crate::ram::PAGE_SIZE;
    use vm_memory::GuestMemoryRegion;
    use vm_memory::bitmap::Bitmap;
    let mut device = device();
    let mut signature = [0; 8];
    for (at, byte) in (4..).zip(signature.chunks_mut(4)) {
        device.read(4 + (at - 4) * 4, byte);
    }
    assert_eq!(&signature, b"QEMU CFG");
    let select = CONTROL_SELECT | 0x15 << 16;
    assert_eq!(dma(&mut device, 0x1000, select | CONTROL_SKIP, 2, u64::MAX), 0);
    assert_eq!(dma(&mut device, 0x1000, CONTROL_READ, 3, 0x9000), 0);
    assert_eq!(in_ram(&device, 0x9000, 3), b"b\0\0");
    let region = device.ram.find_region(GuestAddress(0)).unwrap();
    assert!(region.bitmap().dirty_at((9 * PAGE_SIZE) as usize), "the copy");
    assert!(region.bitmap().dirty_at(PAGE_SIZE as usize), "the control field");
    assert!(!region.bitmap().dirty_at((10 * PAGE_SIZE) as usize));
}

#[test]
fn what_cannot_be_done_leaves_the_error_bit_and_ram_as_it_was() {
    let mut device = device();
    let read = CONTROL_READ | CONTROL_SELECT;
    for (control, length, address, why) in [
        (read | CONTROL_WRITE, 1, RAM_BYTES, "behind RAM"),
        (read, 2, RAM_BYTES - 1, "over its end"),
        (read, 16, u64::MAX - 4, "around the end of addresses"),
        (read, MAX_DMA_BYTES + 1, 0, "too long"),
        (read, u32::MAX, 0, "much too long"),
        (read, 4, 0x1000, "over the control block"),
        (read, 4, 0xffd, "into it"),
        (read, 4, 0x100f, "over its end"),
        (CONTROL_WRITE, 4, 0x2000, "a write"),
        (CONTROL_WRITE | CONTROL_SELECT, 0, 0x2000, "an empty one"),
    ] {
        assert_eq!(dma(&mut device, 0x1000, control, length, address), CONTROL_ERROR, "{why}");
    }
    assert_eq!(in_ram(&device, 0x2000, 4), [0; 4]);
    for block in [RAM_BYTES - 15, RAM_BYTES, u64::MAX, u64::MAX - 15, 1 << 40] {
        start(&mut device, block);
    }
    assert_eq!(dma(&mut device, 0x1000, read, 4, 0x2000), 0);
    assert_eq!(in_ram(&device, 0x2000, 4), b"QEMU");
}

#[test]
fn accesses_of_other_widths_and_places_do_nothing() {
    let mut device = device();
    select(&mut device, 0);
    for offset in 0..u64::from(PORTS) {
        for len in [1, 2, 4, 8] {
            let mut data = vec![0xaa; len];
            if !(offset < 2 && len == 1) {
                device.read(offset, &mut data);
            }
            let known = (offset == 0 && len == 2) || (matches!(offset, 4 | 8) && len == 4);
            if !known {
                device.write(offset, &vec![0xff; len]);
            }
        }
    }
    let mut byte = [0];
    device.read(1, &mut byte);
    assert_eq!(&byte, b"Q", "still at the first byte");
}

#[test]
fn a_move_loses_neither_the_place_nor_a_half_address_nor_the_boot_files() {
    let mut source = device();
    select(&mut source, 0x12);
    source.read(1, &mut [0]);
    source.write(4, &0xffff_ffff_u32.to_be_bytes());
    let record = source.save_record("");
    let mut here = FwCfg::new(ram(), items());
    here.restore_record(record).unwrap();
    assert_eq!(here.save(), source.save());
    let mut byte = [0xaa];
    here.read(1, &mut byte);
    assert_eq!(byte, [0], "the files are not here yet");
    here.restore(source.save()).unwrap();
    here.set_boot_files(BootFiles { kernel: None, ..boot_files() });
    here.read(1, &mut byte);
    assert_eq!(byte, [0], "those are others");
    here.restore(source.save()).unwrap();
    here.set_boot_files(boot_files());
    here.read(1, &mut byte);
    assert_eq!(byte, [content(2, 2)[1]]);
    // The half address is the one that was written: this block is not in RAM.
    here.write(8, &0x1000_u32.to_be_bytes());
    assert_eq!(in_ram(&here, 0x1000, 4), [0; 4]);
}

/// A step of a guest.
#[derive(Debug, Clone)]
enum Step {
    Select(u16),
    Read,
    Dma { control: u32, length: u32, address: u64 },
    Move,
    Anything(u64, Vec<u8>),
}

fn any_key() -> impl Strategy<Value = u16> {
    prop_oneof![0..0x30_u16, any::<u16>()]
}

fn any_step() -> impl Strategy<Value = Step> {
    let control = (0..32_u32, any_key()).prop_map(|(bits, key)| bits | u32::from(key) << 16);
    let length = prop_oneof![0..100_u32, 0..100_000_u32, any::<u32>()];
    let address = prop_oneof![0..RAM_BYTES, (RAM_BYTES - 50)..(RAM_BYTES + 50), any::<u64>()];
    prop_oneof![
        any_key().prop_map(Step::Select),
        Just(Step::Read),
        (control, length, address).prop_map(|(control, length, address)| Step::Dma {
            control,
            length,
            address
        }),
        Just(Step::Move),
        (0..14_u64, prop::collection::vec(any::<u8>(), 1..9))
            .prop_map(|(offset, data)| Step::Anything(offset, data)),
    ]
}

/// All bytes of an item, as simply as can be.
fn whole(key: u16) -> Vec<u8> {
    let (kernel, initrd) = (content(1, 10_000), content(2, 70_000));
    match key & 0x3fff {
        _ if key & 0x8000 != 0 => Vec::new(),
        0x11 => kernel[1000..].to_vec(),
        0x18 => kernel[..1000].to_vec(),
        0x12 => initrd,
        item => {
            let mut bytes = vec![0; 1000];
            let mut items = items();
            items.set_boot_sizes(SIZES);
            items.read(item, 0, &mut bytes);
            bytes
        }
    }
}

proptest! {
    #[test]
    fn any_sequence_reads_what_a_simple_model_reads(
        steps in prop::collection::vec(any_step(), 1..40),
    ) {
        const BLOCK: u64 = 0x3000;
        let mut device = device();
        let (mut key, mut offset) = (0_u16, 0_usize);
        let byte_at = |key: u16, offset: usize| whole(key).get(offset).copied().unwrap_or(0);
        for step in steps {
            match step {
                Step::Select(next) => {
                    select(&mut device, next);
                    (key, offset) = (next, 0);
                }
                Step::Read => {
                    let mut byte = [0xaa];
                    device.read(1, &mut byte);
                    prop_assert_eq!(byte[0], byte_at(key, offset));
                    offset += 1;
                }
                Step::Dma { control, length, address } => {
                    let answer = dma(&mut device, BLOCK, control, length, address);
                    if control & CONTROL_SELECT != 0 {
                        (key, offset) = ((control >> 16) as u16, 0);
                    }
                    let end = address.checked_add(u64::from(length));
                    let apart = end.is_some_and(|end| end <= BLOCK || address >= BLOCK + 16);
                    let fits = end.is_some_and(|end| end <= RAM_BYTES) || length == 0;
                    let reads = control & CONTROL_READ != 0;
                    let writes = !reads && control & CONTROL_WRITE != 0;
                    // An empty read over the block's inside touches nothing, and is refused all the same.
                    let done = !writes && (!reads || apart && fits);
                    prop_assert_eq!(answer, if done { 0 } else { CONTROL_ERROR });
                    if done && reads {
                        let item = whole(key);
                        let copied = in_ram(&device, if length == 0 { 0 } else { address }, length as usize);
                        for (at, byte) in copied.iter().enumerate() {
                            prop_assert_eq!(*byte, item.get(offset + at).copied().unwrap_or(0));
                        }
                    }
                    if done && (reads || control & CONTROL_SKIP != 0) {
                        offset = (offset + length as usize).min(u32::MAX as usize);
                    }
                }
                Step::Move => {
                    let mut there = FwCfg::new(device.ram.clone(), items());
                    there.restore_record(device.save_record("")).unwrap();
                    there.set_boot_files(boot_files());
                    device = there;
                }
                Step::Anything(at, data) => {
                    let mut read = data.clone();
                    device.read(at, &mut read);
                    if at < 2 && data.len() == 1 {
                        offset += 1;
                    }
                    // Selects are a step of their own, and so are addresses.
                    if !(at == 0 && data.len() == 2 || matches!(at, 4 | 8) && data.len() == 4) {
                        device.write(at, &data);
                    }
                }
            }
        }
    }
}
