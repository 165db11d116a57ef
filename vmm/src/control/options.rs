//! Capabilities and parameters of migrations, as the control socket names them. Used by `command`; the
//! supervisor applies them.

use super::arguments::{Arguments, Kind, Member, missing, needed, optional};
use super::message::QmpError;
use migration::bitmap::mapping::{MappedBitmap, MappedNode, Mapping};
use migration::params::{Compression, Params};
use serde_json::{Value, json};
use std::sync::Arc;
use std::time::Duration;

/// A capability of migrations.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Capability {
    /// The control socket's: whether it sends events of migrations.
    Events,
    /// Always on.
    ReturnPath,
    /// Throttles a guest that writes too fast.
    AutoConverge,
    /// Sends differences to earlier pages.
    Xbzrle,
    /// Sends pages over several channels.
    Multifd,
    /// Compresses pages by zlib: QEMU's until 9.0, where `multifd-compression` says it now.
    Compress,
    /// Migrates disks, as `migrate` does with `blk`: QEMU's until 9.0.
    Block,
    /// Always on: zeroes on disks take no bandwidth.
    ZeroBlocks,
    /// The disks' dirty bitmaps migrate.
    DirtyBitmaps,
}

impl Capability {
    /// All of them.
    pub const ALL: &[Self] = &[
        Self::Events,
        Self::ReturnPath,
        Self::AutoConverge,
        Self::Xbzrle,
        Self::Multifd,
        Self::Compress,
        Self::Block,
        Self::ZeroBlocks,
        Self::DirtyBitmaps,
    ];

    const NAMES: &[&str] = &{
        let mut names = [""; Self::ALL.len()];
        let mut index = 0;
        while index < names.len() {
            names[index] = Self::ALL[index].name();
            index += 1;
        }
        names
    };

    /// QEMU's name.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Events => "events",
            Self::ReturnPath => "return-path",
            Self::AutoConverge => "auto-converge",
            Self::Xbzrle => "xbzrle",
            Self::Multifd => "multifd",
            Self::Compress => "compress",
            Self::Block => "block",
            Self::ZeroBlocks => "zero-blocks",
            Self::DirtyBitmaps => "dirty-bitmaps",
        }
    }

    /// Whether it cannot be switched off.
    fn is_always_on(self) -> bool {
        matches!(self, Self::ReturnPath | Self::ZeroBlocks)
    }

    /// Whether it is on.
    pub fn is_on(self, params: &Params, events_wanted: bool) -> bool {
        match self {
            Self::Events => events_wanted,
            Self::ReturnPath | Self::ZeroBlocks => true,
            Self::AutoConverge => params.auto_converge,
            Self::Xbzrle => params.xbzrle,
            Self::Multifd => params.multifd,
            Self::Compress => params.compress,
            Self::Block => params.block,
            Self::DirtyBitmaps => params.dirty_bitmaps,
        }
    }
}

/// A list of capabilities to switch on or off.
pub const CAPABILITIES: Kind = Kind::List(&Kind::Object {
    name: "MigrationCapabilityStatus",
    members: &[
        needed(
            "capability",
            Kind::Choice { name: "MigrationCapability", values: Capability::NAMES },
        ),
        needed("state", Kind::Flag),
    ],
});

/// Reads such a list.
pub fn capabilities(list: Vec<Value>) -> Result<Vec<(Capability, bool)>, QmpError> {
    let one = |value: Value| {
        let name = value["capability"].as_str();
        let named = |capability: &&Capability| Some(capability.name()) == name;
        let capability = Capability::ALL.iter().find(named).ok_or_else(|| missing("capability"))?;
        let state = value["state"].as_bool().ok_or_else(|| missing("state"))?;
        if capability.is_always_on() && !state {
            let desc = format!("Capability '{}' is always on", capability.name());
            return Err(QmpError::generic(desc));
        }
        Ok((*capability, state))
    };
    list.into_iter().map(one).collect()
}

/// Switches capabilities of migrations on or off.
pub fn set_capabilities(params: &mut Params, list: &[(Capability, bool)]) {
    for (capability, state) in list {
        match capability {
            // The control socket's, and those that cannot be changed.
            Capability::Events | Capability::ReturnPath | Capability::ZeroBlocks => {}
            Capability::AutoConverge => params.auto_converge = *state,
            Capability::Xbzrle => params.xbzrle = *state,
            Capability::Multifd => params.multifd = *state,
            Capability::Compress => params.compress = *state,
            Capability::Block => params.block = *state,
            Capability::DirtyBitmaps => params.dirty_bitmaps = *state,
        }
    }
}

/// Options of one migration, Ferry's own: what `migrate-set-parameters` and `migrate-set-capabilities` have
/// set stays as it is for the next one.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct OwnOptions {
    /// `x-id`: the name by which its client follows it.
    pub id: Option<String>,
    /// `x-parameters`
    pub parameters: ParameterChange,
    /// `x-capabilities`
    pub capabilities: Vec<(Capability, bool)>,
    /// `x-end-source`: the process ends once the guest has moved and the client has gone.
    pub end_source: bool,
}

/// Longest `x-id`.
const MAX_ID_BYTES: usize = 64;

impl OwnOptions {
    /// Reads them.
    pub fn parse(arguments: &mut Arguments) -> Result<Self, QmpError> {
        let id = migration_id(arguments)?;
        // Not given: nothing differs from what is set for all.
        let parameters = arguments.object("x-parameters").unwrap_or_default();
        let parameters = ParameterChange::parse(&mut Arguments::new(PARAMETERS, parameters)?)?;
        let capabilities = capabilities(arguments.list("x-capabilities").unwrap_or_default())?;
        if capabilities.iter().any(|(capability, _)| *capability == Capability::Events) {
            let desc =
                "Capability 'events' is not one of a migration: use migrate-set-capabilities";
            return Err(QmpError::generic(desc));
        }
        let end_source = arguments.flag("x-end-source").unwrap_or(false);
        Ok(Self { id, parameters, capabilities, end_source })
    }

    /// `params` for this migration, checked.
    pub fn apply(&self, mut params: Params) -> Result<Params, QmpError> {
        set_capabilities(&mut params, &self.capabilities);
        self.parameters.apply(params)
    }
}

/// `x-id`.
pub fn migration_id(arguments: &mut Arguments) -> Result<Option<String>, QmpError> {
    match arguments.text("x-id") {
        Some(id) if id.is_empty() || id.len() > MAX_ID_BYTES => Err(QmpError::generic(format!(
            "Parameter 'x-id' expects a name of 1 to {MAX_ID_BYTES} bytes"
        ))),
        id => Ok(id),
    }
}

/// The parameters that can be changed.
pub const PARAMETERS: &[Member] = &[
    optional("max-bandwidth", Kind::Whole),
    optional("downtime-limit", Kind::Whole),
    optional("multifd-channels", Kind::Whole),
    optional(
        "multifd-compression",
        Kind::Choice { name: "MultiFDCompression", values: &["none", "zlib", "zstd"] },
    ),
    optional("multifd-zlib-level", Kind::Whole),
    optional("multifd-zstd-level", Kind::Whole),
    optional("compress-level", Kind::Whole),
    optional("compress-threads", Kind::Whole),
    optional("decompress-threads", Kind::Whole),
    optional("compress-wait-thread", Kind::Flag),
    optional("block-incremental", Kind::Flag),
    optional("xbzrle-cache-size", Kind::Whole),
    optional("throttle-trigger-threshold", Kind::Whole),
    optional("cpu-throttle-initial", Kind::Whole),
    optional("cpu-throttle-increment", Kind::Whole),
    optional("max-cpu-throttle", Kind::Whole),
    optional("cpu-throttle-tailslow", Kind::Flag),
    optional("block-bitmap-mapping", MAPPING),
];

/// Which dirty bitmaps migrate, and what they are called on the wire.
const MAPPING: Kind = Kind::List(&Kind::Object {
    name: "BitmapMigrationNodeAlias",
    members: &[
        needed("node-name", Kind::Text),
        needed("alias", Kind::Text),
        needed(
            "bitmaps",
            Kind::List(&Kind::Object {
                name: "BitmapMigrationBitmapAlias",
                members: &[
                    needed("name", Kind::Text),
                    needed("alias", Kind::Text),
                    optional(
                        "transform",
                        Kind::Object {
                            name: "BitmapMigrationBitmapAliasTransform",
                            members: &[optional("persistent", Kind::Flag)],
                        },
                    ),
                ],
            }),
        ),
    ],
});

/// Reads such a list, and checks that it is a mapping.
fn mapping(list: Vec<Value>) -> Result<Mapping, QmpError> {
    let text = |value: &Value, name: &str| {
        value[name].as_str().map(str::to_owned).ok_or_else(|| missing(name))
    };
    let items = |value: &Value| value["bitmaps"].as_array().cloned().unwrap_or_default();
    let bitmap = |value: &Value| {
        let persistent = value["transform"]["persistent"].as_bool();
        let (name, alias) = (text(value, "name")?, text(value, "alias")?);
        Ok::<_, QmpError>(MappedBitmap { name, alias, persistent })
    };
    let nodes = list.iter().map(|value| {
        let bitmaps = items(value).iter().map(bitmap).collect::<Result<_, _>>()?;
        let (node_name, alias) = (text(value, "node-name")?, text(value, "alias")?);
        Ok::<_, QmpError>(MappedNode { node_name, alias, bitmaps })
    });
    Mapping::new(nodes.collect::<Result<_, _>>()?)
        .map_err(|error| QmpError::generic(error.to_string()))
}

/// As `query-migrate-parameters` shows it.
fn mapping_json(mapping: &Mapping) -> Value {
    let bitmap = |bitmap: &MappedBitmap| {
        let mut json = json!({"name": bitmap.name, "alias": bitmap.alias});
        if let Some(persistent) = bitmap.persistent {
            json["transform"] = json!({"persistent": persistent});
        }
        json
    };
    let node = |node: &MappedNode| {
        let bitmaps: Vec<_> = node.bitmaps.iter().map(bitmap).collect();
        json!({"node-name": node.node_name, "alias": node.alias, "bitmaps": bitmaps})
    };
    mapping.nodes().iter().map(node).collect()
}

/// Parameters to change; the others stay.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ParameterChange {
    /// `max-bandwidth`, bytes per second.
    pub max_bandwidth: Option<u64>,
    /// `downtime-limit`.
    pub downtime_limit: Option<Duration>,
    /// `multifd-channels`
    pub multifd_channels: Option<u16>,
    /// `multifd-compression`
    pub multifd_compression: Option<Compression>,
    /// `multifd-zlib-level`
    pub multifd_zlib_level: Option<u8>,
    /// `multifd-zstd-level`
    pub multifd_zstd_level: Option<u8>,
    /// `compress-level`
    pub compress_level: Option<u8>,
    /// `compress-threads` and `decompress-threads`: as many as there are data channels.
    pub compress_threads: [Option<u64>; 2],
    /// `compress-wait-thread`: always true.
    pub compress_wait_thread: Option<bool>,
    /// `block-incremental`
    pub block_incremental: Option<bool>,
    /// `xbzrle-cache-size`, bytes.
    pub xbzrle_cache_size: Option<u64>,
    /// `throttle-trigger-threshold`, percent, like the three below.
    pub throttle_trigger_threshold: Option<u8>,
    /// `cpu-throttle-initial`
    pub cpu_throttle_initial: Option<u8>,
    /// `cpu-throttle-increment`
    pub cpu_throttle_increment: Option<u8>,
    /// `max-cpu-throttle`
    pub max_cpu_throttle: Option<u8>,
    /// `cpu-throttle-tailslow`
    pub cpu_throttle_tailslow: Option<bool>,
    /// `block-bitmap-mapping`
    pub block_bitmap_mapping: Option<Arc<Mapping>>,
}

/// QEMU's threads for the capability `compress`.
const COMPRESS_THREADS: [&str; 2] = ["compress-threads", "decompress-threads"];

fn change<T>(value: &mut T, new: Option<T>) {
    if let Some(new) = new {
        *value = new;
    }
}

impl ParameterChange {
    /// Reads them.
    pub fn parse(arguments: &mut Arguments) -> Result<Self, QmpError> {
        let compression = arguments.text("multifd-compression");
        let compression = compression.map(|name| {
            Compression::from_name(&name).ok_or_else(|| {
                let desc =
                    format!("Parameter 'multifd-compression' does not accept value '{name}'");
                QmpError::generic(desc)
            })
        });
        Ok(Self {
            max_bandwidth: arguments.number("max-bandwidth"),
            downtime_limit: arguments.number("downtime-limit").map(Duration::from_millis),
            // Saturates: `Params::validate` refuses far smaller numbers.
            multifd_channels: arguments
                .number("multifd-channels")
                .map(|number| u16::try_from(number).unwrap_or(u16::MAX)),
            multifd_compression: compression.transpose()?,
            multifd_zlib_level: arguments.small("multifd-zlib-level"),
            multifd_zstd_level: arguments.small("multifd-zstd-level"),
            compress_level: arguments.small("compress-level"),
            compress_threads: COMPRESS_THREADS.map(|name| arguments.number(name)),
            compress_wait_thread: arguments.flag("compress-wait-thread"),
            block_incremental: arguments.flag("block-incremental"),
            xbzrle_cache_size: arguments.number("xbzrle-cache-size"),
            throttle_trigger_threshold: arguments.small("throttle-trigger-threshold"),
            cpu_throttle_initial: arguments.small("cpu-throttle-initial"),
            cpu_throttle_increment: arguments.small("cpu-throttle-increment"),
            max_cpu_throttle: arguments.small("max-cpu-throttle"),
            cpu_throttle_tailslow: arguments.flag("cpu-throttle-tailslow"),
            block_bitmap_mapping: arguments
                .list("block-bitmap-mapping")
                .map(|list| mapping(list).map(Arc::new))
                .transpose()?,
        })
    }

    /// Refuses threads that compress other than there are with `params`. Those can be given: a client may send
    /// back what it has read.
    fn check_threads(&self, params: &Params) -> Result<(), QmpError> {
        let channels = params.channels();
        for (name, threads) in COMPRESS_THREADS.into_iter().zip(self.compress_threads) {
            if threads.is_some_and(|threads| threads != u64::from(channels)) {
                return Err(QmpError::generic(format!(
                    "Parameter '{name}' is the number of data channels, {channels}: each has a thread, and \
                     'multifd-channels' sets it"
                )));
            }
        }
        if self.compress_wait_thread == Some(false) {
            return Err(QmpError::generic(
                "Parameter 'compress-wait-thread' is always true: no page goes uncompressed because a \
                 thread is busy",
            ));
        }
        Ok(())
    }

    /// `params` with the changes, checked.
    pub fn apply(&self, mut params: Params) -> Result<Params, QmpError> {
        change(&mut params.max_bandwidth, self.max_bandwidth);
        change(&mut params.downtime_limit, self.downtime_limit);
        change(&mut params.multifd_channels, self.multifd_channels);
        change(&mut params.compression, self.multifd_compression);
        change(&mut params.zlib_level, self.multifd_zlib_level);
        change(&mut params.zstd_level, self.multifd_zstd_level);
        change(&mut params.compress_level, self.compress_level);
        change(&mut params.block_incremental, self.block_incremental);
        change(&mut params.xbzrle_cache_size, self.xbzrle_cache_size);
        let throttle = &mut params.throttle;
        change(&mut throttle.trigger_threshold, self.throttle_trigger_threshold);
        change(&mut throttle.initial, self.cpu_throttle_initial);
        change(&mut throttle.increment, self.cpu_throttle_increment);
        change(&mut throttle.max, self.max_cpu_throttle);
        change(&mut throttle.tailslow, self.cpu_throttle_tailslow);
        if let Some(mapping) = &self.block_bitmap_mapping {
            params.block_bitmap_mapping = Some(mapping.clone());
        }
        params.validate().map_err(|error| QmpError::generic(error.to_string()))?;
        self.check_threads(&params)?;
        Ok(params)
    }
}

/// The reply to `query-migrate-parameters`.
pub fn parameters(params: &Params) -> Value {
    // Milliseconds: `u64` holds 580 million years.
    let mut shown = json!({
        "max-bandwidth": params.max_bandwidth,
        "downtime-limit": u64::try_from(params.downtime_limit.as_millis()).unwrap_or(u64::MAX),
        "multifd-channels": params.multifd_channels,
        "multifd-compression": params.compression.name(),
        "multifd-zlib-level": params.zlib_level,
        "multifd-zstd-level": params.zstd_level,
        "compress-level": params.compress_level,
        "compress-threads": params.channels(),
        "decompress-threads": params.channels(),
        "compress-wait-thread": true,
        "block-incremental": params.block_incremental,
        "xbzrle-cache-size": params.xbzrle_cache_size,
        "throttle-trigger-threshold": params.throttle.trigger_threshold,
        "cpu-throttle-initial": params.throttle.initial,
        "cpu-throttle-increment": params.throttle.increment,
        "cpu-throttle-tailslow": params.throttle.tailslow,
        "max-cpu-throttle": params.throttle.max,
    });
    // Absent is another thing than empty: then none migrates.
    if let Some(mapping) = &params.block_bitmap_mapping {
        shown["block-bitmap-mapping"] = mapping_json(mapping);
    }
    shown
}

#[cfg(test)]
mod tests {
    use super::*;
    use migration::ram::compress::Method;
    use serde_json::Map;

    #[test]
    fn every_parameter_is_read_and_shown() {
        let given = json!([{"node-name": "root", "alias": "r", "bitmaps": [
            {"name": "daily", "alias": "d", "transform": {"persistent": true}},
            {"name": "weekly", "alias": "w"},
        ]}]);
        let map = Arc::new(mapping(given.as_array().unwrap().clone()).unwrap());
        let mapped = Params { block_bitmap_mapping: Some(map), ..Params::default() };
        let shown = parameters(&mapped);
        assert_eq!(shown["block-bitmap-mapping"], given);
        assert_eq!(parameters(&Params::default()).get("block-bitmap-mapping"), None);
        let listed: Vec<_> = PARAMETERS.iter().map(|member| member.name).collect();
        assert_eq!(shown.as_object().unwrap().len(), listed.len());
        // What is shown can be set.
        let values: Map<_, _> = shown.as_object().unwrap().clone();
        let mut arguments = Arguments::new(PARAMETERS, values).unwrap();
        let change = ParameterChange::parse(&mut arguments).unwrap();
        assert!(arguments.are_read());
        let mut different = Params::default();
        different.downtime_limit *= 2;
        different.throttle.tailslow = !different.throttle.tailslow;
        assert_eq!(parameters(&change.apply(different).unwrap()), shown);
    }

    #[test]
    fn every_capability_that_can_be_changed_changes() {
        for capability in Capability::ALL {
            let mut params = Params::default();
            let changes = *capability != Capability::Events && !capability.is_always_on();
            for state in [true, false] {
                set_capabilities(&mut params, &[(*capability, state)]);
                assert!(!changes || capability.is_on(&params, false) == state, "{capability:?}");
            }
            let on = json!({"capability": capability.name(), "state": true});
            assert_eq!(capabilities(vec![on]), Ok(vec![(*capability, true)]));
            let off = json!({"capability": capability.name(), "state": false});
            assert_eq!(capabilities(vec![off]).is_err(), capability.is_always_on());
        }
    }

    #[test]
    fn what_qemu_called_otherwise_until_9_0_does_the_same() {
        let change = |values: Value| {
            let values = values.as_object().cloned().unwrap();
            ParameterChange::parse(&mut Arguments::new(PARAMETERS, values).unwrap()).unwrap()
        };
        let mut params = Params { multifd_channels: 3, ..Params::default() };
        set_capabilities(&mut params, &[(Capability::Compress, true)]);
        let mut params = change(json!({"compress-level": 7})).apply(params).unwrap();
        assert_eq!(params.method(), Some(Method::Zlib { level: 7 }));
        params.compression = Compression::Zstd;
        assert_eq!(params.method(), Some(Method::Zstd { level: 1 }), "the newer name decides");
        // As many threads as there are.
        let fits =
            json!({"compress-threads": 3, "decompress-threads": 3, "compress-wait-thread": true});
        assert_eq!(change(fits).apply(params.clone()), Ok(params.clone()));
        let both = json!({"compress-threads": 2, "multifd-channels": 2});
        assert_eq!(change(both).apply(params.clone()).unwrap().channels(), 2);
        for (name, value, reason) in [
            ("compress-level", json!(10), "expects a value between 0 and 9"),
            ("compress-threads", json!(8), "'multifd-channels' sets it"),
            ("decompress-threads", json!(2), "the number of data channels, 3"),
            ("compress-wait-thread", json!(false), "is always true"),
        ] {
            let refused = change(json!({name: value})).apply(params.clone()).unwrap_err().desc;
            assert!(refused.contains(name) && refused.contains(reason), "{refused}");
        }
    }
}
