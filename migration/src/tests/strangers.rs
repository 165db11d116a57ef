//! Who else connects to a listener while a migration arrives there: channels of another migration, the
//! same one twice, in the wrong order, or none at all.

use super::fake::*;
use crate::cancel::CancelToken;
use crate::control::{Control, ControlThreads, Limit};
use crate::destination::Destination;
use crate::error::chain;
use crate::transport::channel::{receive_hello, send_hello};
use crate::transport::{Address, Channel, Listener, SocketTransport};
use crate::wire::hello::{DISK_CHANNELS, DISKS};
use crate::wire::{Hello, Kind, MigrationId, Role, WireError};
use std::sync::atomic::Ordering::SeqCst;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

const SOON: Duration = Duration::from_secs(5);
const OURS: MigrationId = MigrationId([1; 16]);
const OTHER: MigrationId = MigrationId([2; 16]);

/// Connects and says who it is; gives the connection, or what the destination says against it.
fn knock(at: &Address, role: Role, id: MigrationId) -> Result<Channel, WireError> {
    knock_as(at, &Hello::new(role, id, 2))
}

fn knock_as(at: &Address, hello: &Hello) -> Result<Channel, WireError> {
    let cancel = CancelToken::new();
    let mut transport = SocketTransport::connect(at, &cancel).unwrap();
    // Longer than the destination's.
    transport.set_patience(SOON * 4);
    let channel = Channel::new(Arc::new(transport), cancel);
    send_hello(&channel, hello)?;
    receive_hello(&channel, SOON)?;
    Ok(channel)
}

fn control(main: &Channel) -> (Control, ControlThreads) {
    Control::start(main.transport().clone(), CancelToken::new()).unwrap()
}

fn refused(at: &Address, role: Role, id: MigrationId) -> String {
    match knock(at, role, id) {
        Ok(_) => panic!("{role:?} of {id:?} was let in"),
        Err(error) => chain(&error),
    }
}

/// Lets a destination listen while `visit` runs; what the destination says in the end.
fn listen_while(visit: impl FnOnce(&Address)) -> String {
    let listener = Listener::bind(&"tcp:127.0.0.1:0".parse().unwrap()).unwrap();
    let address = listener.local_address().clone();
    let machine = Arc::<Machine>::default();
    let ours = machine.clone();
    let receiver = std::thread::spawn(move || {
        let mut host = FakeHost {
            machine: ours,
            disk: Arc::default(),
            fail: Fail::Nothing,
            ram: None,
            records: Vec::new(),
            disks: Vec::new(),
            late: None,
            bitmaps: None,
        };
        let destination = Destination {
            host: &mut host,
            counters: Arc::default(),
            cancel: CancelToken::new(),
            give_up: CancelToken::new(),
            events: &mut |_| {},
        };
        destination.receive(&listener).map_err(|error| chain(&error))
    });
    visit(&address);
    let result = receiver.join().unwrap();
    assert!(!machine.running.load(SeqCst), "no guest may run without Go");
    result.unwrap_err()
}

#[test]
fn channels_of_others_twice_or_out_of_order_are_turned_away_and_the_right_ones_let_in() {
    let [first, second] = [0, 1].map(|index| Role::Data { index });
    let error = listen_while(|at| {
        assert!(refused(at, first, OURS).contains("no such migration"));
        let main = knock(at, Role::Control, OURS).unwrap();
        assert!(refused(at, second, OURS).contains("data channel 1 where 0 is expected"));
        assert!(refused(at, first, OTHER).contains("no such migration"));
        assert!(refused(at, Role::Control, OTHER).contains("another migration is arriving here"));
        let _first = knock(at, first, OURS).unwrap();
        assert!(refused(at, first, OURS).contains("data channel 0 where 1 is expected"));
        assert!(refused(at, Role::Data { index: 9 }, OURS).contains("where 1 is expected"));
        let _second = knock(at, second, OURS).unwrap();
        let (control, _threads) = control(&main);
        control.say_farewell(Kind::Abort, "that was all");
    });
    assert!(error.contains("the source has ended the migration: that was all"), "{error}");
}

#[test]
fn disks_have_as_many_channels_as_ram_or_one_if_the_source_knows_no_better() {
    let [ram, disks] = [|index| Role::Data { index }, |index| Role::Disks { index }];
    let plain = Hello::new(Role::Control, OURS, 2).wanting(DISKS);
    for (hello, count) in [(plain.clone(), 1), (plain.wanting(DISK_CHANNELS), 2)] {
        let error = listen_while(|at| {
            let main = knock_as(at, &hello).unwrap();
            assert!(refused(at, disks(0), OURS).contains("are not expected yet"));
            let mut open = vec![knock(at, ram(0), OURS).unwrap(), knock(at, ram(1), OURS).unwrap()];
            assert!(refused(at, disks(1), OURS).contains("disk channel 1 where 0 is expected"));
            assert!(refused(at, ram(2), OURS).contains("no further data channel is expected"));
            assert!(refused(at, disks(0), OTHER).contains("no such migration"));
            for index in 0..count {
                open.push(knock(at, disks(index), OURS).unwrap());
            }
            let (control, _threads) = control(&main);
            control.say_farewell(Kind::Abort, "that was all");
        });
        assert!(error.contains("the source has ended the migration: that was all"), "{error}");
    }
    let error = listen_while(|at| {
        let hello = Hello::new(Role::Control, OURS, 1).wanting(DISKS);
        let main = knock_as(at, &hello).unwrap();
        let _data = knock(at, ram(0), OURS).unwrap();
        let (control, threads) = control(&main);
        drop((control, threads));
    });
    assert!(error.contains("disk channel 0: connection lost"), "{error}");
}

#[test]
fn a_channel_that_never_comes_is_named() {
    let error = listen_while(|at| {
        let main = knock(at, Role::Control, OURS).unwrap();
        let _first = knock(at, Role::Data { index: 0 }, OURS).unwrap();
        // Until the destination has had enough.
        let (control, _threads) = control(&main);
        let refused = control.next(&Limit::within("a refusal", SOON * 4)).unwrap_err();
        let expected = "data channel 1: the data connection did not come within 10 s";
        assert!(chain(&refused).contains(expected), "{}", chain(&refused));
    });
    assert!(error.contains("data channel 1: the data connection did not come"), "{error}");
}

#[test]
fn a_source_that_gives_up_before_its_channels_are_open_is_heard_at_once() {
    type Leave = fn(&Control);
    let ways: [(&str, Leave); 2] = [
        ("the source has ended the migration: no route to host", |control| {
            control.say_farewell(Kind::Abort, "no route to host");
        }),
        ("data channel 1: connection lost", |_| {}),
    ];
    for (expected, leave) in ways {
        let left = Mutex::new(None);
        let error = listen_while(|at| {
            let main = knock(at, Role::Control, OURS).unwrap();
            let _first = knock(at, Role::Data { index: 0 }, OURS).unwrap();
            let (control, threads) = control(&main);
            leave(&control);
            drop(threads);
            *left.lock().unwrap() = Some(Instant::now());
        });
        assert!(error.contains(expected), "{error}");
        // Far less than it waits for a channel.
        let left = left.into_inner().unwrap().unwrap().elapsed();
        assert!(left < SOON, "{expected}: {left:?}");
    }
}
