//! ACPI tables (ACPI 6.5): hardware-reduced, so that power-off, reset and the power button need three
//! byte-wide ports and one edge interrupt instead of a PM1 block with a level-triggered SCI.
//!
//! ```text
//! RSDP -> XSDT -> FADT (sleep and reset registers) -> DSDT (COM1, virtio-mmio, power button)
//!              -> MADT (local APICs, IOAPIC)
//! ```
//! They lie where a BIOS would put them, in memory that no guest uses as free RAM.

use super::layout::{
    ACPI_END, ACPI_RSDP, COM1_GSI, COM1_PORT, FW_CFG_PORT, I8042_COMMAND_PORT, MmioSlot,
    POWER_BUTTON_GSI, PVPANIC_PORT, SLEEP_CONTROL_PORT, SLEEP_STATUS_PORT,
};
use super::{BootError, narrow, write_bytes};
use acpi_tables::aml::{
    Arg, Device, EISAName, Equal, IO, If, Interrupt, Memory32Fixed, Method, Name, Notify, Package,
    Path, ResourceTemplate, Scope,
};
use acpi_tables::fadt::{FADTBuilder, Flags};
use acpi_tables::gas::{AccessSize, AddressSpace, GAS};
use acpi_tables::madt::{
    EnabledStatus, IoApic, LocalInterruptController, MADT, ProcessorLocalApic,
};
use acpi_tables::rsdp::Rsdp;
use acpi_tables::sdt::Sdt;
use acpi_tables::xsdt::XSDT;
use acpi_tables::{Aml, AmlSink};
use devices::ram::GuestRam;
use devices::reset::{I8042, SleepControl};
use devices::virtio::mmio::MMIO_LEN;

const OEM_ID: [u8; 6] = *b"FERRY ";
const OEM_TABLE_ID: [u8; 8] = *b"FERRYVM ";
const OEM_REVISION: u32 = 1;
const LOCAL_APIC_ADDRESS: u32 = 0xfee0_0000;
const IOAPIC_ADDRESS: u32 = 0xfec0_0000;
const SDT_HEADER_BYTES: u32 = 36;
/// `IAPC_BOOT_ARCH` (5.2.9.3): there is neither VGA nor a CMOS clock.
const NO_VGA_NO_CMOS: u16 = 1 << 2 | 1 << 5;

/// Hardware described to the kernel, in ACPI tables or on its command line.
#[derive(Debug, Clone)]
pub struct Hardware {
    /// Whether the guest gets ACPI tables.
    pub acpi: bool,
    /// vCPUs; APIC ids are 0 to `cpus - 1`.
    pub cpus: u8,
    /// Whether there are fw_cfg and pvpanic.
    pub fw_cfg: bool,
    /// Virtio devices.
    pub virtio: Vec<MmioSlot>,
}

/// Writes all tables; returns the address of the RSDP.
pub(super) fn write_tables(hardware: &Hardware, ram: &GuestRam) -> Result<u64, BootError> {
    let mut next = ACPI_RSDP + Rsdp::len() as u64;
    let mut place = |table: &[u8]| {
        let address = next.next_multiple_of(16);
        next = address + table.len() as u64;
        if next > ACPI_END {
            return Err(BootError::Ram("the ACPI tables do not fit below 1 MiB".into()));
        }
        write_bytes(ram, address, table).map(|()| address)
    };
    let dsdt = place(&dsdt(hardware)?)?;
    let fadt = place(&bytes(&fadt(dsdt)))?;
    let madt = place(&bytes(&madt(hardware.cpus)))?;
    let mut xsdt = XSDT::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION);
    xsdt.add_entry(fadt);
    xsdt.add_entry(madt);
    let xsdt = place(&bytes(&xsdt))?;
    write_bytes(ram, ACPI_RSDP, &bytes(&Rsdp::new(OEM_ID, xsdt)))?;
    Ok(ACPI_RSDP)
}

/// Collects a table's bytes.
#[derive(Default)]
struct Collected(Vec<u8>);

impl AmlSink for Collected {
    fn byte(&mut self, byte: u8) {
        self.0.push(byte);
    }
}

fn bytes(table: &dyn Aml) -> Vec<u8> {
    let mut collected = Collected::default();
    table.to_aml_bytes(&mut collected);
    collected.0
}

fn byte_port(port: u64) -> GAS {
    GAS::new(AddressSpace::SystemIo, 8, 0, AccessSize::ByteAccess, port)
}

fn fadt(dsdt: u64) -> acpi_tables::fadt::FADT {
    let mut fadt = FADTBuilder::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION)
        .dsdt_64(dsdt)
        .flag(Flags::HwReducedAcpi)
        .flag(Flags::ResetRegSup)
        // The button is a device in the DSDT, not a fixed one.
        .flag(Flags::PwrButton)
        .flag(Flags::SlpButton);
    fadt.iapc_boot_arch = NO_VGA_NO_CMOS.into();
    fadt.reset_reg = byte_port(I8042_COMMAND_PORT);
    fadt.reset_value = I8042::COMMAND_RESET_CPU;
    fadt.sleep_control_reg = byte_port(SLEEP_CONTROL_PORT.into());
    fadt.sleep_status_reg = byte_port(SLEEP_STATUS_PORT.into());
    fadt.finalize()
}

fn madt(cpus: u8) -> MADT {
    let local = LocalInterruptController::Address(LOCAL_APIC_ADDRESS);
    let mut madt = MADT::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION, local);
    for id in 0..cpus {
        madt.add_structure(ProcessorLocalApic::new(id, id, EnabledStatus::Enabled));
    }
    madt.add_structure(IoApic::new(0, IOAPIC_ADDRESS, 0));
    madt
}

fn edge(gsi: u32) -> Interrupt {
    Interrupt::new(true, true, false, false, gsi)
}

fn dsdt(hardware: &Hardware) -> Result<Vec<u8>, BootError> {
    let mut dsdt = Sdt::new(*b"DSDT", SDT_HEADER_BYTES, 6, OEM_ID, OEM_TABLE_ID, OEM_REVISION);
    let mut append = |object: &dyn Aml| dsdt.append_slice(&bytes(object));
    append(&Scope::new("_SB_".into(), vec![&Com1, &PowerButton, &EventDevice]));
    if hardware.fw_cfg {
        append(&Scope::new("_SB_".into(), vec![&FW_CFG, &PVPANIC]));
    }
    for (index, slot) in hardware.virtio.iter().enumerate() {
        let base = narrow("a virtio device's address", slot.base)?;
        let len_bytes = narrow("a virtio device's length", MMIO_LEN)?;
        let device = Virtio { index, base, len_bytes, gsi: slot.gsi };
        append(&Scope::new("_SB_".into(), vec![&device]));
    }
    // The value to write to the sleep control register for S5 (7.4.2).
    let s5 = Package::new(vec![&SleepControl::SLP_TYP_S5]);
    append(&Name::new("_S5_".into(), &s5));
    dsdt.update_checksum();
    Ok(dsdt.as_slice().to_vec())
}

struct Com1;

impl Aml for Com1 {
    fn to_aml_bytes(&self, sink: &mut dyn AmlSink) {
        let (io, irq) = (IO::new(COM1_PORT, COM1_PORT, 0, 8), edge(COM1_GSI));
        Device::new(
            "COM1".into(),
            vec![
                &Name::new("_HID".into(), &EISAName::new("PNP0501")),
                &Name::new("_UID".into(), &0u8),
                &Name::new("_CRS".into(), &ResourceTemplate::new(vec![&io, &irq])),
            ],
        )
        .to_aml_bytes(sink);
    }
}

/// A device with ports and nothing else.
struct Ports {
    name: &'static str,
    hid: &'static str,
    base: u16,
    len: u8,
}

const FW_CFG: Ports = Ports { name: "FWCF", hid: "QEMU0002", base: FW_CFG_PORT, len: 12 };
const PVPANIC: Ports = Ports { name: "PEVT", hid: "QEMU0001", base: PVPANIC_PORT, len: 1 };

impl Aml for Ports {
    fn to_aml_bytes(&self, sink: &mut dyn AmlSink) {
        /// Present, enabled and working, but nothing to show to users (6.3.7).
        const HIDDEN: u8 = 0b1011;
        let io = IO::new(self.base, self.base, 1, self.len);
        Device::new(
            self.name.into(),
            vec![
                &Name::new("_HID".into(), &self.hid),
                &Name::new("_STA".into(), &HIDDEN),
                &Name::new("_CRS".into(), &ResourceTemplate::new(vec![&io])),
            ],
        )
        .to_aml_bytes(sink);
    }
}

/// A control-method power button (4.8.3.1.2); [`EventDevice`] presses it.
struct PowerButton;

impl Aml for PowerButton {
    fn to_aml_bytes(&self, sink: &mut dyn AmlSink) {
        let hid = EISAName::new("PNP0C0C");
        Device::new("PWRB".into(), vec![&Name::new("_HID".into(), &hid)]).to_aml_bytes(sink);
    }
}

/// Generic event device (5.6.9): its interrupt means that the power button was pressed.
struct EventDevice;

impl Aml for EventDevice {
    fn to_aml_bytes(&self, sink: &mut dyn AmlSink) {
        const PRESSED: u8 = 0x80;
        let irq = edge(POWER_BUTTON_GSI);
        let (button, which) = (Path::new("PWRB"), Arg(0));
        let is_button = Equal::new(&which, &POWER_BUTTON_GSI);
        let press = Notify::new(&button, &PRESSED);
        Device::new(
            "GED_".into(),
            vec![
                &Name::new("_HID".into(), &"ACPI0013"),
                &Name::new("_UID".into(), &0u8),
                &Name::new("_CRS".into(), &ResourceTemplate::new(vec![&irq])),
                &Method::new("_EVT".into(), 1, true, vec![&If::new(&is_button, vec![&press])]),
            ],
        )
        .to_aml_bytes(sink);
    }
}

struct Virtio {
    index: usize,
    base: u32,
    len_bytes: u32,
    gsi: u32,
}

impl Aml for Virtio {
    fn to_aml_bytes(&self, sink: &mut dyn AmlSink) {
        let registers = Memory32Fixed::new(true, self.base, self.len_bytes);
        let irq = edge(self.gsi);
        Device::new(
            Path::new(&format!("V{:03}", self.index)),
            vec![
                &Name::new("_HID".into(), &"LNRO0005"),
                &Name::new("_UID".into(), &self.index),
                &Name::new("_CCA".into(), &1u8),
                &Name::new("_CRS".into(), &ResourceTemplate::new(vec![&registers, &irq])),
            ],
        )
        .to_aml_bytes(sink);
    }
}

#[cfg(test)]
mod tests {
    use super::super::layout::virtio_slot;
    use super::super::test_ram;
    use super::*;
    use devices::ram::GuestAddress;
    use vm_memory::Bytes;

    fn written() -> Vec<u8> {
        let (ram, _) = test_ram(4 << 20);
        let hardware = Hardware {
            acpi: true,
            cpus: 3,
            fw_cfg: true,
            virtio: (0..2).filter_map(virtio_slot).collect(),
        };
        assert_eq!(write_tables(&hardware, &ram).unwrap(), ACPI_RSDP);
        let mut bytes = vec![0; usize::try_from(ACPI_END - ACPI_RSDP).unwrap()];
        ram.read_slice(&mut bytes, GuestAddress(ACPI_RSDP)).unwrap();
        bytes
    }

    fn number(bytes: &[u8]) -> usize {
        bytes.iter().rev().fold(0, |value, byte| value << 8 | usize::from(*byte))
    }

    fn table(bytes: &[u8], address: usize) -> &[u8] {
        let at = address - usize::try_from(ACPI_RSDP).unwrap();
        &bytes[at..at + number(&bytes[at + 4..at + 8])]
    }

    fn sum(bytes: &[u8]) -> u8 {
        bytes.iter().fold(0, |sum: u8, byte| sum.wrapping_add(*byte))
    }

    #[test]
    fn every_table_is_found_from_the_root_and_sums_to_zero() {
        let bytes = written();
        assert_eq!((&bytes[..8], sum(&bytes[..20]), sum(&bytes[..36])), (&b"RSD PTR "[..], 0, 0));
        let xsdt = table(&bytes, number(&bytes[24..32]));
        assert_eq!((&xsdt[..4], sum(xsdt)), (&b"XSDT"[..], 0));
        let [fadt, madt] = [36, 44].map(|at| table(&bytes, number(&xsdt[at..at + 8])));
        assert_eq!((&fadt[..4], sum(fadt)), (&b"FACP"[..], 0));
        assert_eq!((&madt[..4], sum(madt)), (&b"APIC"[..], 0));
        assert_eq!(madt.len(), 44 + 3 * 8 + 12, "three local APICs and one IOAPIC");
        let dsdt = table(&bytes, number(&fadt[140..148]));
        assert_eq!((&dsdt[..4], sum(dsdt)), (&b"DSDT"[..], 0));
        let named = |name: &[u8]| dsdt.windows(name.len()).any(|window| window == name);
        for name in
            ["V000", "V001", "LNRO0005", "COM1", "PWRB", "ACPI0013", "QEMU0002", "QEMU0001", "_S5_"]
        {
            assert!(named(name.as_bytes()), "{name}");
        }
        assert!(!named(b"V002"));
    }
}
