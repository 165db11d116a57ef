//! Capabilities and parameters of a migration, with QEMU's names and defaults, validated once.

use crate::bitmap::mapping::Mapping;
use crate::ram::compress::Method;
use crate::wire::section::MAX_DATA_CHANNELS;
use devices::ram::PAGE_SIZE;
use std::ops::RangeInclusive;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

/// Parameters a user may set before or during a migration.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Params {
    /// Bandwidth cap in bytes per second; 0 for none. QEMU's `max-bandwidth`.
    pub max_bandwidth: u64,
    /// Longest pause to aim for. QEMU's `downtime-limit`.
    pub downtime_limit: Duration,
    /// Several data channels. QEMU's capability `multifd`; on by default.
    pub multifd: bool,
    /// Number of data channels, 1 to [`MAX_DATA_CHANNELS`]. QEMU's `multifd-channels`; read once, at the
    /// start.
    pub multifd_channels: u16,
    /// Send deltas of pages that the destination has an older version of. QEMU's capability `xbzrle`.
    pub xbzrle: bool,
    /// Bytes of the XBZRLE caches, over all channels. QEMU's `xbzrle-cache-size`.
    pub xbzrle_cache_size: u64,
    /// Compress runs of pages. QEMU's `multifd-compression`.
    pub compression: Compression,
    /// Level of zlib, 0 to 9. QEMU's `multifd-zlib-level`.
    pub zlib_level: u8,
    /// Level of zstd, 0 to 20. QEMU's `multifd-zstd-level`.
    pub zstd_level: u8,
    /// Compress runs of pages by zlib unless `compression` says how. QEMU's capability `compress` (until 9.0).
    pub compress: bool,
    /// Level of zlib then, 0 to 9. QEMU's `compress-level`.
    pub compress_level: u8,
    /// Disks migrate unless the command says which. QEMU's capability `block` (until 9.0); for the VMM, which
    /// chooses the participants.
    pub block: bool,
    /// Only the data above their backing files does. QEMU's `block-incremental`.
    pub block_incremental: bool,
    /// The disks' dirty bitmaps migrate. QEMU's capability `dirty-bitmaps`; for the VMM, like the next.
    pub dirty_bitmaps: bool,
    /// Which of them, and under which names; `None` for all under their own. QEMU's `block-bitmap-mapping`.
    pub block_bitmap_mapping: Option<Arc<Mapping>>,
    /// Throttle a guest that writes faster than it can be sent. QEMU's capability `auto-converge`.
    pub auto_converge: bool,
    pub throttle: ThrottleParams,
}

/// How runs of pages are compressed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Compression {
    #[default]
    None,
    Zlib,
    Zstd,
}

impl Compression {
    /// QEMU's name.
    pub fn name(self) -> &'static str {
        match self {
            Self::None => "none",
            Self::Zlib => "zlib",
            Self::Zstd => "zstd",
        }
    }

    /// The one that QEMU calls `name`.
    pub fn from_name(name: &str) -> Option<Self> {
        [Self::None, Self::Zlib, Self::Zstd].into_iter().find(|method| method.name() == name)
    }
}

impl Default for Params {
    fn default() -> Self {
        // QEMU caps at 128 MiB/s by default; a migration tool should use the link it is given.
        Self {
            max_bandwidth: 0,
            downtime_limit: Duration::from_millis(300),
            multifd: true,
            multifd_channels: default_channels(),
            xbzrle: false,
            xbzrle_cache_size: 64 << 20,
            compression: Compression::None,
            zlib_level: 1,
            zstd_level: 1,
            compress: false,
            compress_level: 1,
            block: false,
            block_incremental: false,
            dirty_bitmaps: false,
            block_bitmap_mapping: None,
            auto_converge: false,
            throttle: ThrottleParams::default(),
        }
    }
}

/// A channel keeps one CPU busy on either side: use half of this host's, and leave the rest to the guest.
fn default_channels() -> u16 {
    let processors = std::thread::available_parallelism().map_or(1, usize::from);
    u16::try_from(processors / 2).unwrap_or(MAX_DEFAULT_CHANNELS).clamp(1, MAX_DEFAULT_CHANNELS)
}

/// Most channels that are opened by default.
const MAX_DEFAULT_CHANNELS: u16 = 4;

/// How far a guest is throttled. All values are percent.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ThrottleParams {
    /// Throttle while the guest dirties more than this part of what is sent. QEMU's
    /// `throttle-trigger-threshold`.
    pub trigger_threshold: u8,
    /// The first step. QEMU's `cpu-throttle-initial`.
    pub initial: u8,
    /// Each further step; several may be taken at once. QEMU's `cpu-throttle-increment`.
    pub increment: u8,
    /// One step at a time, and the last no further than needed. QEMU's `cpu-throttle-tailslow`.
    pub tailslow: bool,
    /// Never more than this. QEMU's `max-cpu-throttle`.
    pub max: u8,
}

impl Default for ThrottleParams {
    fn default() -> Self {
        Self { trigger_threshold: 50, initial: 20, increment: 10, tailslow: false, max: 99 }
    }
}

/// QEMU's limit on `downtime-limit`: 2000 seconds.
pub const MAX_DOWNTIME_LIMIT: Duration = Duration::from_secs(2000);

/// A parameter out of range.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ParamsError {
    /// `downtime-limit` past [`MAX_DOWNTIME_LIMIT`].
    #[error(
        "Parameter 'downtime-limit' expects an integer in the range of 0 to 2000000 milliseconds"
    )]
    DowntimeLimit,
    /// `multifd-channels` out of range.
    #[error("Parameter 'multifd-channels' expects a value between 1 and {MAX_DATA_CHANNELS}")]
    Channels,
    /// `xbzrle-cache-size` is less than a page per channel.
    #[error(
        "Parameter 'xbzrle-cache-size' expects a page of {PAGE_SIZE} bytes for each channel at least"
    )]
    CacheTooSmall,
    /// A compression level that is not supported.
    #[error("Parameter '{name}' expects a value between 0 and {most}")]
    Level { name: &'static str, most: u8 },
    /// A percentage out of range.
    #[error("Parameter '{name}' expects an integer in the range of {least} to {most}")]
    Range { name: &'static str, least: u8, most: u8 },
}

fn in_range(name: &'static str, value: u8, range: RangeInclusive<u8>) -> Result<(), ParamsError> {
    if range.contains(&value) {
        return Ok(());
    }
    let (least, most) = range.into_inner();
    Err(ParamsError::Range { name, least, most })
}

impl Params {
    /// Data channels to open.
    pub fn channels(&self) -> u16 {
        if self.multifd { self.multifd_channels } else { 1 }
    }

    /// The compression method, if any.
    pub fn method(&self) -> Option<Method> {
        match self.compression {
            Compression::None if self.compress => Some(Method::Zlib { level: self.compress_level }),
            Compression::None => None,
            Compression::Zlib => Some(Method::Zlib { level: self.zlib_level }),
            Compression::Zstd => Some(Method::Zstd { level: self.zstd_level }),
        }
    }

    /// Checks every range.
    pub fn validate(&self) -> Result<(), ParamsError> {
        if self.downtime_limit > MAX_DOWNTIME_LIMIT {
            return Err(ParamsError::DowntimeLimit);
        }
        if !(1..=MAX_DATA_CHANNELS).contains(&self.multifd_channels) {
            return Err(ParamsError::Channels);
        }
        if self.xbzrle_cache_size < PAGE_SIZE * u64::from(self.multifd_channels) {
            return Err(ParamsError::CacheTooSmall);
        }
        let levels = [
            ("multifd-zlib-level", self.zlib_level, Method::MAX_ZLIB_LEVEL),
            ("multifd-zstd-level", self.zstd_level, Method::MAX_ZSTD_LEVEL),
            ("compress-level", self.compress_level, Method::MAX_ZLIB_LEVEL),
        ];
        if let Some((name, _, most)) = levels.into_iter().find(|(_, level, most)| level > most) {
            return Err(ParamsError::Level { name, most });
        }
        let throttle = &self.throttle;
        in_range("throttle-trigger-threshold", throttle.trigger_threshold, 1..=100)?;
        in_range("cpu-throttle-initial", throttle.initial, 1..=99)?;
        in_range("cpu-throttle-increment", throttle.increment, 1..=99)?;
        in_range("max-cpu-throttle", throttle.max, throttle.initial..=99)
    }
}

/// Parameters shared with a running migration, which reads them at every step.
#[derive(Debug, Clone, Default)]
pub struct SharedParams(Arc<Shared>);

#[derive(Debug, Default)]
struct Shared {
    params: Mutex<Params>,
    /// As in `params`: read before every write to a connection, so without a lock.
    max_bandwidth: AtomicU64,
}

impl SharedParams {
    /// Shares `params`.
    pub fn new(params: Params) -> Self {
        let max_bandwidth = AtomicU64::new(params.max_bandwidth);
        Self(Arc::new(Shared { params: Mutex::new(params), max_bandwidth }))
    }

    /// The values now.
    pub fn get(&self) -> Params {
        devices::lock(&self.0.params).clone()
    }

    /// The bandwidth cap now.
    pub fn max_bandwidth(&self) -> u64 {
        self.0.max_bandwidth.load(Ordering::Relaxed)
    }

    /// Replaces the values. A running migration applies them at its next step.
    pub fn set(&self, params: Params) {
        let mut now = devices::lock(&self.0.params);
        self.0.max_bandwidth.store(params.max_bandwidth, Ordering::Relaxed);
        *now = params;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_out_of_range_is_named() {
        let refused = |throttle: ThrottleParams| {
            let params = Params { throttle, ..Params::default() };
            params.validate().unwrap_err().to_string()
        };
        let default = ThrottleParams::default;
        assert_eq!(Params::default().validate(), Ok(()));
        assert_eq!(
            refused(ThrottleParams { initial: 0, ..default() }),
            "Parameter 'cpu-throttle-initial' expects an integer in the range of 1 to 99"
        );
        let none = refused(ThrottleParams { trigger_threshold: 101, ..default() });
        assert!(none.contains("throttle-trigger-threshold"), "{none}");
        let none = refused(ThrottleParams { increment: 100, ..default() });
        assert!(none.contains("cpu-throttle-increment"), "{none}");
        // A maximum below the first step.
        let none = refused(ThrottleParams { max: 19, ..default() });
        assert!(
            none.contains("'max-cpu-throttle' expects an integer in the range of 20"),
            "{none}"
        );
    }
}
