//! A hostile source's device section and machine description: whatever their bytes are, parsing them takes
//! at most a small multiple of their length, nothing panics, and the error names the device.
#![allow(clippy::unwrap_used, reason = "a test may panic, in its helpers too")]

use devices::debug_console::{DebugConsole, DebugOutput};
use devices::fw_cfg::{Facts, FwCfg, Items};
use devices::irq::IrqLine;
use devices::ram::{GuestRam, RamLayout};
use devices::serial::SerialConsole;
use devices::state::{DeviceRecord, JsonText, MAX_RECORDS, MAX_STATE_BYTES, Persist, RestoreError};
use devices::testdev::{Levels, TestLines, TestMemory};
use devices::transmitter::Transmitter;
use migration::guest::MachineDescription;
use migration::wire::{MAX_MACHINE_BYTES, MAX_SECTION_BYTES};
use proptest::prelude::*;
use serde::de::DeserializeOwned;
use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::io;
use std::sync::Arc;
use vmm::kvm::cpu_state::VcpuState;
use vmm::kvm::vm_state::{ClockState, IrqchipState};
use vmm::machine::description::Description;

/// Counts what each thread has allocated, and the most it had at once.
struct Counting;

thread_local! {
    static NOW: Cell<isize> = const { Cell::new(0) };
    static MOST: Cell<isize> = const { Cell::new(0) };
}

fn count(bytes: isize) {
    // Neither needs a destructor, so they can be had at a thread's end, too.
    let now = NOW.get() + bytes;
    NOW.set(now);
    MOST.set(MOST.get().max(now));
}

// SAFETY: everything is passed on to the system's allocator as it came.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        count(layout.size().cast_signed());
        // SAFETY: the caller's.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, at: *mut u8, layout: Layout) {
        count(-layout.size().cast_signed());
        // SAFETY: the caller's.
        unsafe { System.dealloc(at, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// The most that `work` had allocated at once, in bytes.
fn most_allocated<T>(work: impl FnOnce() -> T) -> (T, usize) {
    let before = NOW.get();
    MOST.set(before);
    let result = work();
    (result, (MOST.get() - before).unsigned_abs())
}

/// Texts that are much larger as trees of values than as bytes, of up to `bytes`.
fn bombs(bytes: usize) -> Vec<String> {
    let filled = |open: &str, element: &str, close: &str| {
        let count = (bytes - open.len() - close.len()) / element.len();
        let mut text = open.to_owned() + &element.repeat(count);
        text.pop();
        text + close
    };
    vec![
        filled("[", "0,", "]"),
        filled("[", "[],", "]"),
        filled("[", "{},", "]"),
        filled("[", r#"{"":0},"#, "]"),
        filled("[", r#""","#, "]"),
        "[".repeat(bytes / 2) + &"]".repeat(bytes / 2),
        format!("\"{}\"", "a".repeat(bytes - 2)),
        filled(r#"{"":0,"#, r#""":[],"#, "}"),
    ]
}

/// As [`bombs`], in place of each member of the object `like` and beside them.
fn bombs_in(like: &str, bytes: usize) -> Vec<String> {
    let object: serde_json::Map<String, serde_json::Value> = serde_json::from_str(like).unwrap();
    let room = bytes - like.len() - 16;
    let mut texts = bombs(bytes);
    for bomb in bombs(room) {
        for name in object.keys() {
            let member = |(key, value): (&String, &serde_json::Value)| {
                let value = if key == name { bomb.clone() } else { value.to_string() };
                format!("{key:?}:{value}")
            };
            let members: Vec<_> = object.iter().map(member).collect();
            texts.push(format!("{{{}}}", members.join(",")));
        }
        texts.push(format!("{}, \"more\": {bomb}}}", &like[..like.rfind('}').unwrap()]));
    }
    texts
}

struct NoIrq;

impl Levels for NoIrq {
    fn set(&self, _: u32, _: bool) -> io::Result<()> {
        Ok(())
    }
}

impl IrqLine for NoIrq {
    fn raise(&self) -> io::Result<()> {
        Ok(())
    }
}

fn console() -> SerialConsole {
    SerialConsole::new(Arc::new(NoIrq), Arc::new(Transmitter::new(None).unwrap())).unwrap()
}

fn record(kind: &str, instance: &str, state: JsonText) -> DeviceRecord {
    DeviceRecord { kind: kind.into(), instance: instance.into(), version: 1, state }
}

const VCPU: &str = include_str!("../src/kvm/testdata/vcpu-v1.json");
const CLOCK: &str = r#"{"clock_ns":8270768,"realtime_ns":null,"host_tsc":null}"#;
const IRQCHIP: &str = r#"{"pic_master":"00","pic_slave":"00","ioapic":"00","pit":"00"}"#;

/// Opens a record as the machine does; the result is of no interest.
fn open<T: DeserializeOwned>(kind: &'static str, state: &JsonText) -> Result<(), RestoreError> {
    record(kind, "7", state.clone()).open::<T>(kind, 1).map(drop)
}

const FW_CFG: &str = r#"{"selected":0,"offset":0,"dma_high":0,"boot":{"entry":0,"kernel_bytes":0,"setup_bytes":0,"initrd_bytes":0}}"#;

fn fw_cfg() -> FwCfg {
    let layout = RamLayout::for_size(2 << 20).unwrap();
    let ram = GuestRam::from_ranges(&layout.ranges()).unwrap();
    let facts = Facts { ram_bytes: 2 << 20, cpus: 1, cmdline: "", usable: &[], user: &[] };
    FwCfg::new(ram, Items::new(&facts))
}

type Open = fn(&JsonText) -> Result<(), RestoreError>;

/// Each kind of record that the machine has, with a valid or at least complete state of it.
fn kinds() -> Vec<(&'static str, String, Open)> {
    let serial = serde_json::to_string(&Persist::save(&console())).unwrap();
    let serial = serial.replace("\"scratch\"", "\"unsent\":[1],\"scratch\"");
    vec![
        ("vcpu", VCPU.trim().to_owned(), |state| {
            let opened = record("vcpu", "7", state.clone()).open::<VcpuState>("vcpu", 1)?;
            let _ = opened.validate();
            Ok(())
        }),
        ("clock", CLOCK.to_owned(), |state| open::<ClockState>("clock", state)),
        ("irqchip", IRQCHIP.to_owned(), |state| open::<IrqchipState>("irqchip", state)),
        ("serial", serial, |state| console().restore_record(record("serial", "7", state.clone()))),
        ("fw-cfg", FW_CFG.to_owned(), |state| {
            fw_cfg().restore_record(record("fw-cfg", "7", state.clone()))
        }),
        ("debug-console", r#"{"unsent":[1]}"#.to_owned(), |state| {
            let transmitter = Arc::new(Transmitter::new(None).unwrap());
            let mut console = DebugConsole::new(DebugOutput::Own(transmitter));
            console.restore_record(record("debug-console", "7", state.clone()))
        }),
        ("testdev-lines", r#"{"high":16777215}"#.to_owned(), |state| {
            let mut lines = TestLines::new(Box::new(NoIrq));
            lines.restore_record(record("testdev-lines", "7", state.clone()))
        }),
        ("testdev-memory", r#"{"bytes":"00"}"#.to_owned(), |state| {
            TestMemory::default().restore_record(record("testdev-memory", "7", state.clone()))
        }),
    ]
}

/// What a typed state may take beside its text: the largest are an XSAVE image of 64 KiB and a vector of
/// 64 KiB that was doubled last.
const MAX_TYPED_BYTES: usize = 256 << 10;

#[test]
fn no_state_takes_more_than_its_bound_and_the_error_names_the_device() {
    for (kind, like, open) in kinds() {
        for text in bombs_in(&like, MAX_STATE_BYTES) {
            let state: JsonText = match serde_json::from_str(&text) {
                Ok(state) => state,
                // Nested too deeply even to be kept as text.
                Err(_) => continue,
            };
            let (result, most) = most_allocated(|| open(&state));
            // Its own copy of the text, and what an error quotes of it.
            let bound = 4 * MAX_STATE_BYTES + MAX_TYPED_BYTES;
            assert!(most <= bound, "{kind}: {most} bytes for {:.60}…", text);
            let error = result.unwrap_err().to_string();
            assert!(error.starts_with(&format!("{kind} \"7\": ")), "{error:.99}");
        }
        let long: JsonText = serde_json::from_str(&bombs(2 * MAX_STATE_BYTES)[0]).unwrap();
        let error = open(&long).unwrap_err();
        assert!(matches!(error, RestoreError::TooLong { .. }), "{kind}: {error}");
    }
}

#[test]
fn a_section_takes_no_more_than_its_text_and_has_no_more_records_than_a_machine() {
    let bytes = MAX_SECTION_BYTES as usize;
    let like = r#"{"kind":"vcpu","instance":"0","version":1,"state":0}"#;
    let many = |count: usize| format!("[{}]", vec![like; count].join(","));
    let mut texts: Vec<_> =
        bombs_in(like, bytes - 2).into_iter().map(|record| format!("[{record}]")).collect();
    texts.extend(bombs(bytes));
    texts.push(many(bytes / (like.len() + 1)));
    for text in texts {
        let (_, most) = most_allocated(|| DeviceRecord::list_from_json(text.as_bytes()).map(drop));
        // Its states as text, or what an error quotes in a text that grows.
        assert!(most <= 4 * bytes, "{most} bytes for {:.60}…", text);
    }
    assert_eq!(
        DeviceRecord::list_from_json(many(MAX_RECORDS).as_bytes()).unwrap().len(),
        MAX_RECORDS
    );
    let error = DeviceRecord::list_from_json(many(MAX_RECORDS + 1).as_bytes()).unwrap_err();
    assert!(error.to_string().contains(&format!("more than {MAX_RECORDS} elements")), "{error}");
}

#[test]
fn a_machine_description_takes_no_more_than_a_small_multiple_of_its_text() {
    let bytes = MAX_MACHINE_BYTES as usize;
    let like = r#"{"name":null,"memory_bytes":4194304,"cpus":1,"cmdline":"","disks":[],"cpuid":[],"tsc_khz":1}"#;
    for text in bombs_in(like, bytes) {
        let stream = format!(r#"{{"version":1,"ram_bytes":4194304,"machine":{text}}}"#);
        let (result, most) = most_allocated(|| {
            let stream = serde_json::from_str::<MachineDescription>(&stream).ok()?;
            Description::from_stream(&stream).ok()
        });
        assert!(most <= 5 * bytes, "{most} bytes for {:.60}…", text);
        assert!(result.is_none(), "{:.60}", text);
    }
}

proptest! {
    #[test]
    fn any_change_of_a_records_text_is_survived(
        which in 0..8_usize,
        changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..8),
        cut in prop::option::of(any::<prop::sample::Index>()),
    ) {
        let (kind, like, open) = kinds().swap_remove(which);
        let mut bytes = like.into_bytes();
        for (at, byte) in changes {
            let at = at.index(bytes.len());
            bytes[at] = byte;
        }
        if let Some(cut) = cut {
            let len = cut.index(bytes.len());
            bytes.truncate(len);
        }
        if let Ok(state) = serde_json::from_slice::<JsonText>(&bytes)
            && let Err(error) = open(&state)
        {
            prop_assert!(error.to_string().starts_with(kind), "{error}");
        }
    }
}
