//! `--cpu`, `query-cpu-model-expansion`, `ferry doctor --baseline`, and many vCPUs.
#![allow(clippy::unwrap_used, reason = "a test may panic, in its helpers too")]

use ferry_tests::ferry::{self, Guest};
use ferry_tests::needs;
use ferry_tests::process::SOON;
use serde_json::{Value, json};

fn end_of(cpu: &str) -> (i32, String) {
    let kernel = ["run", "--kernel", guest_images::KERNEL, "--memory", "64M"];
    ferry::end_of([&kernel[..], &["--cmdline", "work=hello", "--cpu", cpu]].concat()).unwrap()
}

/// The highest level of this host, and its features.
fn host_model() -> (String, Vec<String>) {
    let (code, text) = ferry::end_of(["doctor", "--cpu-model"]).unwrap();
    assert_eq!(code, 0, "{text}");
    let model: Value = serde_json::from_str(&text).unwrap();
    let features = model["features"].as_array().unwrap();
    let names = features.iter().map(|name| name.as_str().unwrap().to_owned());
    (model["level"].as_str().unwrap().to_owned(), names.collect())
}

/// The features that the host shows a guest of this model, or hides from it.
fn shown(cpu: &str) -> Value {
    let mut parts = cpu.split(',');
    let name = parts.next().unwrap();
    let switch = |word: &str| (word[1..].to_owned(), word.starts_with('+').into());
    let props: serde_json::Map<String, Value> = parts.map(switch).collect();
    let vmm = ferry::run(&Guest::new("work=idle", 64)).unwrap();
    // What a software KVM shows is known once there is a guest.
    vmm.wait_line("^HB ").unwrap();
    let model = json!({"type": "full", "model": {"name": name, "props": props}});
    vmm.qmp().unwrap().execute("query-cpu-model-expansion", model).unwrap()["model"]["props"]
        .clone()
}

#[test]
fn what_is_not_known_is_a_usage_error_with_near_matches() {
    for (cpu, words) in [
        ("host,+avx512vmbi", &["--cpu", "\"avx512vmbi\"", "similar: avx512vbmi"][..]),
        ("pentium", &["not a CPU model", "x86-64-v3"]),
        ("host,avx2=perhaps", &["avx2=on or avx2=off"]),
    ] {
        let (code, said) = end_of(cpu);
        assert_eq!(code, 2, "{said}");
        assert!(words.iter().all(|word| said.contains(word)), "{words:?}: {said}");
    }
}

#[test]
#[needs(kvm)]
fn a_feature_that_the_host_lacks_is_refused_by_name() {
    // Only Xeon Phi has ever had it.
    let (code, said) = end_of("host,+avx512er");
    assert_eq!(code, 126, "{said}");
    assert!(said.contains("--cpu host,+avx512er: this host lacks avx512er"), "{said}");
    // What no host here has of nested virtualization is a lack like any other.
    let (_, features) = host_model();
    for name in ["vmx", "svm"] {
        assert!(
            !features.iter().any(|feature| feature == name),
            "{name} is offered to no one unasked"
        );
    }
}

#[test]
#[needs(kvm)]
fn a_baseline_hides_what_lies_above_it_or_the_host_is_named() {
    let (level, features) = host_model();
    let props = shown("x86-64-v1");
    assert_eq!((&props["sse2"], &props["avx2"]), (&json!(true), &json!(false)));
    if level.as_str() >= "x86-64-v2" {
        let props = shown("x86-64-v2,-popcnt");
        assert_eq!(
            ["sse4.2", "popcnt", "avx", "avx2"].map(|name| props[name].as_bool().unwrap()),
            [true, false, false, false]
        );
        let (code, said) = end_of("x86-64-v2");
        assert_eq!(code, 0, "{said}");
        // Where KVM cannot hide the host's own, that is said; elsewhere the guest does not see it.
        let forced = said.contains("shows the guest nevertheless: ");
        let avx2_is_forced =
            said.lines().any(|line| line.contains("nevertheless") && line.contains("avx2"));
        let cpuid_is_the_hosts = forced && features.iter().any(|name| name == "avx2");
        assert_eq!(avx2_is_forced, cpuid_is_the_hosts, "{said}");
    }
}

#[test]
#[needs(kvm)]
fn a_guest_of_the_hosts_baseline_moves_and_keeps_its_model_through_a_reset() {
    let (code, text) = ferry::end_of(["doctor", "--cpu-model"]).unwrap();
    assert_eq!(code, 0, "{text}");
    let folder = tempfile::tempdir().unwrap();
    let mut older: Value = serde_json::from_str(&text).unwrap();
    let file = folder.path().join("older.json");
    // A host without one feature that the baseline may have or not.
    older["features"].as_array_mut().unwrap().retain(|name| name != "x2apic");
    std::fs::write(&file, older.to_string()).unwrap();
    let (code, said) = ferry::end_of(["doctor", "--baseline", file.to_str().unwrap()]).unwrap();
    assert_eq!(code, 0, "{said}");
    let cpu = said.trim().strip_prefix("--cpu ").unwrap_or_else(|| panic!("{said}"));
    assert!(cpu.starts_with("x86-64-v") && cpu.contains("-x2apic"), "{cpu}");

    let source = ferry::run_with(&Guest::new("work=idle", 64), &["--cpu", cpu]).unwrap();
    source.wait_line("^HB n=1 ").unwrap();
    let destination =
        ferry::receive_at("tcp:127.0.0.1:0", &["--kernel", guest_images::KERNEL]).unwrap();
    ferry::migrate_well(&source, &destination.address, &[]).unwrap();
    let mut vmm = destination.vmm;
    vmm.wait_line("^HB ").unwrap();
    let from = vmm.serial().count();
    vmm.qmp().unwrap().execute("system_reset", json!({})).unwrap();
    vmm.serial().wait_from(from, "^HB n=0 ", SOON).unwrap();
    vmm.process.kill().unwrap();
}

#[test]
#[needs(kvm)]
fn files_that_no_host_wrote_and_hosts_of_other_vendors_are_named() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("host.json");
    let file_name = file.to_str().unwrap();
    for (text, words) in [
        ("{}", &[file_name, "ferry doctor --cpu-model"][..]),
        (
            r#"{"vendor": "NobodysCPU", "level": null, "features": []}"#,
            &["different vendors", "NobodysCPU"],
        ),
    ] {
        std::fs::write(&file, text).unwrap();
        let (code, said) = ferry::end_of(["doctor", "--baseline", file_name]).unwrap();
        assert_eq!(code, 126, "{said}");
        assert!(words.iter().all(|word| said.contains(word)), "{words:?}: {said}");
    }
}

#[test]
#[needs(kvm)]
fn a_model_is_expanded_as_qemu_expands_it() {
    let vmm = ferry::run(&Guest::new("work=idle", 64)).unwrap();
    let mut qmp = vmm.qmp().unwrap();
    let expand = |kind: &str, model: Value| json!({"type": kind, "model": model});
    let mut ask = |arguments| qmp.execute("query-cpu-model-expansion", arguments);
    let full = ask(expand("full", json!({"name": "max"}))).unwrap();
    assert_eq!(full["model"]["name"], "host");
    assert_eq!(full["model"]["props"]["fpu"], true);
    let less = ask(expand("static", json!({"name": "host", "props": {"cmov": false}}))).unwrap();
    assert_eq!(
        (&less["model"]["name"], &less["model"]["props"]["cmov"]),
        (&json!("base"), &json!(false))
    );
    for model in [json!({"name": "486"}), json!({"name": "host", "props": {"avx1024": true}})] {
        assert!(ask(expand("full", model)).is_err());
    }
}

#[test]
#[needs(kvm)]
fn all_254_vcpus_are_started_each_with_an_id_of_its_own_and_move() {
    let mut guest = Guest::new("", 64);
    guest.kernel = guest_images::CPUS.into();
    for (cpus, count) in
        [(1, "CPUS 01 OTHERS 00"), (17, "CPUS 11 OTHERS 10"), (254, "CPUS fe OTHERS fd")]
    {
        guest.cpus = cpus;
        let mut vmm = ferry::run_with(&guest, &["--migrate-every", "500ms", "-v"]).unwrap();
        vmm.wait_line(&format!("^{count}$")).unwrap();
        // After two moves, all are stopped and started again.
        vmm.process.err.wait_for(r"\bmove 2: ", SOON).unwrap();
        let from = vmm.serial().count();
        vmm.process.type_in("r").unwrap();
        vmm.serial().wait_from(from, &format!("^{count}$"), SOON).unwrap();
        vmm.process.type_in("q").unwrap();
        assert_eq!(vmm.process.exit_code(SOON).unwrap(), 1, "{}", vmm.process.err.text());
        assert!(!vmm.process.err.text().contains("failed"), "{}", vmm.process.err.text());
    }
}
