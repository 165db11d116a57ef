//! The console's registers, its record, and output that is held, moved and released.

use super::*;
use crate::hostile::{any_changes, any_json, change};
use crate::irq::CountingIrq;
use crate::transmitter::{BUFFER_BYTES, FIFO_BYTES as TRANSMITTER_BYTES};
use proptest::prelude::*;

/// A console whose output is released, without a console thread.
fn console() -> (SerialConsole, Arc<CountingIrq>) {
    let irq = Arc::new(CountingIrq::default());
    let transmitter = Arc::new(Transmitter::new(None).unwrap());
    let console = SerialConsole::new(irq.clone(), transmitter).unwrap();
    console.release_output();
    (console, irq)
}

fn read(console: &mut SerialConsole, offset: u64) -> u8 {
    let mut byte = [0];
    console.read(offset, &mut byte);
    byte[0]
}

fn is_ready(console: &mut SerialConsole) -> bool {
    let status = read(console, LSR) & LSR_TRANSMITTER_READY;
    assert!(status == 0 || status == LSR_TRANSMITTER_READY, "{status:#x}");
    status != 0
}

/// Writes like a driver until the transmitter is not ready; returns the byte count.
fn fill(console: &mut SerialConsole) -> usize {
    let mut written = 0;
    while is_ready(console) {
        for _ in 0..TRANSMITTER_BYTES {
            console.write(DATA, b"x");
            written += 1;
        }
    }
    written
}

/// Sends up to `most` pending bytes, like the console's thread.
fn send(console: &SerialConsole, most: usize) -> Vec<u8> {
    let mut bytes = Vec::new();
    if console.transmitter.begin_write(&mut bytes) {
        bytes.truncate(most);
        console.transmitter.end_write(bytes.len());
    }
    bytes
}

#[test]
fn input_and_registers_survive_a_move() {
    let (mut source, _) = console();
    source.write(1, &[1]);
    source.write(7, &[0x5a]);
    assert_eq!(source.enqueue_input(b"hi"), 2);
    let (mut destination, irq) = console();
    destination.restore_record(source.save_record("")).unwrap();
    destination.resume();
    assert!(irq.count() > 0, "the interrupt in flight is raised again");
    assert_eq!(read(&mut destination, 7), 0x5a);
    assert_eq!([read(&mut destination, 0), read(&mut destination, 0)], *b"hi");
}

#[test]
fn a_full_fifo_takes_no_more_and_says_when_it_has_room() {
    let (mut console, _) = console();
    assert_eq!(console.enqueue_input(&[7; 100]), FIFO_BYTES);
    assert_eq!(console.enqueue_input(&[7]), 0);
    let _ = console.room_event().read();
    read(&mut console, 0);
    assert!(console.room_event().read().is_ok());
    assert_eq!(console.enqueue_input(&[7]), 1);
}

#[test]
fn an_overfull_fifo_or_transmitter_in_a_record_is_refused() {
    let (mut console, _) = console();
    let mut state = console.save();
    state.input_fifo = vec![0; FIFO_BYTES + 1];
    assert!(console.restore(state).is_err());
    let mut state = console.save();
    state.unsent = vec![0; BUFFER_BYTES];
    assert!(console.restore(state.clone()).is_ok());
    assert!(!is_ready(&mut console));
    state.unsent.push(0);
    assert!(console.restore(state).unwrap_err().contains("65537"));
}

#[test]
fn a_transmitter_that_nobody_empties_is_not_ready_and_loses_nothing() {
    let (mut console, _) = console();
    let written = fill(&mut console);
    assert!(written > BUFFER_BYTES - TRANSMITTER_BYTES, "{written}");
    assert_eq!(console.transmitter.unsent().len(), written);
    // A guest that ignores LSR loses what does not fit.
    for _ in 0..TRANSMITTER_BYTES + 3 {
        console.write(DATA, b"y");
    }
    assert_eq!(console.transmitter.unsent().len(), BUFFER_BYTES);
    assert!(console.transmitter.unsent().starts_with(&vec![b'x'; written]));
    assert_eq!(send(&console, 1).len(), 1);
    assert!(!is_ready(&mut console), "a driver may write a whole FIFO once it is ready");
    assert_eq!(send(&console, TRANSMITTER_BYTES).len(), TRANSMITTER_BYTES);
    assert!(is_ready(&mut console));
}

#[test]
fn room_in_the_transmitter_interrupts_a_guest_that_asked_for_it() {
    let (mut console, irq) = console();
    console.write(IER, &[IER_TRANSMITTER_EMPTY]);
    assert_eq!(irq.count(), 1, "it is ready when the interrupt is enabled");
    assert_eq!(read(&mut console, IIR), IIR_FIFO | IIR_TRANSMITTER_EMPTY);
    assert_eq!(read(&mut console, IIR), IIR_FIFO | IIR_NONE, "read once");
    fill(&mut console);
    read(&mut console, IIR);
    let before = irq.count();
    send(&console, 1);
    assert_eq!(irq.count(), before, "not enough room yet");
    assert_eq!(read(&mut console, IIR), IIR_FIFO | IIR_NONE);
    send(&console, BUFFER_BYTES);
    assert_eq!(irq.count(), before + 1);
    assert_eq!(read(&mut console, IIR), IIR_FIFO | IIR_TRANSMITTER_EMPTY);
    // A byte that is sent at once leaves the transmitter ready again.
    console.write(DATA, b"x");
    assert_eq!(irq.count(), before + 2);
    // Received data has priority, and the transmitter interrupt stays pending.
    console.write(IER, &[IER_TRANSMITTER_EMPTY | IER_RECEIVED]);
    console.enqueue_input(b"i");
    assert_eq!(read(&mut console, IIR), IIR_FIFO | IIR_RECEIVED);
    assert_eq!(read(&mut console, DATA), b'i');
    assert_eq!(read(&mut console, IIR), IIR_FIFO | IIR_TRANSMITTER_EMPTY);
}

#[test]
fn unsent_output_moves_and_is_sent_on_one_side_only() {
    let (mut source, _) = console();
    for byte in b"sent unsent" {
        source.write(DATA, &[*byte]);
    }
    assert_eq!(send(&source, 5), b"sent ");
    source.hold_output();
    let record = source.save_record("");
    assert_eq!(send(&source, 100), b"", "held");
    let (mut destination, _) = console();
    destination.hold_output();
    destination.restore_record(record).unwrap();
    assert_eq!(send(&destination, 100), b"", "not its guest yet");
    destination.release_output();
    assert_eq!(send(&destination, 100), b"unsent");
    // The migration failed.
    source.release_output();
    assert_eq!(send(&source, 100), b"unsent");
}

#[test]
fn a_machine_that_gave_its_guest_away_leaves_nothing_to_the_console() {
    for (is_held, left) in [(true, &b""[..]), (false, b"x")] {
        let (mut console, _) = console();
        let transmitter = console.transmitter.clone();
        console.write(DATA, b"x");
        if is_held {
            console.hold_output();
        }
        drop(console);
        transmitter.release();
        assert_eq!(transmitter.unsent(), left);
    }
}

#[test]
fn a_record_of_version_1_before_there_was_unsent_output_is_loaded() {
    let (mut console, _) = console();
    let text = r#"{"divisor_low":12,"divisor_high":0,"interrupt_enable":3,
        "interrupt_identification":2,"line_control":3,"line_status":96,"modem_control":11,
        "modem_status":176,"scratch":0,"input_fifo":[]}"#;
    let mut record = console.save_record("");
    record.state = serde_json::from_str(text).unwrap();
    console.restore_record(record.clone()).unwrap();
    assert_eq!(console.save_record(""), record, "and an older Ferry takes it back");
    assert_eq!(read(&mut console, IIR), IIR_FIFO | IIR_TRANSMITTER_EMPTY);
}

#[test]
fn input_waits_for_the_end_of_loopback_mode() {
    let (mut console, _) = console();
    console.write(MCR, &[MCR_LOOP]);
    assert_eq!((console.input_room(), console.enqueue_input(b"hi")), (0, 0));
    assert!(console.room_event().read().is_err());
    console.write(MCR, &[0]);
    assert!(console.room_event().read().is_ok(), "whoever has input is told to try again");
    assert_eq!(console.enqueue_input(b"hi"), 2);
}

#[test]
fn loopback_mode_answers_as_drivers_that_probe_expect() {
    let (mut console, _) = console();
    console.write(MCR, &[MCR_LOOP | 0x0a]);
    assert_eq!(read(&mut console, MSR), 0x90, "RTS and OUT2 come back as CTS and DCD");
    console.write(DATA, b"x");
    assert_eq!(read(&mut console, LSR), LSR_DATA_READY | LSR_TRANSMITTER_READY);
    assert_eq!(read(&mut console, DATA), b'x');
    assert_eq!(console.transmitter.unsent(), b"");
}

proptest! {
    #[test]
    fn any_access_is_survived_and_what_it_leaves_moves(
        accesses in prop::collection::vec((0u64..10, any::<u8>(), 0..3), 0..200)
    ) {
        let (mut source, _) = console();
        for (offset, value, kind) in accesses {
            match kind {
                0 => source.write(offset, &[value]),
                1 => drop(source.enqueue_input(&vec![value; value.into()])),
                _ => drop(read(&mut source, offset)),
            }
        }
        let (mut destination, _) = console();
        destination.restore_record(source.save_record("")).unwrap();
        destination.resume();
        prop_assert_eq!(destination.save(), source.save());
    }

    #[test]
    fn output_arrives_once_and_in_order_however_it_is_sent_and_moved(
        steps in prop::collection::vec((0..4, 0usize..40_000), 0..60)
    ) {
        let (mut here, _) = console();
        let (mut said, mut heard) = (Vec::new(), Vec::new());
        for (kind, size) in steps {
            match kind {
                0 => {
                    // Writes one FIFO each time the transmitter is ready.
                    for number in 0..size {
                        let byte = u8::try_from(number % 251).unwrap();
                        if number % TRANSMITTER_BYTES == 0 && !is_ready(&mut here) {
                            break;
                        }
                        here.write(DATA, &[byte]);
                        said.push(byte);
                    }
                }
                1 => heard.extend(send(&here, size)),
                // A migration that completes, and one that fails.
                2 => {
                    here.hold_output();
                    let (mut there, _) = console();
                    there.hold_output();
                    there.restore_record(here.save_record("")).unwrap();
                    there.resume();
                    there.release_output();
                    here = there;
                }
                _ => {
                    here.hold_output();
                    drop(here.save());
                    heard.extend(send(&here, size));
                    here.release_output();
                }
            }
        }
        heard.extend(send(&here, usize::MAX));
        prop_assert!(heard == said, "{} bytes said, {} heard", said.len(), heard.len());
    }

    #[test]
    fn any_record_is_survived(changes in any_changes(), other in prop::option::of(any_json())) {
        let (mut console, _) = console();
        console.enqueue_input(b"hi");
        console.write(DATA, b"ho");
        let mut record = console.save_record("");
        match other {
            Some(other) => record.state = other.into(),
            None => change(&mut record.state, &changes),
        }
        if console.restore_record(record).is_ok() {
            console.resume();
        }
        for register in 0..8 {
            read(&mut console, register);
            console.write(register, &[0xff]);
        }
    }
}
