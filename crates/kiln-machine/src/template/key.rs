//! What a template depends on. A change in any part is another template.

use kiln_core::machine::DiskAccess;
use kiln_core::{ByteSize, Digest, DiskRole, MachineSpec};
use serde::{Deserialize, Serialize};

/// Version of everything this crate puts into a template. Raise it when a clone of an older one would not work.
pub const TEMPLATE_FORMAT: u32 = 2;

/// What a template's guest was prepared for.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Purpose {
    /// Guest ready, nothing else.
    Run,
    /// State disk mounted and BuildKit running on it.
    Build,
}

/// Everything a template depends on.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct TemplateKey {
    /// [`TEMPLATE_FORMAT`].
    pub format: u32,
    /// What the guest was prepared for.
    pub purpose: Purpose,
    /// What the preparation depends on beyond the rest: versions of programs and their settings.
    pub preparation: String,
    /// Kernel, initial RAM disk with the guest, and root disk.
    pub machine_image: Digest,
    /// Kernel arguments.
    pub boot_args: Vec<String>,
    /// The driver's words about VMM, accelerator and CPU: see [`crate::Driver::template_facts`].
    pub host: Vec<(String, String)>,
    /// Virtual CPUs.
    pub cpus: u32,
    /// Guest memory.
    pub memory: ByteSize,
    /// Disks by role and access, in order.
    pub disks: Vec<(DiskRole, DiskAccess)>,
    /// Digest or id of what each disk stands on, where it has a backing file.
    pub heads: Vec<(DiskRole, String)>,
}

impl TemplateKey {
    /// The key of a template of this machine. `host` are the driver's facts; `heads` name the content of the disks' backing files.
    #[must_use]
    pub fn of(
        purpose: Purpose,
        preparation: &str,
        spec: &MachineSpec,
        host: Vec<(String, String)>,
        heads: Vec<(DiskRole, String)>,
    ) -> Self {
        Self {
            format: TEMPLATE_FORMAT,
            purpose,
            preparation: preparation.to_owned(),
            machine_image: spec.boot.image,
            boot_args: spec.boot.args.clone(),
            host,
            cpus: spec.cpus,
            memory: spec.memory,
            disks: spec
                .disks
                .iter()
                .map(|disk| (disk.role, disk.access.clone()))
                .collect(),
            heads,
        }
    }

    /// 32 hex digits that name the template.
    #[must_use]
    pub fn id(&self) -> String {
        // Fields in the order of the type, numbers and texts only: one text for one key.
        let text = serde_json::to_vec(self).unwrap_or_default();
        Digest::of(&text).short(32)
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use kiln_core::DiskSlot;
    use kiln_core::machine::{BootSource, DiskFormat};

    pub(crate) fn spec() -> MachineSpec {
        MachineSpec {
            name: "m".parse().unwrap(),
            cpus: 1,
            memory: ByteSize::mib(512),
            boot: BootSource {
                kernel: "/k".into(),
                initrd: "/i".into(),
                args: vec![],
                image: Digest::of(b"image"),
            },
            disks: vec![DiskSlot {
                role: DiskRole::Root,
                backing: Some("/r".into()),
                format: DiskFormat::Raw,
                access: DiskAccess::ReadOnly,
            }],
            boot_timeout_ms: 1000,
            keepable: false,
            host_cpus: Vec::new(),
            disk_bytes_per_second: None,
        }
    }

    pub(crate) fn key(preparation: &str) -> TemplateKey {
        let host = vec![("vmm".to_owned(), "1".to_owned())];
        TemplateKey::of(Purpose::Run, preparation, &spec(), host, vec![])
    }

    #[test]
    fn every_part_changes_the_id() {
        let base = key("");
        let mut ids = vec![base.id()];
        let mut change = |edit: &dyn Fn(&mut TemplateKey)| {
            let mut other = base.clone();
            edit(&mut other);
            ids.push(other.id());
        };
        change(&|k| k.format += 1);
        change(&|k| k.purpose = Purpose::Build);
        change(&|k| k.preparation = "x".into());
        change(&|k| k.machine_image = Digest::of(b"other"));
        change(&|k| k.boot_args = vec!["a".into()]);
        change(&|k| k.host[0].1 = "2".into());
        change(&|k| k.cpus = 2);
        change(&|k| k.memory = ByteSize::mib(513));
        change(&|k| k.disks[0].1 = DiskAccess::Fork);
        change(&|k| k.heads = vec![(DiskRole::State, "h".into())]);
        let count = ids.len();
        ids.sort();
        ids.dedup();
        assert_eq!(ids.len(), count);
        assert!(ids.iter().all(|id| id.len() == 32));
    }
}
