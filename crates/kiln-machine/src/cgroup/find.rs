//! Where groups can be made: this process's own group and those above it, in either version. Reads; makes nothing.

use std::fs::{self, OpenOptions};
use std::io::{self, Write as _};
use std::path::{Path, PathBuf};

use super::{Controller, LEAF};

/// The directory of this process's own group in the unified hierarchy or one of its parents, in which groups with controllers can be made.
pub(super) fn v2_parent(mounts: &str, own: &str) -> Result<Parent, String> {
    let (mount, root) = mount_of(mounts, "cgroup2", None).ok_or("cgroup v2 is not mounted")?;
    let path = own
        .lines()
        .find_map(|line| line.strip_prefix("0::"))
        .ok_or("this process is in no cgroup v2")?;
    let mut dir = below(&mount, &root, path).ok_or("the own cgroup is outside the mount")?;
    if dir.file_name().is_some_and(|name| name == LEAF) {
        dir.pop();
    }
    loop {
        let why = match usable_v2(&dir) {
            Ok(parent) => return Ok(parent),
            Err(reason) => format!("{}: {reason}", dir.display()),
        };
        if dir == mount || !dir.pop() {
            return Err(why);
        }
    }
}

/// A group of version 2 below which groups can be made.
pub(super) struct Parent {
    pub(super) dir: PathBuf,
    pub(super) controllers: Vec<Controller>,
    /// This process is in it, alone, and has to leave first.
    pub(super) leave: bool,
}

fn listed(text: &str, controller: Controller) -> bool {
    text.split_ascii_whitespace()
        .any(|word| word == controller.name())
}

/// Which controllers a new child of this group would have; turns them on where that is possible.
///
/// A group with processes of its own can hand out CPU and process numbers (they work by thread) but no memory, and what is
/// then made below it takes no process: it is of no use, unless this process alone is in it (`cgroup-v2.rst`, "No Internal Process
/// Constraint" and "Threads"). The root of the hierarchy may have both.
fn usable_v2(dir: &Path) -> Result<Parent, String> {
    let has = |file: &str| fs::read_to_string(dir.join(file)).unwrap_or_default();
    let available = has("cgroup.controllers");
    let wanted: Vec<_> = Controller::ALL
        .into_iter()
        .filter(|controller| listed(&available, *controller))
        .collect();
    if wanted.is_empty() {
        return Err("no controllers".to_owned());
    }
    let control = dir.join("cgroup.subtree_control");
    for path in [dir, &dir.join("cgroup.procs"), &control] {
        may_write(path).map_err(|error| error.to_string())?;
    }
    let inside = has("cgroup.procs");
    let is_root = !dir.join("cgroup.type").exists();
    if !inside.trim().is_empty() && !is_root {
        if inside.trim() != std::process::id().to_string() {
            return Err("it has other processes of its own".to_owned());
        }
        return Ok(Parent {
            dir: dir.to_owned(),
            controllers: wanted,
            leave: true,
        });
    }
    for controller in &wanted {
        if !listed(&has("cgroup.subtree_control"), *controller) {
            // Refused where a controller cannot be handed on: then a parent may do.
            let _ = OpenOptions::new()
                .write(true)
                .open(&control)
                .and_then(|mut file| file.write_all(format!("+{}", controller.name()).as_bytes()));
        }
    }
    let on = has("cgroup.subtree_control");
    let controllers: Vec<_> = wanted
        .into_iter()
        .filter(|controller| listed(&on, *controller))
        .collect();
    if controllers.is_empty() {
        return Err("controllers cannot be turned on for children".to_owned());
    }
    Ok(Parent {
        dir: dir.to_owned(),
        controllers,
        leave: false,
    })
}

/// This process's own group in the hierarchy of a controller.
pub(super) fn v1_parent(mounts: &str, own: &str, controller: Controller) -> Option<PathBuf> {
    let (mount, root) = mount_of(mounts, "cgroup", Some(controller.name()))?;
    let path = own.lines().find_map(|line| {
        let mut fields = line.splitn(3, ':').skip(1);
        let controllers = fields.next()?;
        let path = fields.next()?;
        controllers
            .split(',')
            .any(|name| name == controller.name())
            .then_some(path)
    })?;
    let dir = below(&mount, &root, path)?;
    // A group made to be sure would stay after a kill at the wrong moment: asking is enough.
    may_write(&dir).ok()?;
    Some(dir)
}

/// Mount point and root of a cgroup file system, from mountinfo (proc_pid_mountinfo(5)).
fn mount_of(mounts: &str, kind: &str, controller: Option<&str>) -> Option<(PathBuf, String)> {
    mounts.lines().find_map(|line| {
        let (front, back) = line.split_once(" - ")?;
        let mut back = back.split(' ');
        if back.next()? != kind {
            return None;
        }
        let options = back.nth(1)?;
        let fits = controller.is_none_or(|wanted| options.split(',').any(|o| o == wanted));
        let mut front = front.split(' ').skip(3);
        let (root, mount) = (front.next()?, front.next()?);
        fits.then(|| (PathBuf::from(mount), root.to_owned()))
    })
}

/// A group's directory: its path counts from the hierarchy's root, the mount may show only a part.
fn below(mount: &Path, root: &str, path: &str) -> Option<PathBuf> {
    let relative = Path::new(path).strip_prefix(root).ok()?;
    let plain = relative
        .components()
        .all(|part| matches!(part, std::path::Component::Normal(_)));
    plain.then(|| {
        // Joining an empty path would add a slash.
        if relative.as_os_str().is_empty() {
            mount.to_owned()
        } else {
            mount.join(relative)
        }
    })
}

fn may_write(path: &Path) -> io::Result<()> {
    rustix::fs::access(path, rustix::fs::Access::WRITE_OK).map_err(io::Error::from)
}
