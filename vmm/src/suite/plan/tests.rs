use super::*;
use crate::cli::{Cli, Command};
use clap::Parser;

fn args(words: &[&str]) -> TestArgs {
    let cli = Cli::try_parse_from([&["ferry", "test"], words].concat()).unwrap();
    match cli.command {
        Command::Test(args) => *args,
        other => panic!("{other:?}"),
    }
}

fn planned(words: &[&str]) -> Result<Vec<Case>, String> {
    cases(&args(words)).map_err(|problems| problems.join("\n"))
}

fn config(case: &Case) -> &RunConfig {
    match &case.plan {
        Plan::Run(prepared) => &prepared.config,
        Plan::Skip(why) | Plan::Error(why) => panic!("{}: {why}", case.name),
    }
}

fn skipped(case: &Case) -> &str {
    match &case.plan {
        Plan::Skip(why) => why,
        Plan::Run(_) | Plan::Error(_) => panic!("{}: not skipped", case.name),
    }
}

/// Writes a file of tests with kernels `a.flat` and `b.flat` beside it.
fn file(text: &str) -> (tempfile::TempDir, String) {
    let folder = tempfile::tempdir().unwrap();
    for name in ["a.flat", "b.flat"] {
        std::fs::write(folder.path().join(name), "kernel").unwrap();
    }
    let path = folder.path().join("unittests.cfg");
    std::fs::write(&path, text).unwrap();
    let path = path.to_str().unwrap().to_owned();
    (folder, path)
}

#[test]
fn kernels_have_the_options_of_the_line_and_names_of_their_own() {
    let line =
        ["x/a.flat", "y/a.flat", "b", "--memory", "64M", "--timeout", "5s", "--expected", "b=3"];
    let cases = planned(&line).unwrap();
    let names: Vec<_> = cases.iter().map(|case| case.name.as_str()).collect();
    assert_eq!(names, ["a", "a-2", "b"]);
    let first = config(&cases[0]);
    assert_eq!((first.memory_bytes, first.host.timeout), (64 << 20, Some(Duration::from_secs(5))));
    assert!(first.host.no_reboot && first.host.with_parent);
    assert_eq!((cases[2].expected, cases[2].pass.as_slice()), (Expected::Code(3), &[1][..]));
    let cases = planned(&["a", "--expect", "OK"]).unwrap();
    assert_eq!(
        (cases[0].pass.as_slice(), config(&cases[0]).host.timeout),
        (&[1, 0][..], Some(TIMEOUT))
    );
    assert_eq!(planned(&["a", "--pass", "33,3"]).unwrap()[0].pass, [33, 3]);
}

#[test]
fn options_that_are_not_for_many_and_names_that_are_not_there_are_refused() {
    for (words, word) in [
        (&["a", "--qmp", "unix:/q"][..], "--qmp"),
        (&["a", "--serial", "null"], "--serial"),
        (&["a", "--kernel", "k"], "--kernel"),
        (&["a", "--expected", "c=fail"], "\"c\""),
        (&["a", "--cpus", "255"], "--cpus"),
        (&[], "no test"),
        (&["--config", "/nonexistent.cfg"], "/nonexistent.cfg"),
    ] {
        let error = planned(words).err().unwrap();
        assert!(error.contains(word), "{words:?}: {error}");
    }
}

#[test]
fn a_section_of_the_file_is_a_machine_as_its_own_runner_makes_it() {
    let (_folder, path) = file(
        "[one]\nfile = a.flat\nsmp = 2\nextra_params = -m 1g -append 'x y'\ntimeout = 7\n\
         [two]\nfile = b.flat\ntest_args = \"q r\"\nexpected = fail\n[none]\nfile = c.flat\n\
         [panic]\nfile = a.flat\ngroups = panic\n[endless]\nfile = a.flat\ntimeout = 0\n",
    );
    let cases = planned(&["--config", &path, "--migrate-every", "1s"]).unwrap();
    let one = config(&cases[0]);
    assert_eq!((one.cpus, one.memory_bytes, one.cmdline.as_str()), (2, 1 << 30, "x y"));
    assert_eq!(one.host.timeout, Some(Duration::from_secs(7)));
    assert_eq!(one.migrate_every, Some(Duration::from_secs(1)));
    assert!(one.hardware.testdev && one.host.serial == SerialConfig::Stdio);
    assert!(one.boot.kernel.ends_with("a.flat") && one.boot.kernel.is_absolute());
    assert_eq!((config(&cases[1]).cmdline.as_str(), cases[1].expected), ("q r", Expected::Fail));
    assert!(matches!(&cases[2].plan, Plan::Error(why) if why.contains("c.flat")));
    assert_eq!(cases[3].pass, [exit_code::CRASHED]);
    assert_eq!(config(&cases[4]).host.timeout, None);
}

#[test]
fn what_is_not_for_here_is_skipped_with_the_reason() {
    let (folder, _) = file("");
    let value = folder.path().join("value");
    std::fs::write(&value, "N\n").unwrap();
    let text = format!(
        "[group]\nfile = a.flat\ngroups = nodefault slow\n[arch]\nfile = a.flat\narch = i386\n\
         [accel]\nfile = a.flat\naccel = tcg\n[check]\nfile = a.flat\ncheck = {0}=Y\n\
         [device]\nfile = a.flat\nextra_params = -device edu\n[shell]\nfile = a.flat\n\
         extra_params = -append $(id)\n[fine]\nfile = a.flat\ncheck = {0}=N\n",
        value.display()
    );
    let (_folder, path) = file(&text);
    let cases = planned(&["--config", &path]).unwrap();
    let words = ["asked for", "i386 only", "tcg only", "is not Y", "edu", "needs a shell"];
    for (case, word) in cases.iter().zip(words) {
        assert!(skipped(case).contains(word), "{}", skipped(case));
    }
    config(&cases[6]);
    for more in [&["group"][..], &["--all"], &["--groups", "slow,fast"]] {
        let cases = planned(&[&["--config", &path], more].concat()).unwrap();
        config(&cases[0]);
    }
    assert_eq!(planned(&["--config", &path, "--groups", "slow"]).unwrap().len(), 1);
    assert!(planned(&["--config", &path, "nobody"]).err().unwrap().contains("nobody"));
}
