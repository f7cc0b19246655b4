//! No core files: values of secrets and keys pass through this process's memory, and none of it may end on a disk.

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

/// Sets the soft limit on core files to zero, for this process and those it starts. Whoever hunts a crash may raise it again from outside
/// (`prlimit --core`), for the hard limit stays.
pub(crate) fn forgo() {
    let none = Rlimit {
        current: Some(0),
        maximum: getrlimit(Resource::Core).maximum,
    };
    // Lowering a soft limit is never refused.
    let _done = setrlimit(Resource::Core, none);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_core_file_is_written_from_now_on() {
        let before = getrlimit(Resource::Core);
        forgo();
        let after = getrlimit(Resource::Core);
        assert_eq!(after.current, Some(0));
        assert_eq!(after.maximum, before.maximum);
    }
}
