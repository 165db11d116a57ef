//! `--cpu MODEL[,+FEATURE|,-FEATURE|,FEATURE=on|off]…`: what of the host's CPU a guest gets. Part of the
//! machine description, so that a guest that is reset after a move keeps its CPU.

use super::names::Feature;
use serde::{Deserialize, Deserializer, Serialize, Serializer, de::Error};
use std::fmt;
use std::str::FromStr;

/// What a guest's features start from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Default)]
pub enum CpuModel {
    /// A baseline of every x86-64 CPU: the psABI's first level.
    V1,
    /// The psABI's level x86-64-v2: SSE 4.2.
    V2,
    /// The psABI's level x86-64-v3: AVX2.
    V3,
    /// The psABI's level x86-64-v4: AVX-512.
    V4,
    /// Everything that KVM offers on this host, except nested virtualization.
    #[default]
    Host,
}

impl CpuModel {
    /// All models, the smallest first.
    pub const ALL: [Self; 5] = [Self::V1, Self::V2, Self::V3, Self::V4, Self::Host];

    /// Its name in `--cpu`.
    pub fn name(self) -> &'static str {
        match self {
            Self::V1 => "x86-64-v1",
            Self::V2 => "x86-64-v2",
            Self::V3 => "x86-64-v3",
            Self::V4 => "x86-64-v4",
            Self::Host => "host",
        }
    }

    /// Finds a model by its name. QEMU's `max` is what `host` is with KVM, and `qemu64` and `kvm64` are its
    /// models for any host.
    pub fn find(name: &str) -> Option<Self> {
        match name {
            "max" => Some(Self::Host),
            "qemu64" | "kvm64" => Some(Self::V1),
            _ => Self::ALL.into_iter().find(|model| model.name() == name),
        }
    }
}

/// A model and the features that differ from it.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct CpuConfig {
    /// The model.
    pub model: CpuModel,
    /// Features to switch on or off; each once.
    pub switches: Vec<(Feature, bool)>,
}

/// Longest text of one: enough to switch every feature.
const MAX_BYTES: usize = 8 << 10;

impl CpuConfig {
    /// Whether a feature is switched on or off; `None` if that is left to the model.
    pub fn switched(&self, feature: Feature) -> Option<bool> {
        self.switches.iter().find(|(other, _)| *other == feature).map(|(_, on)| *on)
    }

    /// The features of nested virtualization, which no model has, that are switched on.
    pub fn nested_features(&self) -> impl Iterator<Item = Feature> {
        let on = self.switches.iter().filter(|(_, on)| *on).map(|(feature, _)| *feature);
        on.filter(|feature| matches!(feature.name(), "vmx" | "svm"))
    }

    /// Whether the guest is offered nested virtualization.
    pub fn nested(&self) -> bool {
        self.nested_features().next().is_some()
    }

    /// Whether it is what a guest gets without `--cpu`.
    pub fn is_default(&self) -> bool {
        *self == Self::default()
    }

    /// Switches a feature on or off.
    pub fn switch(&mut self, feature: Feature, on: bool) {
        // The last word counts, as in QEMU.
        self.switches.retain(|(other, _)| *other != feature);
        self.switches.push((feature, on));
    }
}

impl FromStr for CpuConfig {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if text.len() > MAX_BYTES {
            return Err(format!("{} bytes, at most {MAX_BYTES} are possible", text.len()));
        }
        let mut words = text.split(',');
        let name = words.next().unwrap_or_default();
        let model = CpuModel::find(name).ok_or_else(|| {
            let names = CpuModel::ALL.map(CpuModel::name).join(", ");
            format!("{name:?} is not a CPU model: there are {names}")
        })?;
        let mut config = Self { model, switches: Vec::new() };
        for word in words {
            let (name, on) = match (word.strip_prefix('+'), word.strip_prefix('-')) {
                (Some(name), _) => (name, true),
                (_, Some(name)) => (name, false),
                _ => match word.split_once('=') {
                    // QEMU reads a name alone as `name=on`.
                    None | Some((_, "on" | "true" | "yes")) => {
                        (word.split_once('=').map_or(word, |(name, _)| name), true)
                    }
                    Some((name, "off" | "false" | "no")) => (name, false),
                    Some((name, value)) => {
                        return Err(format!("{name}={value}: expected {name}=on or {name}=off"));
                    }
                },
            };
            let feature = Feature::find(name).ok_or_else(|| unknown(name))?;
            config.switch(feature, on);
        }
        Ok(config)
    }
}

/// What is said about a feature that nobody knows.
fn unknown(name: &str) -> String {
    let similar = Feature::similar(name).join(", ");
    let hint = if similar.is_empty() { String::new() } else { format!("; similar: {similar}") };
    format!("{name:?} is not a CPU feature known here{hint}")
}

impl fmt::Display for CpuConfig {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(self.model.name())?;
        self.switches.iter().try_for_each(|(feature, on)| {
            write!(formatter, ",{}{}", if *on { '+' } else { '-' }, feature.name())
        })
    }
}

impl Serialize for CpuConfig {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for CpuConfig {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(D::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_model_is_followed_by_switches_and_the_last_word_counts() {
        let config: CpuConfig =
            "x86-64-v3,+erms,-avx2,la57=off,rdrand=on,-erms,aes".parse().unwrap();
        assert_eq!(config.model, CpuModel::V3);
        assert_eq!(config.to_string(), "x86-64-v3,-avx2,-la57,+rdrand,-erms,+aes");
        let find = |name| Feature::find(name).unwrap();
        assert_eq!(config.switched(find("erms")), Some(false));
        assert_eq!(config.switched(find("sse3")), None);
        assert_eq!("max".parse(), Ok(CpuConfig::default()));
        assert!(!"host,-vmx".parse::<CpuConfig>().unwrap().nested());
        assert!("host,+svm".parse::<CpuConfig>().unwrap().nested());
    }

    #[test]
    fn what_is_not_known_is_named() {
        for (text, expected) in [
            ("", "\"\" is not a CPU model"),
            ("pentium", "x86-64-v3"),
            ("host,+avx1024", "\"avx1024\" is not a CPU feature"),
            ("host,+avx3", "known here; similar: avx, avx2"),
            ("host,-sse4", "similar: sse, sse2, sse4.1, sse4.2"),
            ("host,", "\"\" is not"),
            ("host,avx=maybe", "avx=on or avx=off"),
        ] {
            let error = text.parse::<CpuConfig>().unwrap_err();
            assert!(error.contains(expected), "{error:?} lacks {expected:?}");
        }
        assert!("host".repeat(4096).parse::<CpuConfig>().is_err());
    }

    proptest! {
        #[test]
        fn arbitrary_text_never_panics_and_what_is_read_is_written_alike(text in "[a-z0-9,+=-]{0,40}") {
            let text = format!("host,{text}");
            if let Ok(config) = text.parse::<CpuConfig>() {
                prop_assert_eq!(config.to_string().parse::<CpuConfig>(), Ok(config));
            }
        }
    }
}
