//! A clone's new identity, and what counts as proof that it has one.
//!
//! The guest reports each step and reads everything back; the host compares. Why each step: `reference` facts on clones, above all that
//! crediting entropy alone changes nothing until the generator is reseeded.

use std::collections::VecDeque;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use kiln_core::MachineName;
use kiln_proto::msg::{Identity, OrderReply, Quiesced, Reidentified};

use crate::driver::PublicIdentity;

/// How far the guest's clock may be from the host's when its answer arrives. A busy host takes that long between two lines of code.
pub const CLOCK_TOLERANCE: Duration = Duration::from_secs(2);
/// Samples of other guests' generators that a new one is compared with.
const SAMPLES_MAX: usize = 1024;
/// Longest host name Linux takes.
const HOSTNAME_MAX: usize = 63;

/// What a guest said that is not so, or did not say.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum FalseAnswer {
    /// Its hello does not offer to take a new identity.
    #[error("it does not offer to take a new identity")]
    NoReidentify,
    /// Another kind of answer than the order has.
    #[error("its answer does not belong to the order")]
    WrongReply,
    /// It did not take the fresh entropy.
    #[error("it did not mix in fresh entropy")]
    Entropy,
    /// It did not reseed its generator.
    #[error("it did not reseed its random generator")]
    Reseed,
    /// Its random sample is malformed, constant, or was seen before.
    #[error("its random sample {0}")]
    Sample(&'static str),
    /// Its clock is off.
    #[error("its clock is {off_ms} ms away from the host's")]
    Clock {
        /// By how much, milliseconds.
        off_ms: u64,
    },
    /// Something read back is not what was set.
    #[error("its {0} is not the one it was given")]
    NotTaken(&'static str),
    /// Something ran although it was frozen.
    #[error("{0} processes of its workload ran before it had a new identity")]
    WorkloadRan(u64),
    /// It is not ready to be made a template.
    #[error("it cannot be made a template: {0}")]
    NotQuiesced(&'static str),
    /// The host has no random bytes to give.
    #[error("the host has no random bytes for a new identity")]
    NoRandom,
}

/// What may be told of an identity.
pub(super) fn public(identity: &Identity) -> PublicIdentity {
    PublicIdentity {
        boot_id: identity.boot_id.clone(),
        machine_id: identity.machine_id.clone(),
        hostname: identity.hostname.clone(),
    }
}

/// A new identity. Its clock is now.
pub(super) fn fresh(name: &MachineName) -> Result<Identity, FalseAnswer> {
    let mut random = [0; 64];
    getrandom::fill(&mut random).map_err(|_| FalseAnswer::NoRandom)?;
    let (seed, ids) = random.split_at(32);
    let mut hostname: String = name.as_str().chars().take(HOSTNAME_MAX).collect();
    while hostname.ends_with('-') {
        hostname.pop();
    }
    Ok(Identity {
        seed: hex::encode(seed),
        boot_id: uuid(&ids[..16]),
        machine_id: hex::encode(&ids[16..32]),
        hostname,
        wall_unix_ns: unix_ns(),
    })
}

/// A random UUID (RFC 9562, version 4).
fn uuid(random: &[u8]) -> String {
    let mut bytes = random.to_vec();
    bytes[6] = bytes[6] & 0x0f | 0x40;
    bytes[8] = bytes[8] & 0x3f | 0x80;
    let text = hex::encode(bytes);
    [
        &text[..8],
        &text[8..12],
        &text[12..16],
        &text[16..20],
        &text[20..],
    ]
    .join("-")
}

fn unix_ns() -> u64 {
    let since = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap_or_default();
    u64::try_from(since.as_nanos()).unwrap_or(u64::MAX)
}

/// Compares everything the guest read back. It was asked `asked` ago, by a clock that does not jump.
pub(super) fn check(
    given: &Identity,
    reply: &OrderReply,
    asked: Duration,
) -> Result<(), FalseAnswer> {
    let OrderReply::Reidentified(said) = reply else {
        return Err(FalseAnswer::WrongReply);
    };
    let passed = u64::try_from(asked.as_nanos()).unwrap_or(u64::MAX);
    compare(given, said, given.wall_unix_ns.saturating_add(passed))?;
    remember_sample(&said.sample)
}

fn compare(given: &Identity, said: &Reidentified, now_ns: u64) -> Result<(), FalseAnswer> {
    if !said.entropy_added {
        return Err(FalseAnswer::Entropy);
    }
    if !said.reseeded {
        return Err(FalseAnswer::Reseed);
    }
    if said.workload_ran != 0 {
        return Err(FalseAnswer::WorkloadRan(said.workload_ran));
    }
    let pairs = [
        ("boot id", &given.boot_id, &said.boot_id),
        ("machine id", &given.machine_id, &said.machine_id),
        ("host name", &given.hostname, &said.hostname),
    ];
    if let Some((name, _, _)) = pairs.iter().find(|(_, given, said)| given != said) {
        return Err(FalseAnswer::NotTaken(name));
    }
    let tolerance = u64::try_from(CLOCK_TOLERANCE.as_nanos()).unwrap_or(u64::MAX);
    let early = given.wall_unix_ns.saturating_sub(said.wall_unix_ns);
    let late = said.wall_unix_ns.saturating_sub(now_ns);
    let off = early.max(late);
    if off > tolerance {
        return Err(FalseAnswer::Clock {
            off_ms: off / 1_000_000,
        });
    }
    check_sample(&said.sample)
}

fn check_sample(sample: &str) -> Result<(), FalseAnswer> {
    let bytes = hex::decode(sample).map_err(|_| FalseAnswer::Sample("is not hexadecimal"))?;
    if bytes.len() != 16 {
        return Err(FalseAnswer::Sample("has another length than 16 bytes"));
    }
    if bytes.iter().all(|byte| *byte == bytes[0]) {
        return Err(FalseAnswer::Sample("is constant"));
    }
    Ok(())
}

/// Samples are compared within this process: two of its guests that give the same one share a generator.
fn remember_sample(sample: &str) -> Result<(), FalseAnswer> {
    static SEEN: Mutex<VecDeque<String>> = Mutex::new(VecDeque::new());
    let mut seen = SEEN.lock().unwrap_or_else(PoisonError::into_inner);
    if seen.iter().any(|old| old == sample) {
        return Err(FalseAnswer::Sample("was given by another guest before"));
    }
    if seen.len() == SAMPLES_MAX {
        seen.pop_front();
    }
    seen.push_back(sample.to_owned());
    Ok(())
}

/// Whether a guest may be made a template.
pub(super) fn check_quiesced(reply: &OrderReply) -> Result<(), FalseAnswer> {
    let OrderReply::Quiesced(Quiesced {
        frozen,
        open_streams,
        secret_issued,
        job_ran,
    }) = reply
    else {
        return Err(FalseAnswer::WrongReply);
    };
    let why = match (frozen, open_streams, secret_issued, job_ran) {
        (false, ..) => "its workload is not frozen",
        (_, 1.., ..) => "streams are open",
        (_, _, true, _) => "it was given a secret",
        (.., true) => "a job ran in it",
        _ => return Ok(()),
    };
    Err(FalseAnswer::NotQuiesced(why))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn honest(given: &Identity) -> Reidentified {
        Reidentified {
            entropy_added: true,
            reseeded: true,
            sample: given.seed[..32].to_owned(),
            wall_unix_ns: given.wall_unix_ns + 1_000_000,
            boot_id: given.boot_id.clone(),
            machine_id: given.machine_id.clone(),
            hostname: given.hostname.clone(),
            workload_ran: 0,
        }
    }

    #[test]
    fn every_false_answer_is_caught() {
        let name = "b01-1-build".parse().unwrap();
        let given = fresh(&name).unwrap();
        assert_eq!(given.boot_id.len(), 36);
        assert_ne!(given.seed, fresh(&name).unwrap().seed);
        let now = given.wall_unix_ns + 5_000_000;
        assert_eq!(compare(&given, &honest(&given), now), Ok(()));
        type Lie = fn(&mut Reidentified);
        let lies: [(&str, Lie); 12] = [
            ("entropy", |r| r.entropy_added = false),
            ("reseed", |r| r.reseeded = false),
            ("ran", |r| r.workload_ran = 1),
            ("boot id", |r| r.boot_id.clear()),
            ("machine id", |r| r.machine_id = "0".repeat(32)),
            ("host name", |r| r.hostname.push('x')),
            ("early", |r| r.wall_unix_ns -= 3_000_000_000),
            ("late", |r| r.wall_unix_ns += 3_000_000_000),
            ("zero", |r| r.sample = "00".repeat(16)),
            ("short", |r| r.sample = "0123".into()),
            ("long", |r| r.sample = "01".repeat(17)),
            ("no hex", |r| r.sample = "x".repeat(32)),
        ];
        for (what, lie) in lies {
            let mut said = honest(&given);
            lie(&mut said);
            assert!(compare(&given, &said, now).is_err(), "{what}");
        }
        let reply = OrderReply::Reidentified(honest(&given));
        assert_eq!(check(&given, &reply, Duration::ZERO), Ok(()));
        assert!(
            matches!(
                check(&given, &reply, Duration::ZERO),
                Err(FalseAnswer::Sample(_))
            ),
            "twice the same"
        );
        assert_eq!(
            check(&given, &OrderReply::Done, Duration::ZERO),
            Err(FalseAnswer::WrongReply)
        );
    }

    #[test]
    fn the_hosts_wall_clock_may_jump_while_the_guest_answers() {
        let name = "b01-1-build".parse().unwrap();
        for jump_s in [-3600, 3600] {
            // What was given came from a clock that has been set since.
            let mut given = fresh(&name).unwrap();
            given.wall_unix_ns = given
                .wall_unix_ns
                .saturating_add_signed(jump_s * 1_000_000_000);
            let reply = OrderReply::Reidentified(honest(&given));
            assert_eq!(check(&given, &reply, Duration::from_millis(5)), Ok(()));
        }
    }

    #[test]
    fn a_template_needs_a_frozen_guest_that_did_nothing() {
        let good = Quiesced {
            frozen: true,
            open_streams: 0,
            secret_issued: false,
            job_ran: false,
        };
        let check = |edit: fn(&mut Quiesced)| {
            let mut said = good.clone();
            edit(&mut said);
            check_quiesced(&OrderReply::Quiesced(said)).is_ok()
        };
        assert!(check(|_| {}));
        assert!(!check(|q| q.frozen = false));
        assert!(!check(|q| q.open_streams = 1));
        assert!(!check(|q| q.secret_issued = true));
        assert!(!check(|q| q.job_ran = true));
    }

    #[test]
    fn host_names_fit_the_kernel() {
        let name = format!("{}-{}", "a".repeat(62), "b".repeat(10))
            .parse()
            .unwrap();
        assert_eq!(fresh(&name).unwrap().hostname, "a".repeat(62));
    }
}
