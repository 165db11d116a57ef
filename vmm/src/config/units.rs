//! Parses sizes, rates, durations and compression methods. Used by the command line, the configuration file
//! and the options of `ferry migrate`.

use migration::params::Compression;
use migration::ram::compress::Method;
use std::str::FromStr;
use std::time::Duration;

/// A size such as `512M`, `1G` or `64K`; a plain number is MiB for memory and bytes for rates.
pub fn parse_size(text: &str, plain_unit: u64) -> Result<u64, String> {
    let digits = text.trim_end_matches(|c: char| c.is_ascii_alphabetic());
    let unit = match text[digits.len()..].to_ascii_uppercase().as_str() {
        "" => plain_unit,
        "B" => 1,
        "K" | "KB" | "KIB" => 1 << 10,
        "M" | "MB" | "MIB" => 1 << 20,
        "G" | "GB" | "GIB" => 1 << 30,
        "T" | "TB" | "TIB" => 1 << 40,
        other => return Err(format!("unknown unit {other:?} in {text:?}")),
    };
    let number: u64 =
        digits.parse().map_err(|_| format!("{text:?} is not a size such as 512M or 1G"))?;
    number.checked_mul(unit).ok_or_else(|| format!("{text:?} is too large"))
}

/// A memory size; a plain number is MiB, as in QEMU.
pub fn parse_memory(text: &str) -> Result<u64, String> {
    parse_size(text, 1 << 20)
}

/// A rate in bytes per second.
pub fn parse_rate(text: &str) -> Result<u64, String> {
    parse_size(text, 1)
}

/// Reads a compression method with its level: `none`, `zlib`, `zlib:6`, `zstd:3`.
pub fn parse_compression(text: &str) -> Result<(Compression, Option<u8>), String> {
    let (name, level) = match text.split_once(':') {
        Some((name, level)) => (name, Some(level)),
        None => (text, None),
    };
    let method = Compression::from_name(name)
        .ok_or_else(|| format!("{name:?} is not a method; there are none, zlib and zstd"))?;
    let most = match method {
        Compression::None if level.is_some() => return Err("none has no level".to_owned()),
        Compression::None => 0,
        Compression::Zlib => Method::MAX_ZLIB_LEVEL,
        Compression::Zstd => Method::MAX_ZSTD_LEVEL,
    };
    let level = level.map(|level| {
        let number = level.parse().ok().filter(|number| *number <= most);
        number.ok_or_else(|| format!("{level:?} is not a level of {name}, from 0 to {most}"))
    });
    Ok((method, level.transpose()?))
}

/// `on` or `off`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Switch(pub bool);

impl FromStr for Switch {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "on" => Ok(Self(true)),
            "off" => Ok(Self(false)),
            other => Err(format!("{other:?} is neither on nor off")),
        }
    }
}

/// A duration such as `20ms`, `30s` or `2m`; a plain number is seconds.
pub fn parse_duration(text: &str) -> Result<Duration, String> {
    let digits = text.trim_end_matches(|c: char| c.is_ascii_alphabetic());
    let number: f64 = digits
        .parse()
        .ok()
        .filter(|number: &f64| number.is_finite() && *number >= 0.0)
        .ok_or_else(|| format!("{text:?} is not a duration such as 20ms or 30s"))?;
    let seconds = match &text[digits.len()..] {
        "us" => number / 1e6,
        "ms" => number / 1e3,
        "" | "s" => number,
        "m" | "min" => number * 60.0,
        "h" => number * 3600.0,
        other => return Err(format!("unknown unit {other:?} in {text:?}")),
    };
    Duration::try_from_secs_f64(seconds).map_err(|_| format!("{text:?} is too long"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_and_durations_are_read_as_people_write_them() {
        assert_eq!(parse_memory("512M"), Ok(512 << 20));
        assert_eq!(parse_memory("128"), Ok(128 << 20));
        assert_eq!(parse_rate("1G"), Ok(1 << 30));
        assert_eq!(parse_duration("20ms"), Ok(Duration::from_millis(20)));
        assert_eq!(parse_duration("1.5"), Ok(Duration::from_millis(1500)));
        for bad in ["", "M", "12Q", "-1", "99999999999T"] {
            assert!(parse_memory(bad).is_err(), "{bad}");
        }
        for bad in ["", "s", "-1s", "5y", "inf"] {
            assert!(parse_duration(bad).is_err(), "{bad}");
        }
    }
}
