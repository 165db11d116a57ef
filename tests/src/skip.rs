//! Checks that a host cannot run; `#[needs(…)]` finds out which. A skip is said loudly, and is a failure where
//! it would hide something.

use std::fs::OpenOptions;

/// Says that the calling test checks nothing because of `reason`.
///
/// # Panics
/// If `FERRY_REQUIRE_KVM=1` or `CI=true`: there a skipped check is a failed one.
pub fn skip(reason: &str) {
    let strict = |name: &str, value: &str| std::env::var(name).is_ok_and(|found| found == value);
    let thread = std::thread::current();
    let test = thread.name().unwrap_or("?");
    assert!(
        !strict("FERRY_REQUIRE_KVM", "1") && !strict("CI", "true"),
        "{test} would have to be skipped: {reason}"
    );
    // A line each: they are counted.
    let words: Vec<&str> = reason.split_whitespace().collect();
    let line = format!("SKIPPED {test}: {}\n", words.join(" "));
    say(line.trim_end());
    // What `make test` counts.
    let counted = std::env::var_os("FERRY_SKIP_FILE")
        .and_then(|path| OpenOptions::new().create(true).append(true).open(path).ok());
    if let Some(mut file) = counted {
        // Nothing else can be done if it cannot be written.
        let _ = std::io::Write::write_all(&mut file, line.as_bytes());
    }
}

/// Says something past the test runner's capture, so that it is seen also if the test passes.
pub fn say(text: &str) {
    // Only `print!` and its like are captured. Nothing else can be done if it cannot be written.
    let _ = std::io::Write::write_all(&mut std::io::stderr(), format!("{text}\n").as_bytes());
}
