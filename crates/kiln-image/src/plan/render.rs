//! A plan as text for people.

use std::fmt::Write;

use super::shown;
use super::types::{Command, Evidence, Plan};

/// What `kiln plan` prints.
#[must_use]
pub fn render(plan: &Plan) -> String {
    let mut out = String::new();
    let mut row = |name: &str, value: &str, place: Option<&Evidence>| {
        let place = place.map_or_else(String::new, |e| format!("   ({})", shown(&e.place())));
        // Writing to a String cannot fail.
        let _ = writeln!(out, "{name:<16}{}{place}", shown(value));
    };
    let runtime = match &plan.version {
        Some(version) => format!("{} {}", plan.runtime.name(), version.version),
        None => plan.runtime.name().to_owned(),
    };
    row("runtime", &runtime, None);
    if let Some(version) = &plan.version {
        let wanted = version.wanted.as_deref().unwrap_or("nothing asked for");
        let exact = version.exact.as_ref();
        let exact = exact.map_or_else(String::new, |v| format!(", here {v}"));
        row("version", &format!("{wanted}{exact}"), Some(&version.why));
    }
    if !plan.root.is_empty() {
        row("subfolder", &plan.root, None);
    }
    for (name, value) in [
        ("framework", &plan.framework),
        ("packages by", &plan.package_manager),
    ] {
        if let Some(value) = value {
            row(name, value, None);
        }
    }
    let mut commands = |name: &str, commands: &[Command]| {
        for command in commands {
            row(name, &command.line, Some(&command.why));
        }
    };
    commands("install", &plan.install);
    commands("build", &plan.build);
    commands("start", plan.start.as_slice());
    if !plan.system_packages.is_empty() {
        row("debian packages", &plan.system_packages.join(" "), None);
    }
    if let Some(site) = &plan.static_site {
        row("static site", &site.folder, None);
    }
    if let Some(port) = plan.port {
        let text = match plan.dockerfile_path {
            None => format!("{port} (PORT changes it)"),
            Some(_) => port.to_string(),
        };
        row("port", &text, None);
    }
    for base in &plan.bases {
        let text = match base.reference.digest.is_some() {
            true => base.reference.to_string(),
            false => format!("{} (not baked yet: kiln bases bake)", base.reference),
        };
        row("base", &text, None);
    }
    if !plan.registries.is_empty() {
        row("registries", &plan.registries.join(" "), None);
    }
    section(&mut out, "Why", &plan.evidence);
    section(&mut out, "Note", &plan.notes);
    let title = plan.dockerfile_path.as_deref().unwrap_or("Dockerfile");
    let _ = write!(
        out,
        "\n# {}, as it is built\n\n{}",
        shown(title),
        plan.dockerfile
    );
    out
}

fn section(out: &mut String, title: &str, all: &[Evidence]) {
    if all.is_empty() {
        return;
    }
    let _ = writeln!(out, "\n{title}");
    for evidence in all {
        let place = match evidence.file.is_empty() {
            true => String::new(),
            false => format!("   ({})", shown(&evidence.place())),
        };
        let _ = writeln!(out, "  {}{place}", shown(&evidence.what));
    }
}
