use super::*;
use crate::config::{DebugExitConfig, DebugconConfig, FwCfgSource, SerialConfig};
use devices::block::Format;
use devices::block::raw::Cache;
use proptest::prelude::*;

fn words(line: &str) -> Vec<OsString> {
    line.split(' ').filter(|word| !word.is_empty()).map(OsString::from).collect()
}

fn run(line: &str) -> Translated {
    match translate(&words(line)) {
        Ok(Request::Run(translated)) => *translated,
        other => panic!("{line}: {other:?}"),
    }
}

fn config(line: &str) -> RunConfig {
    run(&format!("-kernel k {line}")).options.validate().unwrap()
}

fn problems(line: &str) -> String {
    translate(&words(&format!("-kernel k {line}"))).unwrap_err().join("\n")
}

#[test]
fn the_line_of_kvm_unit_tests_is_a_machine_with_test_devices() {
    let line = "--no-reboot -nodefaults -global kvm-pit.lost_tick_policy=discard -device pc-testdev \
                -device isa-debug-exit,iobase=0xf4,iosize=0x4 -display none -serial stdio \
                -device pvpanic -machine accel=kvm -smp 2 -cpu max -m 1g -append 10";
    let config = config(line);
    assert_eq!((config.cpus, config.memory_bytes, config.cmdline.as_str()), (2, 1 << 30, "10"));
    assert_eq!(config.host.serial, SerialConfig::Stdio);
    assert!(config.host.no_reboot && config.hardware.testdev);
    let at = DebugExitConfig::At { iobase: 0xf4, iosize: 4 };
    assert_eq!(config.hardware.debug_exit, at);
}

#[test]
fn what_is_not_on_the_line_is_as_in_qemus_machine() {
    let config = config("-display none");
    assert_eq!(config.hardware.debug_exit, DebugExitConfig::Off);
    assert_eq!(config.host.serial, SerialConfig::Null);
    assert!(!config.host.no_reboot && !config.hardware.testdev && !config.rng);
    assert_eq!((config.cpus, config.memory_bytes), (1, 128 << 20));
}

#[test]
fn sizes_and_numbers_of_cpus_in_every_spelling() {
    for (line, bytes) in [("512", 512 << 20), ("size=1G", 1 << 30), ("2048M", 2 << 30)] {
        assert_eq!(config(&format!("-m {line}")).memory_bytes, bytes, "{line}");
    }
    for (line, cpus) in
        [("4", 4), ("cpus=3", 3), ("sockets=2,cores=2,threads=1", 4), ("2,maxcpus=2", 2)]
    {
        assert_eq!(config(&format!("-smp {line}")).cpus, cpus, "{line}");
    }
    assert!(problems("-smp 1,maxcpus=2").contains("maxcpus"));
    assert!(problems("-smp 300").contains("300 exceeds max CPUs"));
    assert!(
        problems("-smp 255").contains("-smp 255") && problems("-smp 0").contains("needs a CPU")
    );
    assert!(problems("-m 1G,slots=2,maxmem=2G").contains("slots=2"));
    assert!(problems("-m lots").contains("-m lots"));
}

#[test]
fn only_kvm_runs_guests() {
    for fine in [
        "-enable-kvm",
        "-accel kvm",
        "-accel tcg -accel kvm",
        "-M pc,accel=kvm:tcg",
        "-accel kvm,kernel-irqchip=on",
    ] {
        config(fine);
    }
    for (bad, word) in [
        ("-accel tcg", "-accel tcg"),
        ("-machine q35,accel=tcg", "tcg"),
        ("-machine kernel_irqchip=split", "kernel_irqchip=split"),
        ("-machine isapc", "isapc"),
        ("-machine vmport=on", "vmport=on"),
        ("-machine frob=on", "frob=on"),
    ] {
        assert!(problems(bad).contains(word), "{bad}");
    }
    assert!(run("-kernel k").remarks.iter().any(|remark| remark.contains("-accel kvm")));
}

#[test]
fn cpu_models_and_features_are_ferrys() {
    let cpu = |line: &str| config(&format!("-cpu {line}")).cpu.to_string();
    assert_eq!(cpu("host,migratable=no"), "host");
    assert_eq!(cpu("max"), "host");
    assert_eq!(cpu("qemu64,+x2apic"), "x86-64-v1,+x2apic");
    assert!(problems("-cpu Opteron_G1,vendor=AuthenticAMD").contains("Opteron_G1"));
    assert!(problems("-cpu host,hv_vpindex").contains("hv_vpindex"));
}

#[test]
fn consoles() {
    let serial = |line: &str| config(line).host.serial;
    assert_eq!(serial("-nographic"), SerialConfig::Stdio);
    assert_eq!(serial("-nographic -nodefaults"), SerialConfig::Null);
    assert_eq!(serial("-serial mon:stdio -serial none"), SerialConfig::Stdio);
    assert_eq!(serial("-serial file:/log"), SerialConfig::File("/log".into()));
    let socket = SerialConfig::Socket("/s".into());
    assert_eq!(serial("-serial unix:/s,server,nowait"), socket);
    // Named before it is there.
    let chardev = "-serial chardev:c -chardev socket,id=c,path=/s,server=on,wait=off";
    assert_eq!(serial(chardev), socket);
    let devices = "-chardev stdio,id=c -device isa-serial,chardev=c";
    assert_eq!(serial(devices), SerialConfig::Stdio);
    for (bad, word) in [
        ("-serial stdio -serial file:/log", "one serial port"),
        ("-serial pty", "pty"),
        ("-serial chardev:c", "no -chardev c"),
        ("-serial unix:/s", "server=on"),
        ("-monitor stdio", "-monitor stdio"),
        ("-serial tcp:localhost:1", "tcp:localhost:1"),
    ] {
        assert!(problems(bad).contains(word), "{bad}: {}", problems(bad));
    }
    let debug = "-serial stdio -debugcon stdio";
    assert_eq!(config(debug).host.debugcon, DebugconConfig::Stdio);
    let debug = "-chardev file,id=d,path=/d -device isa-debugcon,iobase=0xe9,chardev=d";
    assert_eq!(config(debug).host.debugcon, DebugconConfig::File("/d".into()));
    assert!(
        problems("-chardev null,id=d -device isa-debugcon,iobase=0x402,chardev=d")
            .contains("0x402")
    );
}

#[test]
fn control_sockets() {
    let qmp = |line: &str| config(line).host.qmp.map(|path| path.0);
    assert_eq!(qmp("-qmp unix:/q,server=on,wait=off"), Some("/q".into()));
    let mon = "-chardev socket,id=m,path=/q,server=on,wait=off -mon chardev=m,mode=control";
    assert_eq!(qmp(mon), Some("/q".into()));
    assert_eq!(qmp("-monitor none -qmp none"), None);
    assert!(problems("-qmp unix:/q,server").contains("wait=off"));
    assert!(problems("-qmp tcp:localhost:4444,server=on,wait=off").contains("-qmp tcp"));
    assert!(problems("-chardev null,id=m -mon m").contains("mode=control"));
}

#[test]
fn disks_of_drives_and_nodes() {
    let disks = |line: &str| config(line).disks;
    let found = disks("-drive file=/a,,b,format=qcow2,if=virtio,cache=none,readonly=on");
    let (id, disk) = &found[0];
    assert_eq!((id.as_str(), disk.path.to_str()), ("disk0", Some("/a,b")));
    assert_eq!((disk.format, disk.cache, disk.read_only), (Format::Qcow2, Cache::None, true));
    let found = disks(
        "-device virtio-blk-device,drive=d,serial=root,num-queues=2 -drive id=d,file=/a,format=raw,if=none",
    );
    assert_eq!((found[0].0.as_str(), found[0].1.queues), ("root", 2));
    let found = disks(
        "-blockdev driver=file,node-name=f,filename=/a -blockdev raw,node-name=n,file=f \
         -device virtio-blk-pci,drive=n",
    );
    assert_eq!((found[0].0.as_str(), found[0].1.path.to_str()), ("n", Some("/a")));
    let found = disks(
        "-blockdev {\"driver\":\"qcow2\",\"node-name\":\"n\",\"file\":{\"driver\":\"file\",\"filename\":\"/a\"}} \
         -device {\"driver\":\"virtio-blk-device\",\"drive\":\"n\"}",
    );
    assert_eq!(found[0].1.format, Format::Qcow2);
    for (bad, word) in [
        ("-drive file=/a,format=raw", "if=ide"),
        ("-drive file=/a,if=virtio", "format=raw"),
        ("-drive file=/a,format=raw,if=none,id=d", "no device uses it"),
        ("-device virtio-blk-device,drive=d", "drive=d"),
        ("-drive file=/a,format=raw,if=pflash", "firmware"),
        ("-drive file=/a,format=raw,if=virtio,cache=writethrough", "writethrough"),
        ("-drive file=/a,format=raw,if=virtio,throttling.iops-total=9", "throttling.iops-total"),
        ("-hda /a", "-hda /a"),
        ("/a", "/a"),
    ] {
        assert!(problems(bad).contains(word), "{bad}: {}", problems(bad));
    }
}

#[test]
fn snapshots_are_of_writable_disks() {
    let two = "-kernel k -drive file=/a,format=raw,if=virtio -drive file=/b,format=raw,if=virtio";
    assert!(!run(two).has_snapshots());
    assert_eq!(run(&format!("{two},snapshot=on")).snapshots, [1]);
    assert_eq!(run(&format!("-snapshot {two},readonly=on")).snapshots, [0]);
}

#[test]
fn what_would_change_a_test_is_refused_by_name_and_all_of_it_at_once() {
    let refused =
        problems("-netdev user,id=n -device virtio-net-pci,netdev=n -bios x -gdb tcp::1 -m ?");
    for word in ["-netdev user,id=n", "virtio-net-pci", "-bios x", "-gdb tcp::1", "-m ?"] {
        assert!(refused.contains(word), "{word}: {refused}");
    }
    assert!(
        problems("-device edu")
            .contains("-device edu: Ferry has no such device, but isa-debug-exit")
    );
    config("-net none -nic none -vga none -rtc base=utc -boot menu=off -monitor none -usb");
}

#[test]
fn remarks_say_what_is_ignored() {
    let translated = run("-kernel k -v -boot menu=off -accel kvm -machine q35,smm=off");
    let remarks = translated.remarks.join("\n");
    for word in ["-boot menu=off: ignored: ", "-machine smm=off: ignored", "no PCI"] {
        assert!(remarks.contains(word), "{word}: {remarks}");
    }
    assert_eq!(translated.verbose, 1);
}

#[test]
fn fw_cfg_and_the_rest() {
    let config = config(
        "-fw_cfg name=opt/x,string=a,,b -device virtio-rng-pci -name guest=vm,debug-threads=on \
         -action reboot=shutdown,panic=exit-failure -S -no-acpi",
    );
    assert_eq!(config.hardware.fw_cfg[0].source, FwCfgSource::Text("a,b".into()));
    assert_eq!(config.name.as_deref(), Some("vm"));
    assert!(config.rng && config.host.no_reboot && config.paused && !config.acpi);
    assert!(problems("-action panic=none").contains("panic=none"));
    assert!(problems("-rtc base=localtime").contains("base=localtime"));
}

#[test]
fn questions_are_answered_and_nothing_runs() {
    for (line, word) in [
        ("-device ?", "pc-testdev"),
        ("--help", "QEMU"),
        ("-h", "-kernel"),
        ("-version", "7.2.0"),
        ("-machine help", "microvm"),
        ("-cpu help", "host"),
        ("-accel ?", "kvm"),
    ] {
        match translate(&words(line)) {
            Ok(Request::Print(text)) => assert!(text.contains(word), "{line}: {text}"),
            other => panic!("{line}: {other:?}"),
        }
    }
}

#[test]
fn links_and_the_subcommand_take_qemus_options() {
    let of = |line: &str| arguments(&words(line));
    assert_eq!(of("/usr/bin/qemu-system-x86_64 -v"), Some(words("-v")));
    assert_eq!(of("ferry qemu --version"), Some(words("--version")));
    assert_eq!(of("ferry -v qemu -m 1G"), Some(words("-v -m 1G")));
    for line in ["ferry", "ferry run qemu", "ferry -v run", "ferry --help"] {
        assert_eq!(of(line), None, "{line}");
    }
}

#[test]
fn a_kernel_that_is_not_there_is_said_in_the_words_that_runners_look_for() {
    let exit = run("-kernel _NO_FILE_4Uhere_ -serial stdio").prepare().unwrap_err();
    assert_eq!(exit.code, exit_code::CANNOT_RUN);
    assert!(exit.why.contains("could not load kernel '_NO_FILE_4Uhere_'"), "{}", exit.why);
    let exit = run("-kernel k -m 4K").prepare().unwrap_err();
    assert!(exit.code == exit_code::USAGE && exit.why.contains("4096"), "{}", exit.why);
}

/// Pieces of command lines, whole and broken.
fn word() -> impl Strategy<Value = String> {
    let option =
        (0..table::OPTIONS.len()).prop_map(|index| format!("-{}", table::OPTIONS[index].names[0]));
    const VALUES: [&str; 16] = [
        "isa-debug-exit,iobase=0xf4,iosize=99999999",
        "virtio-blk-device,drive=d",
        "file=/a,if=none,id=d,format=raw",
        "driver=file,node-name=f,filename=/a",
        "{\"driver\": {\"a\": 1}}",
        "chardev:c",
        "socket,id=c,path=/s,server,nowait",
        "cpus=,,=,",
        ",,,",
        "=",
        "-",
        "--",
        "",
        "kvm:tcg",
        "sockets=18446744073709551615,cores=2",
        "99999999999999999999G",
    ];
    prop_oneof![
        3 => option,
        3 => prop::sample::select(&VALUES[..]).prop_map(str::to_owned),
        1 => ".{0,24}",
    ]
}

proptest! {
    #[test]
    fn no_command_line_makes_it_panic(line in prop::collection::vec(word(), 0..12)) {
        let line: Vec<_> = line.into_iter().map(OsString::from).collect();
        if let Ok(Request::Run(translated)) = translate(&line) {
            // What is left to check is checked here.
            let _ = translated.options.validate();
        }
        arguments(&line);
    }
}
