//! How a simulated host behaves.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use crate::driver::Capabilities;

use super::Script;

/// Moments in a machine's making and end at which [`SimConfig::on_phase`] is called, in order.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum Phase {
    /// Directory, lock and record are there.
    DirMade,
    /// Disks are there.
    FilesMade,
    /// The record says that a VMM is about to be started.
    Launching,
    /// The stand-in runs; the record does not name it yet.
    Spawned,
    /// The record names the stand-in; the guest boots.
    Running,
    /// A template is being written.
    Saving,
    /// The machine's traces are being removed.
    Destroying,
}

impl Phase {
    /// All of them.
    pub const ALL: [Self; 7] = [
        Self::DirMade,
        Self::FilesMade,
        Self::Launching,
        Self::Spawned,
        Self::Running,
        Self::Saving,
        Self::Destroying,
    ];
}

/// What is called at each [`Phase`].
pub type PhaseHook = Arc<dyn Fn(Phase) + Send + Sync>;

/// How a simulated host behaves. The default is quick, honest and able.
#[derive(Clone)]
pub struct SimConfig {
    /// What machines can do.
    pub capabilities: Capabilities,
    /// From power-on to a guest that answers.
    pub boot_time: Duration,
    /// From the start of a clone to a guest that answers.
    pub clone_time: Duration,
    /// What commands do.
    pub script: Script,
    /// A process is started in place of the VMM, so that there is something to kill.
    pub stand_in: bool,
    /// The stand-in gets a cgroup where the host allows.
    pub cgroup: bool,
    /// Called at each [`Phase`], on the task that makes or ends the machine.
    pub on_phase: Option<PhaseHook>,
}

impl Default for SimConfig {
    fn default() -> Self {
        Self {
            capabilities: Capabilities {
                templates: true,
                hotplug_disk: true,
                vmgenid: true,
                own_user: false,
                cgroup: false,
                adopt: true,
                machines_max: 0,
            },
            boot_time: Duration::from_millis(2),
            clone_time: Duration::from_millis(1),
            script: Script::default(),
            stand_in: false,
            cgroup: false,
            on_phase: None,
        }
    }
}

impl SimConfig {
    pub(super) fn reached(&self, phase: Phase) {
        if let Some(hook) = &self.on_phase {
            hook(phase);
        }
    }
}

impl fmt::Debug for SimConfig {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SimConfig")
            .field("capabilities", &self.capabilities)
            .field("boot_time", &self.boot_time)
            .field("stand_in", &self.stand_in)
            .finish_non_exhaustive()
    }
}
