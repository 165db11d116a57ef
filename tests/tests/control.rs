//! The control socket: every command, the Python client, and clients that behave badly.
#![allow(clippy::unwrap_used, reason = "a test may panic, in its helpers too")]

use ferry_tests::ferry::{self, Guest};
use ferry_tests::hosts::{Hosts, text};
use ferry_tests::image::{Pattern, assert_same, fill};
use ferry_tests::process::{SOON, Vmm};
use ferry_tests::qmp::{ENDS, Qmp, run_python};
use ferry_tests::{disk, needs};
use serde_json::{Value, json};
use std::collections::BTreeSet;
use std::io::{BufRead, BufReader, PipeReader, Read, Write};
use std::os::fd::AsRawFd;
use std::process::Child;
use std::time::{Duration, Instant};

fn idle() -> Vmm {
    let vmm = ferry::run_with(&Guest::new("work=idle", 64), &["--name", "vm1"]).unwrap();
    vmm.wait_line("^HB ").unwrap();
    vmm
}

#[test]
#[needs(kvm)]
fn every_command_answers_as_documented() {
    let folder = tempfile::tempdir().unwrap();
    let image = folder.path().join("disk.img");
    disk::create(&image, 1 << 20).unwrap();
    let guest = Guest::new("work=idle", 64).cpus(2).disk("root", &image);
    let mut vmm = ferry::run_with(&guest, &["--name", "vm1"]).unwrap();
    vmm.wait_line("^HB ").unwrap();
    let mut qmp = vmm.qmp().unwrap();
    assert!(qmp.greeting()["QMP"]["version"]["qemu"]["major"].is_number(), "{}", qmp.greeting());
    let mut ask = |command: &str| {
        // The only query that wants to know of what.
        let of = match command {
            "query-cpu-model-expansion" => json!({"type": "full", "model": {"name": "host"}}),
            _ => json!({}),
        };
        qmp.execute(command, of).unwrap()
    };
    assert!(ask("query-version")["qemu"].is_object());
    assert_eq!(ask("query-name")["name"], "vm1");
    assert_eq!(ask("query-uuid"), json!({"UUID": "00000000-0000-0000-0000-000000000000"}));
    assert_eq!(ask("query-kvm"), json!({"enabled": true, "present": true}));
    let memory = json!({"base-memory": 64 << 20, "plugged-memory": 0});
    assert_eq!(ask("query-memory-size-summary"), memory);
    assert_eq!(ask("query-cpus-fast").as_array().unwrap().len(), 2);
    assert_eq!(ask("query-block")[0]["device"], "root");
    assert_eq!(ask("query-blockstats")[0]["stats"]["failed_rd_operations"], 0);
    let status = ask("query-status");
    assert_eq!((&status["status"], &status["running"]), (&json!("running"), &json!(true)));
    assert_eq!(ask("query-migrate"), json!({}));
    assert_eq!(ask("query-migrate-parameters")["downtime-limit"], 300);
    assert_eq!(ask("migrate_cancel"), json!({}));
    let names = |list: Value| -> BTreeSet<String> {
        let name = |one: &Value| one["name"].as_str().unwrap().to_owned();
        list.as_array().unwrap().iter().map(name).collect()
    };
    let commands = names(ask("query-commands"));
    for command in ["query-status", "stop", "migrate", "system_reset", "query-commands"] {
        assert!(commands.contains(command), "{command}");
    }
    for query in commands.iter().filter(|name| name.starts_with("query-")) {
        ask(query);
    }
    let mut schema = ask("query-qmp-schema");
    schema.as_array_mut().unwrap().retain(|one| one["meta-type"] == "command");
    assert_eq!(names(schema), commands);

    qmp.execute("stop", json!({})).unwrap();
    qmp.wait_event("STOP", SOON).unwrap();
    assert_eq!(qmp.run_state().unwrap(), "paused");
    qmp.execute("cont", json!({})).unwrap();
    qmp.wait_event("RESUME", SOON).unwrap();
    vmm.wait_next_line("^HB ").unwrap();

    let set = |qmp: &mut Qmp, value: Value| qmp.execute("migrate-set-parameters", value).unwrap();
    set(&mut qmp, json!({"max-bandwidth": 5_000_000, "downtime-limit": 20}));
    let parameters = qmp.execute("query-migrate-parameters", json!({})).unwrap();
    assert_eq!(
        (&parameters["max-bandwidth"], &parameters["downtime-limit"]),
        (&json!(5_000_000), &json!(20))
    );
    qmp.want_migration_events().unwrap();
    let capabilities = qmp.execute("query-migrate-capabilities", json!({})).unwrap();
    let events = json!({"capability": "events", "state": true});
    assert!(capabilities.as_array().unwrap().contains(&events), "{capabilities}");

    qmp.execute("system_reset", json!({})).unwrap();
    qmp.wait_event("RESET", SOON).unwrap();
    let from = vmm.serial().count();
    vmm.serial().wait_from(from, "^HB n=0 ", SOON).unwrap();
    qmp.execute("quit", json!({})).unwrap();
    qmp.wait_event("SHUTDOWN", SOON).unwrap();
    assert_eq!(vmm.process.exit_code(SOON).unwrap(), 0);
}

/// It has names for disks that migrate and for compression that newer versions have not.
#[test]
#[needs(kvm)]
fn a_script_for_qemu_7_2_moves_a_guest_with_its_disk() {
    let hosts = Hosts::new();
    let image = hosts.at("a", "root");
    disk::create(&image, 8 << 20).unwrap();
    fill(&image, 1 << 20, 1 << 20, Pattern::Random).unwrap();
    let work = "work=dirty fill=text fill_pct=20 ws_mb=4 rate_mbps=10 hb_ms=20";
    let source = ferry::run(&Guest::new(work, 64).disk("root", &image)).unwrap();
    source.wait_line("^HB n=2 ").unwrap();
    let mut destination = hosts.receive();
    let mut qmp = source.qmp().unwrap();
    for (name, value, reason) in [
        ("compress-threads", json!(200), "'multifd-channels' sets it"),
        ("compress-wait-thread", json!(false), "always true"),
        ("compress-level", json!(10), "between 0 and 9"),
    ] {
        let refusal = qmp.refused("migrate-set-parameters", json!({name: value})).unwrap();
        assert!(refusal.description.contains(reason), "{refusal}");
    }
    let off = json!({"capabilities": [{"capability": "zero-blocks", "state": false}]});
    let refusal = qmp.refused("migrate-set-capabilities", off).unwrap();
    assert!(refusal.description.contains("'zero-blocks' is always on"), "{refusal}");
    let mut ask = |command: &str, arguments| qmp.execute(command, arguments).unwrap();
    let on = ["events", "compress", "block", "zero-blocks"];
    let on = on.map(|name| json!({"capability": name, "state": true}));
    ask("migrate-set-capabilities", json!({"capabilities": on}));
    let shown = ask("query-migrate-capabilities", json!({}));
    assert!(on.iter().all(|one| shown.as_array().unwrap().contains(one)), "{shown}");
    // What is shown can be sent back.
    let mut parameters = ask("query-migrate-parameters", json!({}));
    assert_eq!(parameters["block-incremental"], false, "{parameters}");
    parameters["compress-level"] = 3.into();
    ask("migrate-set-parameters", parameters.clone());
    assert_eq!(ask("query-migrate-parameters", json!({})), parameters);
    ask("migrate-set-cache-size", json!({"value": 8 << 20}));
    assert_eq!(ask("query-migrate-cache-size", json!({})), 8 << 20);
    ask("migrate", json!({"uri": destination.address}));
    assert_eq!(qmp.wait_migration(&ENDS, SOON).unwrap(), "completed");
    let info = qmp.execute("query-migrate", json!({})).unwrap();
    assert!(info["compression"]["pages"].as_u64().unwrap() > 0, "{info}");
    assert_eq!((&info["compression"]["busy"], &info["disk"]["remaining"]), (&json!(0), &json!(0)));
    assert_eq!(hosts.files("b"), ["root.img"]);
    assert_same(&image, &hosts.at("b", "root.img"));
    ferry::verify_at(&mut destination.vmm, &[source.serial()]).unwrap();
}

#[test]
#[needs(kvm)]
fn wrong_requests_get_qemus_classes_and_words() {
    let vmm = idle();
    let mut qmp = vmm.qmp().unwrap();
    let class = |qmp: &mut Qmp, command: &str, arguments: Value| {
        qmp.refused(command, arguments).unwrap().class
    };
    assert_eq!(class(&mut qmp, "no-such-command", json!({})), "CommandNotFound");
    assert_eq!(class(&mut qmp, "qmp_capabilities", json!({})), "CommandNotFound");
    assert_eq!(class(&mut qmp, "stop", json!({"extra": 1})), "GenericError");
    assert_eq!(class(&mut qmp, "migrate", json!({})), "GenericError");
    assert_eq!(class(&mut qmp, "migrate", json!({"uri": 7})), "GenericError");
    let refusal = qmp.refused("migrate", json!({"uri": "pigeon:1"})).unwrap();
    assert!(refusal.description.contains("expects a valid migration protocol"), "{refusal}");
    for bad in [
        json!({"downtime-limit": -1}),
        json!({"downtime-limit": 3_000_000}),
        json!({"max-bandwidth": "x"}),
    ] {
        assert_eq!(class(&mut qmp, "migrate-set-parameters", bad), "GenericError");
    }
    assert_eq!(qmp.run_state().unwrap(), "running");
}

#[test]
#[needs(kvm)]
fn requests_and_negotiation_are_qemus_in_detail() {
    let vmm = idle();
    let mut client = BufReader::new(Qmp::connect_raw(vmm.socket(), SOON).unwrap());
    client.get_ref().set_read_timeout(Some(SOON)).unwrap();
    let mut line = |request: &str| {
        client.get_ref().write_all(request.as_bytes()).unwrap();
        let mut line = String::new();
        client.read_line(&mut line).unwrap();
        serde_json::from_str::<Value>(&line).unwrap()
    };
    assert_eq!(line("")["QMP"]["capabilities"], json!([]));
    let refused = line("{'execute':'qmp_capabilities','arguments':{'enable':['oob']}}");
    assert_eq!(refused["error"]["desc"], "Capability oob not available");
    let refused = line("{'execute':'qmp_capabilities','arguments':{'disable':[]}}");
    assert_eq!(refused["error"]["class"], "GenericError");
    assert_eq!(line("{ 'execute' : 'qmp_capabilities' }"), json!({"return": {}}));
    let answer = line("{'execute': 'query-name', \"id\": '\"}\\''}");
    assert_eq!(answer, json!({"return": {"name": "vm1"}, "id": "\"}'"}));
    assert!(line("{'execute': 'query-name}\n")["error"].is_object());
    assert_eq!(line("{'execute':'query-name'}")["return"]["name"], "vm1");
}

#[test]
#[needs(kvm)]
fn an_arriving_guest_cannot_be_commanded_yet() {
    let destination = ferry::receive().unwrap();
    let mut qmp = destination.vmm.qmp().unwrap();
    assert_eq!(qmp.run_state().unwrap(), "inmigrate");
    let uri = json!({"uri": "tcp:127.0.0.1:1"});
    for (command, arguments) in [("system_reset", json!({})), ("migrate", uri)] {
        assert_eq!(qmp.refused(command, arguments).unwrap().class, "GenericError", "{command}");
    }
}

#[test]
#[needs(kvm)]
fn a_guest_that_is_stopped_while_it_arrives_arrives_paused() {
    // As in QEMU: `stop` and `cont` say what the guest does once it is here, whatever `--paused` said.
    for (options, told, arrives) in [
        (&[][..], &["stop"][..], "paused"),
        (&[], &["stop", "cont"], "running"),
        (&["--paused"], &["cont"], "running"),
    ] {
        let source = ferry::run(&Guest::new("work=idle", 64)).unwrap();
        source.wait_line("^HB ").unwrap();
        let destination = ferry::receive_at("tcp:127.0.0.1:0", options).unwrap();
        let mut qmp = destination.vmm.qmp().unwrap();
        for command in told {
            qmp.execute(command, json!({})).unwrap();
        }
        ferry::migrate_well(&source, &destination.address, &[]).unwrap();
        assert_eq!(qmp.run_state().unwrap(), arrives, "{options:?} {told:?}");
        if arrives == "paused" {
            let lines = destination.vmm.serial().count();
            qmp.execute("cont", json!({})).unwrap();
            destination.vmm.serial().wait_from(lines, "^HB ", SOON).unwrap();
        }
    }
}

#[test]
#[needs(kvm)]
fn ctl_speaks_for_people() {
    let mut vmm = idle();
    let socket = vmm.socket().to_str().unwrap().to_owned();
    let ctl = |command: &[&str]| ferry::end_of([&["ctl", &socket][..], command].concat()).unwrap();
    assert!(ctl(&["status"]).1.contains("running"));
    assert_eq!(ctl(&["stop"]).0, 0);
    assert!(ctl(&["status"]).1.contains("paused"));
    assert_eq!(ctl(&["cont"]).0, 0);
    assert_eq!(ctl(&["migrate-set-parameters", r#"{"downtime-limit": 7}"#]).0, 0);
    let (code, parameters) = ctl(&["query-migrate-parameters"]);
    let parameters: Value = serde_json::from_str(&parameters).unwrap();
    assert_eq!((code, &parameters["downtime-limit"]), (0, &json!(7)), "{parameters}");
    let (code, text) = ctl(&["frobnicate"]);
    assert_eq!(code, 1, "{text}");
    assert_eq!(ctl(&["stop", "no json"]).0, 2);
    assert_eq!(ctl(&["quit"]).0, 0);
    assert_eq!(vmm.process.exit_code(SOON).unwrap(), 0);
    let (code, text) = ctl(&["status"]);
    assert_eq!(code, 1, "{text}");
    assert!(text.contains(&socket), "{text}");
}

#[test]
#[needs(kvm, qemu_qmp)]
fn the_python_client_qemu_qmp_drives_it() {
    let vmm = idle();
    run_python("qmp_client.py", &[text(vmm.socket())]).unwrap();
}

/// Everything that bad clients must not stop: the guest, and other clients.
fn assert_unharmed(vmm: &Vmm) {
    assert_eq!(vmm.qmp().unwrap().run_state().unwrap(), "running");
    vmm.wait_next_line("^HB ").unwrap();
}

#[test]
#[needs(kvm)]
fn clients_that_behave_badly_harm_nobody() {
    let vmm = idle();
    let mut other = vmm.qmp().unwrap();
    let connect = || Qmp::connect_raw(vmm.socket(), SOON).unwrap();

    // Garbage is answered with an error; the connection may be closed.
    for garbage in
        [&b"\xff\xfe\0garbage\n"[..], b"[]\n", b"42\n", b"{\"execute\": 7}\n", b"{}\n", b"}{\n"]
    {
        let mut client = connect();
        client.set_read_timeout(Some(SOON)).unwrap();
        client.write_all(garbage).unwrap();
        let mut text = String::new();
        let mut buffer = [0; 4096];
        while !text.contains("error") {
            let len =
                client.read(&mut buffer).unwrap_or_else(|error| panic!("{garbage:?}: {error}"));
            text.push_str(&String::from_utf8_lossy(&buffer[..len]));
            assert!(len > 0, "{garbage:?} was not answered: {text}");
        }
        assert_unharmed(&vmm);
    }

    // Commands before the negotiation.
    let mut early = connect();
    early.write_all(b"{\"execute\": \"quit\"}\n").unwrap();
    assert_unharmed(&vmm);

    // Half a message, then silence; and one that ends in the middle.
    let mut half = connect();
    half.write_all(b"{\"execute\": \"qmp_cap").unwrap();
    assert_unharmed(&vmm);
    drop(half);
    drop(connect());
    assert_unharmed(&vmm);

    // 10 MiB without an end: refused, not collected. The write may fail half-way.
    let before = resident_kib(vmm.process.id());
    let mut endless = connect();
    endless.set_write_timeout(Some(SOON)).unwrap();
    let _ = endless.write_all(&vec![b'['; 10 << 20]);
    assert_unharmed(&vmm);
    let _ = endless.write_all(format!("{{\"a\": \"{}\"}}\n", "x".repeat(10 << 20)).as_bytes());
    assert_unharmed(&vmm);
    let grown = resident_kib(vmm.process.id()).saturating_sub(before);
    assert!(grown < 8 << 10, "a client made the VMM grow by {grown} KiB");

    // A crowd, some of whom never read.
    let mut crowd: Vec<_> = (0..40).map(|_| connect()).collect();
    for client in &mut crowd {
        let _ = client.write_all(b"{\"execute\": \"qmp_capabilities\"}\n");
    }
    drop(crowd);
    assert_unharmed(&vmm);
    assert_eq!(other.run_state().unwrap(), "running", "a client from before goes on");
}

fn resident_kib(pid: u32) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let line = status.lines().find(|line| line.starts_with("VmRSS:")).unwrap();
    line.split_whitespace().nth(1).unwrap().parse().unwrap()
}

#[test]
#[needs(kvm)]
fn a_guest_whose_output_nobody_reads_still_stops_goes_on_and_quits() {
    let folder = tempfile::tempdir().unwrap();
    let socket = folder.path().join("qmp");
    let qmp = format!("unix:{}", socket.display());
    let (reader, writer) = std::io::pipe().unwrap();
    shrink(&reader);
    let child = ferry::command(["run", "--qmp", &qmp, "--kernel", guest_images::KERNEL])
        .args(["--cmdline", "work=idle hb_ms=1"])
        .stdout(writer)
        .stderr(std::process::Stdio::null())
        .spawn()
        .unwrap();
    let mut child = KilledOnDrop(child);
    let end = Instant::now() + SOON;
    // The second and last buffer of the pipe is in use; a pipe gives no event for that.
    while unread(&reader) <= 4096 || !socket.exists() {
        assert!(Instant::now() < end, "only {} bytes", unread(&reader));
        std::thread::yield_now();
    }
    let mut qmp = Qmp::connect(&socket, SOON).unwrap();
    let began = Instant::now();
    // Long enough for a writer that waits for room to be caught at it.
    while began.elapsed() < Duration::from_secs(1) {
        qmp.execute("stop", json!({})).unwrap();
        qmp.execute("cont", json!({})).unwrap();
    }
    qmp.execute("quit", json!({})).unwrap();
    assert_eq!(child.0.wait().unwrap().code(), Some(0));
    assert!(began.elapsed() < Duration::from_secs(10), "{:?}", began.elapsed());
}

struct KilledOnDrop(Child);

impl Drop for KilledOnDrop {
    fn drop(&mut self) {
        // It has ended already if all went well.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Leaves a pipe two buffers of a page each.
fn shrink(pipe: &PipeReader) {
    // SAFETY: the descriptor is open as long as `pipe` is borrowed, and no memory is passed.
    let result = unsafe { libc::fcntl(pipe.as_raw_fd(), libc::F_SETPIPE_SZ, 8192) };
    assert!(result >= 0, "{}", std::io::Error::last_os_error());
}

/// Bytes that wait in a pipe.
fn unread(pipe: &PipeReader) -> i32 {
    let mut count = 0;
    // SAFETY: the descriptor is open, and the kernel writes one int to `count`.
    let result = unsafe { libc::ioctl(pipe.as_raw_fd(), libc::FIONREAD, &raw mut count) };
    assert!(result >= 0, "{}", std::io::Error::last_os_error());
    count
}
