//! Arithmetic on [`Room`] that cannot overflow, and how much of a whole it is.

use kiln_core::ByteSize;
use kiln_core::dispatch::Room;

pub(crate) fn plus(a: &Room, b: &Room) -> Room {
    Room {
        cpus: a.cpus.saturating_add(b.cpus),
        memory: ByteSize(a.memory.0.saturating_add(b.memory.0)),
        disk: ByteSize(a.disk.0.saturating_add(b.disk.0)),
        machines: a.machines.saturating_add(b.machines),
    }
}

pub(crate) fn minus(a: &Room, b: &Room) -> Room {
    Room {
        cpus: a.cpus.saturating_sub(b.cpus),
        memory: ByteSize(a.memory.0.saturating_sub(b.memory.0)),
        disk: ByteSize(a.disk.0.saturating_sub(b.disk.0)),
        machines: a.machines.saturating_sub(b.machines),
    }
}

/// The smaller of each part.
pub(crate) fn least(a: &Room, b: &Room) -> Room {
    Room {
        cpus: a.cpus.min(b.cpus),
        memory: a.memory.min(b.memory),
        disk: a.disk.min(b.disk),
        machines: a.machines.min(b.machines),
    }
}

/// The larger of each part.
pub(crate) fn most(a: &Room, b: &Room) -> Room {
    Room {
        cpus: a.cpus.max(b.cpus),
        memory: a.memory.max(b.memory),
        disk: a.disk.max(b.disk),
        machines: a.machines.max(b.machines),
    }
}

/// The part of `need` that is scarcest in `whole`, in `scale`-ths. What the whole has nothing of counts only if it is needed.
pub(crate) fn dominant(need: &Room, whole: &Room, scale: u64) -> u64 {
    let part = |need: u64, whole: u64| match (need, whole) {
        (0, _) => 0,
        (_, 0) => u64::MAX,
        (need, whole) => {
            let share = u128::from(need) * u128::from(scale) / u128::from(whole);
            u64::try_from(share).unwrap_or(u64::MAX)
        }
    };
    part(need.cpus.into(), whole.cpus.into())
        .max(part(need.memory.0, whole.memory.0))
        .max(part(need.disk.0, whole.disk.0))
        .max(part(need.machines.into(), whole.machines.into()))
}

/// How well `room` holds `need`: the part that is scarcest, in thousandths of the need; 1000 and more means that it fits.
pub(crate) fn fit(room: &Room, need: &Room) -> u64 {
    let part = |room: u64, need: u64| {
        if need == 0 {
            u64::MAX
        } else {
            u64::try_from(u128::from(room) * 1000 / u128::from(need)).unwrap_or(u64::MAX)
        }
    };
    part(room.cpus.into(), need.cpus.into())
        .min(part(room.memory.0, need.memory.0))
        .min(part(room.disk.0, need.disk.0))
        .min(part(room.machines.into(), need.machines.into()))
}
