//! Loads the kernel modules that lie in the initial RAM disk.

use std::fs::{self, File};
use std::path::Path;

use rustix::io::Errno;
use rustix::system::finit_module;

use crate::log;

/// Where the initial RAM disk has its modules.
pub(crate) const DIR: &str = "/modules";
/// Most modules that are loaded.
const MODULES_MAX: usize = 128;

/// File names in the order in which they must be loaded; anything that is not a plain name is left out.
pub(crate) fn parse_order(text: &str) -> Vec<&str> {
    let plain =
        |name: &&str| !name.is_empty() && !name.starts_with(['#', '.']) && !name.contains('/');
    text.lines()
        .map(str::trim)
        .filter(plain)
        .take(MODULES_MAX)
        .collect()
}

/// Loads every module of `dir/order`. A module that fails is logged, and the next one is tried.
pub(crate) fn load_all(dir: &Path) {
    let Ok(order) = fs::read_to_string(dir.join("order")) else {
        log::warn("the initial RAM disk has no list of modules");
        return;
    };
    for name in parse_order(&order) {
        let loaded = File::open(dir.join(name))
            .and_then(|file| finit_module(&file, c"", 0).map_err(std::io::Error::from));
        match loaded {
            Err(error) if error.raw_os_error() != Some(Errno::EXIST.raw_os_error()) => {
                log::warn(&format!("module {name} was not loaded: {error}"));
            }
            _ => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_order_holds_plain_names_only() {
        let text = "virtio_blk.ko\n\n# comment\n../evil.ko\n  overlay.ko \n.hidden\n";
        assert_eq!(parse_order(text), ["virtio_blk.ko", "overlay.ko"]);
    }
}
