//! Events of the control socket: their table, which `query-qmp-schema` shows, and one function for each kind.

use super::arguments::{Kind, Member, needed, optional};
use super::job;
use devices::block::failure::Failure;
use devices::block::job::JobEvent;
use serde_json::{Value, json};
use std::borrow::Cow;
use std::time::{SystemTime, UNIX_EPOCH};

const ENDING: &[Member] = &[needed("guest", Kind::Flag), needed("reason", Kind::Text)];
const PANIC: &[Member] = &[needed("action", Kind::Text)];

/// All events, with the members of their data. Ferry's own begin with `x-`.
pub const EVENTS: &[(&str, &[Member])] = &[
    ("STOP", &[]),
    ("RESUME", &[]),
    ("POWERDOWN", &[]),
    ("SHUTDOWN", ENDING),
    ("RESET", ENDING),
    ("GUEST_PANICKED", PANIC),
    ("GUEST_CRASHLOADED", PANIC),
    (
        "BLOCK_IO_ERROR",
        &[
            needed("device", Kind::Text),
            optional("node-name", Kind::Text),
            needed("operation", Kind::Text),
            needed("action", Kind::Text),
            optional("nospace", Kind::Flag),
            needed("reason", Kind::Text),
        ],
    ),
    ("JOB_STATUS_CHANGE", job::STATUS),
    ("BLOCK_JOB_READY", job::PROGRESS),
    ("BLOCK_JOB_PENDING", job::PENDING),
    ("BLOCK_JOB_COMPLETED", job::COMPLETED),
    ("BLOCK_JOB_CANCELLED", job::PROGRESS),
    ("BLOCK_JOB_ERROR", job::ERROR),
    ("BLOCK_EXPORT_DELETED", &[needed("id", Kind::Text)]),
    ("MIGRATION", &[needed("status", Kind::Text)]),
    ("MIGRATION_PASS", &[needed("pass", Kind::Whole)]),
    (
        NOT_CONVERGING,
        &[
            needed("dirty-bytes-per-second", Kind::Whole),
            needed("bytes-per-second", Kind::Whole),
            needed("expected-downtime", Kind::Whole),
            needed("downtime-limit", Kind::Whole),
            needed("cpu-throttle-percentage", Kind::Whole),
            needed("called-off-switches", Kind::Whole),
            needed("desc", Kind::Text),
            optional(
                "part",
                Kind::Object {
                    name: "x-PartTime",
                    members: &[
                        needed("name", Kind::Text),
                        needed("time-us", Kind::Whole),
                        needed("ended", Kind::Flag),
                    ],
                },
            ),
        ],
    ),
    (INCOMPLETE, &[needed("desc", Kind::Text)]),
    ("x-migration", &[needed("x-id", Kind::Text), needed("ended", Kind::Flag)]),
];

const NOT_CONVERGING: &str = "x-migration-not-converging";
const INCOMPLETE: &str = "x-migration-incomplete";

/// A QMP event.
#[derive(Debug, Clone, PartialEq)]
pub struct Event {
    name: Cow<'static, str>,
    data: Option<Value>,
}

impl Event {
    fn new(name: &'static str, data: Option<Value>) -> Self {
        debug_assert!(EVENTS.iter().any(|(listed, _)| *listed == name), "{name} is not listed");
        Self { name: name.into(), data }
    }

    /// An event without data.
    pub fn plain(name: &'static str) -> Self {
        Self::new(name, None)
    }

    /// `SHUTDOWN` or `RESET`, with its originator and reason.
    pub fn ending(name: &'static str, guest: bool, reason: &str) -> Self {
        Self::new(name, Some(json!({"guest": guest, "reason": reason})))
    }

    /// `GUEST_PANICKED` or `GUEST_CRASHLOADED`, with what is done about it.
    pub fn guest_panic(name: &'static str, action: &str) -> Self {
        Self::new(name, Some(json!({"action": action})))
    }

    /// `BLOCK_IO_ERROR`.
    pub fn block_io_error(failure: &Failure) -> Self {
        let data = json!({
            "device": failure.disk,
            "node-name": failure.disk,
            "operation": if failure.is_read { "read" } else { "write" },
            "action": failure.action.name(),
            "nospace": failure.no_space,
            "reason": failure.reason,
        });
        Self::new("BLOCK_IO_ERROR", Some(data))
    }

    /// What has happened to a block job.
    pub fn job(event: &JobEvent) -> Self {
        let (name, data) = job::event(event);
        Self::new(name, Some(data))
    }

    /// `BLOCK_EXPORT_DELETED`.
    pub fn export_deleted(id: &str) -> Self {
        Self::new("BLOCK_EXPORT_DELETED", Some(json!({"id": id})))
    }

    /// `MIGRATION`.
    pub fn migration(status: &str) -> Self {
        Self::new("MIGRATION", Some(json!({"status": status})))
    }

    /// `MIGRATION_PASS`.
    pub fn pass(number: u64) -> Self {
        Self::new("MIGRATION_PASS", Some(json!({"pass": number})))
    }

    /// The migration does not converge, and why.
    pub fn not_converging(facts: Value) -> Self {
        Self::new(NOT_CONVERGING, Some(facts))
    }

    /// The guest has moved, but not all that could wait has arrived.
    pub fn incomplete(missing: &str) -> Self {
        Self::new(INCOMPLETE, Some(json!({"desc": missing})))
    }

    /// The migration called `id` has made a step, or has ended.
    pub fn migration_step(id: &str, ended: bool) -> Self {
        Self::new("x-migration", Some(json!({"x-id": id, "ended": ended})))
    }

    /// An event forwarded from another process.
    pub fn forwarded(name: &str, data: Option<Value>) -> Self {
        Self { name: name.to_owned().into(), data }
    }

    /// As it is sent.
    pub fn to_json(&self) -> Value {
        // A wall clock before 1970 is shown as 1970.
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let mut event = json!({
            "timestamp": {"seconds": now.as_secs(), "microseconds": now.subsec_micros()},
            "event": self.name,
        });
        if let Some(data) = &self.data {
            event["data"] = data.clone();
        }
        event
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::control::arguments::Arguments;
    use devices::block::copy::Side;
    use devices::block::job::{IoStatus, JobInfo, JobKind, JobStatus};
    use migration::stats::NotConverging;

    #[test]
    fn every_event_has_the_members_that_its_table_lists() {
        let part = migration::guest::PartTime {
            part: "final-send".into(),
            took: Default::default(),
            ended: true,
        };
        let report = NotConverging {
            dirty_bytes_per_sec: 2,
            bytes_per_sec: 1,
            expected_downtime: Default::default(),
            downtime_limit: Default::default(),
            throttle_percent: 0,
            called_off: 3,
            part: Some(part),
        };
        let failure = Failure {
            disk: "root".into(),
            is_read: true,
            action: devices::block::failure::Action::Report,
            no_space: false,
            reason: "it broke".into(),
        };
        let mut events = vec![
            Event::block_io_error(&failure),
            Event::export_deleted("root"),
            Event::migration("active"),
            Event::pass(1),
            Event::not_converging(report.to_json()),
            Event::migration_step("one", false),
            Event::incomplete("bitmap"),
        ];
        let job = JobInfo {
            id: "m".into(),
            kind: JobKind::Mirror,
            status: JobStatus::Ready,
            len_bytes: 2,
            offset_bytes: 1,
            busy: false,
            paused: false,
            ready: true,
            speed: 0,
            io_status: IoStatus::Ok,
            auto_finalize: true,
            auto_dismiss: true,
            error: Some("it broke".into()),
            actively_synced: None,
        };
        let (id, status) = (job.id.clone(), job.status);
        events.extend(
            [
                JobEvent::Status { id: id.clone(), status },
                JobEvent::Ready(job.clone()),
                JobEvent::Pending(job.clone()),
                JobEvent::Completed(job.clone()),
                JobEvent::Cancelled(job),
                JobEvent::Error { id, side: Side::Target, action: "report" },
            ]
            .iter()
            .map(Event::job),
        );
        events.extend(["STOP", "RESUME", "POWERDOWN"].map(Event::plain));
        let panics = [("GUEST_PANICKED", "poweroff"), ("GUEST_CRASHLOADED", "run")];
        events.extend(panics.map(|(name, action)| Event::guest_panic(name, action)));
        events.extend(["SHUTDOWN", "RESET"].map(|name| Event::ending(name, true, "guest-panic")));
        assert_eq!(events.len(), EVENTS.len());
        for (name, members) in EVENTS {
            let event = events.iter().find(|event| event.name == *name).unwrap().to_json();
            let data = event
                .get("data")
                .map_or_else(Default::default, |data| data.as_object().cloned().unwrap());
            let count = data.len();
            assert!(Arguments::new(members, data).is_ok(), "{event}");
            assert_eq!(count, members.len(), "{event}");
        }
    }
}
