//! What can go wrong in a simulated machine, and where.

use std::time::Duration;

use kiln_proto::frame::{FRAME_LEN_MAX, Frame};
use kiln_proto::msg::{GuestErrorCode, Order};

use crate::driver::StopReason;

/// A place in a guest's life at which a [`Trouble`] can strike: just before the guest would answer.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
pub enum Step {
    /// Before the guest is there.
    Boot,
    /// A host knocks.
    Hello,
    /// [`Order::Quiesce`].
    Quiesce,
    /// [`Order::Reidentify`].
    Reidentify,
    /// [`Order::Thaw`].
    Thaw,
    /// [`Order::Mount`].
    Mount,
    /// [`Order::Unmount`].
    Unmount,
    /// [`Order::SetLimits`].
    SetLimits,
    /// [`Order::SetConnections`].
    SetConnections,
    /// [`Order::SetStepEnv`].
    SetStepEnv,
    /// [`Order::StartBuildkit`].
    StartBuildkit,
    /// [`Order::StopBuildkit`].
    StopBuildkit,
    /// [`Order::PrepareContainer`].
    PrepareContainer,
    /// [`Order::NameServices`].
    NameServices,
    /// [`Order::RemoveTree`].
    RemoveTree,
    /// [`Order::Stats`].
    Stats,
    /// [`Order::Shutdown`].
    Shutdown,
    /// A command.
    Exec,
    /// A tree from the host.
    PutTree,
    /// A tree to the host.
    GetTree,
    /// A file from the host.
    PutFile,
    /// A connection from the host.
    Forward,
}

impl Step {
    /// All of them, in order of a machine's life.
    pub const ALL: [Self; 22] = [
        Self::Boot,
        Self::Hello,
        Self::Quiesce,
        Self::Reidentify,
        Self::Thaw,
        Self::Mount,
        Self::Unmount,
        Self::SetLimits,
        Self::SetConnections,
        Self::SetStepEnv,
        Self::StartBuildkit,
        Self::StopBuildkit,
        Self::PrepareContainer,
        Self::NameServices,
        Self::RemoveTree,
        Self::Stats,
        Self::Shutdown,
        Self::Exec,
        Self::PutTree,
        Self::GetTree,
        Self::PutFile,
        Self::Forward,
    ];

    pub(super) fn of(order: &Order) -> Self {
        match order {
            Order::Quiesce => Self::Quiesce,
            Order::Reidentify(_) => Self::Reidentify,
            Order::Thaw => Self::Thaw,
            Order::Mount(_) => Self::Mount,
            Order::Unmount { .. } => Self::Unmount,
            Order::SetLimits { .. } => Self::SetLimits,
            Order::SetConnections { .. } => Self::SetConnections,
            Order::SetStepEnv { .. } => Self::SetStepEnv,
            Order::StartBuildkit(_) => Self::StartBuildkit,
            Order::StopBuildkit => Self::StopBuildkit,
            Order::PrepareContainer(_) => Self::PrepareContainer,
            Order::NameServices { .. } => Self::NameServices,
            Order::RemoveTree { .. } => Self::RemoveTree,
            Order::Stats => Self::Stats,
            Order::Shutdown => Self::Shutdown,
        }
    }
}

/// Something that is wrong with one machine.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Fault {
    /// The host's disk is full while the machine's files are made.
    HostDiskFull,
    /// The guest meets trouble.
    At(Step, Trouble),
    /// The guest says what is not so.
    Lies(Lie),
    /// The channel ends after this many bytes from the guest, wherever in a frame that is. The guest lives on.
    ChannelDiesAfter {
        /// Bytes.
        bytes: u64,
    },
    /// The guest takes this long before each answer and each piece of output.
    Slow {
        /// How long.
        per_step: Duration,
    },
}

/// What strikes at a [`Step`].
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Trouble {
    /// The machine stops: a panic, a power-off, a killed VMM.
    Stops(StopReason),
    /// The guest never says or reads anything again. At [`Step::Boot`]: the boot never ends.
    Silent,
    /// The guest breaks the protocol.
    Violates(Violation),
    /// The guest answers with an error.
    Refuses(GuestErrorCode),
}

/// How a guest breaks the protocol.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Violation {
    /// A frame longer than any may be.
    OversizedFrame,
    /// Bytes that are no frame.
    Garbage,
    /// More data on a stream than it has credit for.
    CreditOverrun,
    /// Data on a stream that nobody opened.
    UnknownStream,
    /// Streams opened without end, and no answer read.
    OpenFlood,
    /// A message of the right length that is not the JSON expected.
    NotJson,
}

impl Violation {
    /// All of them.
    pub const ALL: [Self; 6] = [
        Self::OversizedFrame,
        Self::Garbage,
        Self::CreditOverrun,
        Self::UnknownStream,
        Self::OpenFlood,
        Self::NotJson,
    ];

    /// What goes onto the wire; `stream` is the stream that the host waits on.
    pub(super) fn bytes(self, stream: u32) -> Vec<u8> {
        let mut out = Vec::new();
        match self {
            Self::OversizedFrame => {
                let len = u32::try_from(FRAME_LEN_MAX).unwrap_or(u32::MAX) + 1;
                out.extend_from_slice(&len.to_le_bytes());
                out.resize(64, 1);
            }
            Self::Garbage => out.resize(256, 0xa5),
            Self::CreditOverrun => {
                let bytes = vec![0; 32 * 1024];
                for _ in 0..=kiln_proto::mux::WINDOW as usize / bytes.len() {
                    let data = Frame::Data {
                        stream,
                        bytes: &bytes,
                    };
                    data.encode_into(&mut out);
                }
            }
            Self::UnknownStream => Frame::Data {
                stream: 0x7fff_fffe,
                bytes: b"x",
            }
            .encode_into(&mut out),
            Self::OpenFlood => {
                for number in 0..20_000 {
                    let open = Frame::Open {
                        stream: 1000 + number * 2,
                        kind: 255,
                        payload: b"",
                    };
                    open.encode_into(&mut out);
                }
            }
            Self::NotJson => Frame::Data {
                stream,
                bytes: b"\x05\0\0\0hello",
            }
            .encode_into(&mut out),
        }
        out
    }
}

/// What a guest says that is not so. The host must find out, or not care.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Lie {
    /// Reidentify: another boot id than the one ordered.
    BootId,
    /// Reidentify: the machine-id is the template's.
    MachineId,
    /// Reidentify: the host name is the template's.
    Hostname,
    /// Reidentify: the clock is a day late.
    Clock,
    /// Reidentify: the entropy was not taken, and it says so.
    NoEntropy,
    /// Reidentify: the generator was not reseeded, and it says so.
    NoReseed,
    /// Reidentify: says that entropy was taken, yet all clones draw the same bytes.
    RepeatedRandom,
    /// Reidentify: something ran in the workload before thaw, and it says so.
    WorkloadRan,
    /// Quiesce: says frozen, but commands run all the same.
    FalselyFrozen,
    /// Quiesce: not frozen, and it says so.
    NotFrozen,
    /// Quiesce: a secret was issued to this machine.
    SecretIssued,
    /// Trees: other counts than what arrived.
    TreeReport,
    /// Trees to the host: entries that would leave the target directory.
    HostileTree,
    /// Commands: offsets of output that jump.
    Offsets,
}

impl Lie {
    /// All of them.
    pub const ALL: [Self; 14] = [
        Self::BootId,
        Self::MachineId,
        Self::Hostname,
        Self::Clock,
        Self::NoEntropy,
        Self::NoReseed,
        Self::RepeatedRandom,
        Self::WorkloadRan,
        Self::FalselyFrozen,
        Self::NotFrozen,
        Self::SecretIssued,
        Self::TreeReport,
        Self::HostileTree,
        Self::Offsets,
    ];
}
