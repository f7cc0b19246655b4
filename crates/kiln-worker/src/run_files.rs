//! The files that a command works on: packed as the sources of builds are, sent into its machine, found there as its working directory.

use std::sync::Arc;

use kiln_core::{Digest, FailureClass, Overrun};
use kiln_image::context::{self, Tree};
use kiln_proto::Session;
use kiln_proto::msg::{Place, PutTree};

use crate::build::{CONTEXT_BYTES_MAX, CONTEXT_ENTRIES_MAX, SOURCE_TIMEOUT};
use crate::failure::Failure;
use crate::orders::{self, CallError, chain};
use crate::prepare::folder_failure;

/// Where they lie in the machine, and in a container (`WORK` of the guest's `container`).
pub const WORK: &str = "/work";

/// Files of one command.
#[derive(Clone, Debug)]
pub struct RunFiles {
    tree: Arc<Tree>,
    folder: String,
}

impl RunFiles {
    /// A tree, and the folder in it in which the command begins; empty for the topmost.
    ///
    /// # Errors
    /// Usage, for a folder that leads out of the tree.
    pub fn new(tree: Tree, folder: &str) -> Result<Self, Failure> {
        let inner = |part: &str| !matches!(part, "" | "." | "..") && !part.contains('\0');
        if !folder.is_empty() && !folder.split('/').all(inner) {
            let message = format!("{folder:?} is no folder of the source");
            return Err(Failure::new(FailureClass::Usage, message));
        }
        Ok(Self {
            tree: Arc::new(tree),
            folder: folder.to_owned(),
        })
    }

    /// The command's working directory.
    #[must_use]
    pub fn cwd(&self) -> String {
        match self.folder.is_empty() {
            true => WORK.to_owned(),
            false => format!("{WORK}/{}", self.folder),
        }
    }

    /// Sends them; gives the digest of what was sent.
    ///
    /// # Errors
    /// What is wrong with the folder, as a build tells it; a disk that is too small; whatever ends the machine.
    pub(crate) async fn send(&self, session: &Session) -> Result<Digest, Failure> {
        let order = PutTree {
            place: Place::Work,
            bytes_max: CONTEXT_BYTES_MAX,
            entries_max: CONTEXT_ENTRIES_MAX,
        };
        let tree = Arc::clone(&self.tree);
        let (sender, packed) = tokio::sync::oneshot::channel();
        let what = "take the source";
        let sent = orders::put_tree(session, what, &order, SOURCE_TIMEOUT, move |out| {
            let done = context::pack(&tree, out);
            let failed = done
                .as_ref()
                .err()
                .map(|error| std::io::Error::other(chain(error)));
            let _receiver_gone = sender.send(done);
            failed.map_or(Ok(()), Err)
        });
        match (sent.await, packed.await) {
            (Ok(_), Ok(Ok(packed))) => Ok(packed.digest),
            // The folder's own trouble, in its own words.
            (Err(CallError::Source(_)), Ok(Err(error))) => Err(folder_failure(&error)),
            (Err(error), _) => Err(disk_full(error)),
            (Ok(_), _) => {
                let message = "the source was not read to its end";
                Err(Failure::new(FailureClass::Infrastructure, message))
            }
        }
    }
}

fn disk_full(error: CallError) -> Failure {
    match &error {
        CallError::Refused { error: said, .. }
            if said.code == kiln_proto::msg::GuestErrorCode::DiskFull =>
        {
            Failure::new(
                FailureClass::User,
                "disk_full: the source does not fit on the machine's disk",
            )
            .because(Overrun::DiskFull)
            .hint("give it more with --disk, or leave files out with .kilnignore")
        }
        _ => Failure::from(error),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use kiln_image::context::Limits;

    #[test]
    fn a_working_directory_stays_inside() {
        let dir = tempfile::tempdir().expect("temp dir");
        let files = |folder: &str| {
            let tree = Tree::open_for_run(dir.path(), Limits::default()).expect("tree");
            RunFiles::new(tree, folder).map(|files| files.cwd())
        };
        assert_eq!(files("").expect("the top"), "/work");
        assert_eq!(files("a/b").expect("below"), "/work/a/b");
        for bad in ["..", "a/../..", "/etc", "a//b", "./a"] {
            assert_eq!(files(bad).expect_err(bad).class, FailureClass::Usage);
        }
    }
}
