//! A machine made of files that somebody gives: their kernel, their root disk, or both. It is booted, never cloned, and no template is made
//! of it. What does not come up on such files is the files' fault, told with the console's last words.
//!
//! Read next: [`kiln_image::given`] (what is looked at before anything starts).

use std::os::fd::AsRawFd as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use kiln_core::job::{GivenFile, RunCommand};
use kiln_core::machine::{BootSource, DiskAccess, DiskFormat};
use kiln_core::{DiskRole, DiskSlot, FailureClass};
use kiln_image::given::kernel::in_memory;
use kiln_image::given::modules::{Behind, HOST_MODULES, behind};
use kiln_image::given::{self, Kernel, Refused, RootDisk};
use kiln_machine::bring_up::BringUpError;
use kiln_machine::driver::{LaunchError, StopReason};
use kiln_proto::SessionError;

use crate::attempt::root_disk;
use crate::event::Events;
use crate::failure::Failure;
use crate::host::Host;
use crate::image::CurrentImage;
use crate::templates;

/// A given kernel says everything it has to say: it may never come to a guest that could.
const TALKATIVE: [&str; 2] = ["ignore_loglevel", "earlyprintk=serial,ttyS0,115200"];
/// Lines of the console that a failure shows.
const CONSOLE_LINES: usize = 16;
/// Most of each, characters.
const LINE_CHARS_MAX: usize = 200;
/// What QEMU says of a file that another program has open for writing.
const LOCKED: &str = "lock";
/// The guide that says what such files must have.
const GUIDE: &str = "docs/guides/run.md says what it must have";

/// The files, open and looked at.
#[derive(Debug, Default)]
pub struct Given {
    kernel: Option<Kernel>,
    root_disk: Option<RootDisk>,
}

/// What a machine boots of them, open for as long as it is started.
#[derive(Debug)]
pub struct GivenBoot {
    given: Arc<Given>,
    source: BootSource,
    root: DiskSlot,
    /// Kiln's initrd and what a given kernel needs behind it.
    _initrd: Option<std::fs::File>,
}

impl Given {
    /// Opens the files, looks at them and computes their digests. Blocks for as long as reading them takes; `notes` is a folder that remembers
    /// digests of disks.
    ///
    /// # Errors
    /// Usage, for a file that no machine can be made of.
    pub fn open(
        kernel: Option<&Path>,
        root_disk: Option<&Path>,
        notes: &Path,
    ) -> Result<Self, Failure> {
        Ok(Self {
            kernel: kernel.map(Kernel::open).transpose().map_err(refused)?,
            root_disk: root_disk
                .map(|path| RootDisk::open(path, notes))
                .transpose()
                .map_err(refused)?,
        })
    }

    /// Whether there is none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.kernel.is_none() && self.root_disk.is_none()
    }

    /// Whether the machine's root is one of them.
    #[must_use]
    pub fn has_root_disk(&self) -> bool {
        self.root_disk.is_some()
    }

    /// As a request names them: kernel and root disk.
    #[must_use]
    pub fn asked(&self) -> [Option<GivenFile>; 2] {
        given::asked(self.kernel.as_ref(), self.root_disk.as_ref())
    }

    /// Fails unless these are the files that a request names: it is run on no others, and by nobody who does not have them.
    ///
    /// # Errors
    /// Usage.
    pub fn are_of(&self, command: &RunCommand) -> Result<(), Failure> {
        let [kernel, root_disk] = self.asked();
        if kernel == command.kernel && root_disk == command.root_disk {
            return Ok(());
        }
        let (message, hint) = match (&command.kernel, &command.root_disk) {
            (None, None) => (
                "the controller of this home is of a kiln that does not know --kernel and --root-disk",
                "end its process, or wait until it has ended, and type the command again",
            ),
            _ => (
                "the kernel or root disk of this job is a file of the command that asked",
                "type the command again",
            ),
        };
        Err(Failure::new(FailureClass::Usage, message).hint(hint))
    }

    /// Fails when a file is not what it was when it was looked at.
    ///
    /// # Errors
    /// Usage.
    pub fn unchanged(&self) -> Result<(), Failure> {
        match &self.root_disk {
            Some(disk) => disk.unchanged().map_err(refused),
            None => Ok(()),
        }
    }

    /// What a machine boots of them; none when there are none. What there is to tell of it is told.
    ///
    /// # Errors
    /// When a kernel lacks modules, or a file has changed.
    pub(crate) async fn boot(
        self: &Arc<Self>,
        host: &Host,
        events: &Events,
    ) -> Result<Option<GivenBoot>, Failure> {
        if self.is_empty() {
            return Ok(None);
        }
        let (given, image, own_root) = (Arc::clone(self), host.image.clone(), root_disk(host));
        let booting = tokio::task::spawn_blocking(move || given.boot_of(&image, own_root));
        let (boot, note) = booting
            .await
            .map_err(|error| Failure::infrastructure(&error))??;
        if let Some(note) = note {
            events.note(note).await;
        }
        Ok(Some(boot))
    }

    fn boot_of(
        self: Arc<Self>,
        image: &CurrentImage,
        own_root: DiskSlot,
    ) -> Result<(GivenBoot, Option<String>), Failure> {
        self.unchanged()?;
        let mut source = image.boot.clone();
        let mut note = None;
        let mut initrd = None;
        if let Some(kernel) = &self.kernel {
            source.kernel = path_of(&kernel.copy);
            source.args.extend(TALKATIVE.map(str::to_owned));
            if kernel.release != image.kernel_release {
                let behind = behind(&kernel.release, Path::new(HOST_MODULES)).map_err(refused)?;
                note = Some(told(&kernel.release, &behind));
                let own = std::fs::read(&source.initrd)
                    .map_err(|error| Failure::infrastructure(&error))?;
                let both = in_memory(&[&own, &behind.archive])
                    .map_err(|error| Failure::infrastructure(&error))?;
                source.initrd = path_of(&both);
                initrd = Some(both);
            }
        }
        let root = match &self.root_disk {
            None => own_root,
            Some(disk) => DiskSlot {
                role: DiskRole::Root,
                backing: Some(path_of(&disk.file)),
                format: DiskFormat::Raw,
                access: DiskAccess::ReadOnly,
            },
        };
        let boot = GivenBoot {
            given: self,
            source,
            root,
            _initrd: initrd,
        };
        Ok((boot, note))
    }
}

impl GivenBoot {
    pub(crate) fn source(&self) -> &BootSource {
        &self.source
    }

    pub(crate) fn root(&self) -> &DiskSlot {
        &self.root
    }

    /// Whether a boot that hung may be tried again: on kiln's own kernel a busy host is the likeliest reason.
    pub(crate) fn is_tried_again(&self, error: &BringUpError) -> bool {
        self.given.kernel.is_none() && matches!(error, BringUpError::Hello { .. })
    }

    /// The files, in words.
    fn files(&self) -> String {
        let kernel = self.given.kernel.as_ref();
        let kernel =
            kernel.map(|kernel| format!("the kernel {} ({})", kernel.name, kernel.release));
        let disk = self.given.root_disk.as_ref();
        let disk = disk.map(|disk| format!("the root disk {}", disk.name));
        let named: Vec<String> = kernel.into_iter().chain(disk).collect();
        named.join(" and ")
    }

    /// What a start that failed means. The host's own trouble stays the host's.
    pub(crate) fn failure(&self, error: BringUpError, within: Duration) -> Failure {
        let files = self.files();
        match &error {
            BringUpError::Stopped {
                reason: StopReason::PoweredOff | StopReason::GuestPanic | StopReason::Reset,
                console,
            } => {
                let message = format!("no machine comes up on {files}: it ended by itself");
                at_fault(&message, console)
            }
            BringUpError::Hello {
                source: SessionError::Deadline { .. },
                console,
            } if self.given.kernel.is_some() => {
                let message = format!(
                    "no machine comes up on {files}: its guest did not say a word within {within:?}"
                );
                at_fault(&message, console)
            }
            BringUpError::Launch(LaunchError::VmmDied { stderr })
                if self.given.has_root_disk() && stderr.contains(LOCKED) =>
            {
                let disk = self.given.root_disk.as_ref();
                let name = disk.map(|disk| disk.name.as_str()).unwrap_or_default();
                let message = format!(
                    "QEMU could not lock the root disk {name}: another program has it open for writing"
                );
                Failure::new(FailureClass::Usage, message)
                    .hint("end what writes to it, or give a copy")
            }
            BringUpError::Launch(LaunchError::VmmDied { stderr })
                if self.given.kernel.is_some() && stderr.contains("kernel") =>
            {
                let message = format!("QEMU does not boot {files}: {}", line(stderr));
                Failure::new(FailureClass::Usage, message).hint(GUIDE)
            }
            _ => templates::bring_up_failure(error),
        }
    }

    /// The machine came up, but not on its root disk.
    pub(crate) fn no_root(&self, console: &str) -> Failure {
        let files = self.files();
        if self.given.kernel.is_some() {
            let message = format!(
                "a machine on {files} came up without its root disk: the kernel lacks virtio-blk, or the machine image is older than this kiln"
            );
            return at_fault(&message, console);
        }
        let message = format!(
            "{files} did not become the machine's root: the machine image is older than this kiln"
        );
        Failure::new(FailureClass::Usage, message).hint("`kiln setup` makes a new one")
    }
}

/// A refused file as a failure.
fn refused(refused: Refused) -> Failure {
    Failure::new(FailureClass::Usage, refused.message).hint(refused.hint)
}

/// A descriptor as a path: it leads to the very file, whatever its name has become.
fn path_of(file: &std::fs::File) -> PathBuf {
    format!("/proc/self/fd/{}", file.as_raw_fd()).into()
}

/// What is told of a kernel's modules.
fn told(release: &str, behind: &Behind) -> String {
    match &behind.folder {
        None => format!(
            "the kernel {release} has no folder below {HOST_MODULES}: it boots without modules, with what is built in"
        ),
        Some(folder) if behind.modules.is_empty() => format!(
            "the kernel {release} boots without modules: {} says that all are built in",
            folder.display()
        ),
        Some(folder) => format!(
            "the kernel {release} boots with modules of {}: {}",
            folder.display(),
            behind.modules.join(", ")
        ),
    }
}

/// The files' own fault, with what the console said last.
fn at_fault(message: &str, console: &str) -> Failure {
    let lines: Vec<String> = console
        .lines()
        .map(line)
        .filter(|line| !line.trim().is_empty() && !line.contains("its console ends with"))
        .collect();
    let last = &lines[lines.len().saturating_sub(CONSOLE_LINES)..];
    let message = match last {
        [] => format!("{message}; its console is empty"),
        last => format!("{message}; its console ends with:\n{}", last.join("\n")),
    };
    Failure::new(FailureClass::Usage, message).hint(GUIDE)
}

/// A line that a machine wrote, as text that drives no terminal.
fn line(text: &str) -> String {
    let plain = |c: char| match c {
        c if c.is_control() => '\u{fffd}',
        c => c,
    };
    let text = text.trim_end_matches(['\r', '\n']);
    text.chars().take(LINE_CHARS_MAX).map(plain).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_consoles_last_words_drive_no_terminal() {
        let many: String = (0..40)
            .map(|n| format!("line {n}\x1b[2J\r\n\r\n"))
            .collect();
        let console = format!("; its console ends with:\n{many}{}\n", "x".repeat(500));
        let failure = at_fault("it ended", &console);
        assert_eq!(failure.class, FailureClass::Usage);
        assert!(!failure.message.contains(['\x1b', '\r']), "{failure:?}");
        let lines: Vec<&str> = failure.message.lines().collect();
        assert_eq!(lines.len(), CONSOLE_LINES + 1);
        assert_eq!(lines[1], "line 25\u{fffd}[2J");
        assert_eq!(lines[CONSOLE_LINES].chars().count(), LINE_CHARS_MAX);
        assert!(at_fault("it ended", "").message.ends_with("is empty"));
    }

    #[test]
    fn only_the_files_of_the_request_are_run_on() {
        let none = Given::default();
        none.are_of(&RunCommand::default()).expect("none asked");
        let asks = RunCommand {
            root_disk: Some(GivenFile {
                name: "disk.img".to_owned(),
                digest: kiln_core::Digest::of(b"x"),
            }),
            ..RunCommand::default()
        };
        let refused = none.are_of(&asks).expect_err("not here");
        assert_eq!(refused.class, FailureClass::Usage);
    }

    #[test]
    fn what_is_told_of_modules_names_them() {
        let behind = |modules: &[&str], folder: Option<&str>| Behind {
            archive: Vec::new(),
            modules: modules.iter().map(|&name| name.to_owned()).collect(),
            folder: folder.map(PathBuf::from),
        };
        assert!(told("6.1", &behind(&[], None)).contains("without modules"));
        assert!(told("6.1", &behind(&[], Some("/m/6.1"))).contains("built in"));
        let with = told("6.1", &behind(&["overlay"], Some("/m/6.1")));
        assert!(with.ends_with("/m/6.1: overlay"), "{with}");
    }
}
