//! Front ends that are only files once they are built.

use super::manifest::{FILE, Manifest};
use crate::plan::PlanError;
use crate::plan::detect::Request;
use crate::plan::start::Cmd;
use crate::plan::types::{Evidence, StaticSite};
use crate::plan::write::Text;

/// The file server's path in the image.
const SERVER: &str = "/app/serve.mjs";
/// The file server.
const SERVER_TEXT: &str = include_str!("static_server.mjs");
/// Ends the file server's text.
const HEREDOC: &str = "KILN_END_OF_FILE";
/// Where the site lies in the image.
pub(in crate::plan) const SITE: &str = "/app/site";

/// Puts the file server into the image; gives the command that starts it.
pub(in crate::plan) fn serve_site(text: &mut Text) -> Cmd {
    text.line(format!("COPY --link <<'{HEREDOC}' {SERVER}"));
    text.line(SERVER_TEXT.trim_end()).line(HEREDOC);
    server_command()
}

/// Starts the file server.
pub(super) fn server_command() -> Cmd {
    Cmd::Exec(["node", SERVER].map(str::to_owned).to_vec())
}

pub(super) struct Found {
    pub(super) site: StaticSite,
    pub(super) why: Evidence,
}

/// A tool that makes such front ends.
struct Tool {
    package: &'static str,
    /// Programs whose start scripts only serve while developing.
    programs: &'static [&'static str],
    folder: &'static str,
    single_page: bool,
    /// The root has an `index.html` that the tool starts from.
    needs_index: bool,
}

const TOOLS: [Tool; 4] = [
    Tool {
        package: "astro",
        programs: &["astro"],
        folder: "dist",
        single_page: false,
        needs_index: false,
    },
    Tool {
        package: "react-scripts",
        programs: &["react-scripts"],
        folder: "build",
        single_page: true,
        needs_index: false,
    },
    Tool {
        package: "@vue/cli-service",
        programs: &["vue-cli-service"],
        folder: "dist",
        single_page: true,
        needs_index: false,
    },
    Tool {
        package: "vite",
        programs: &["vite"],
        folder: "dist",
        single_page: true,
        needs_index: true,
    },
];

/// Packages that render on the server: such apps start with their own script.
const SERVERS: [&str; 8] = [
    "next",
    "nuxt",
    "@sveltejs/kit",
    "@remix-run/serve",
    "@remix-run/node",
    "@react-router/serve",
    "@astrojs/node",
    "vike",
];

const VITE_CONFIGS: [&str; 5] = [
    "vite.config.ts",
    "vite.config.js",
    "vite.config.mts",
    "vite.config.mjs",
    "astro.config.mjs",
];

pub(super) fn find(
    request: &Request<'_>,
    manifest: &Manifest,
    builds: bool,
) -> Result<Option<Found>, PlanError> {
    if !builds || SERVERS.iter().any(|package| manifest.mentions(package)) {
        return Ok(None);
    }
    let Some(tool) = TOOLS.iter().find(|tool| manifest.mentions(tool.package)) else {
        return Ok(None);
    };
    let only_develops = |script: &str| {
        let first = script.split_whitespace().next().unwrap_or_default();
        tool.programs.contains(&first) || matches!(script, "npm run dev" | "npm run preview")
    };
    if manifest.script("start").is_some_and(|s| !only_develops(s))
        || (tool.needs_index && !request.has("index.html"))
    {
        return Ok(None);
    }
    let mut folder = tool.folder.to_owned();
    let mut why = Evidence::at(
        format!("a site of files, built by {} into {folder}", tool.package),
        FILE,
        manifest.line(&["scripts", "build"]),
    );
    for file in VITE_CONFIGS {
        let Some(text) = request.folder.read(file)? else {
            continue;
        };
        if let Some((line, found)) = out_dir(&text) {
            folder = found;
            let what = format!("a site of files, built by {} into {folder}", tool.package);
            why = Evidence::at(what, file, Some(line));
        }
    }
    let single_page = tool.single_page;
    Ok(Some(Found {
        site: StaticSite {
            folder,
            single_page,
        },
        why,
    }))
}

/// `outDir: 'build'`, and its line.
fn out_dir(text: &str) -> Option<(u32, String)> {
    for (index, line) in text.lines().enumerate() {
        let line = line.split("//").next().unwrap_or_default();
        let Some((_, rest)) = line.split_once("outDir:") else {
            continue;
        };
        let rest = rest.trim_start();
        let quote = rest
            .chars()
            .next()
            .filter(|c| matches!(c, '\'' | '"' | '`'))?;
        let value = rest[1..].split(quote).next()?;
        let value = value
            .strip_prefix("./")
            .unwrap_or(value)
            .trim_end_matches('/');
        let legal = !value.is_empty()
            && !value.split('/').any(|name| matches!(name, ".." | "" | "."))
            && value
                .bytes()
                .all(|b| b.is_ascii_alphanumeric() || b"._-/".contains(&b));
        return legal.then(|| (index as u32 + 1, value.to_owned()));
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn out_dir_is_read_where_it_is_plain() {
        let text = "export default {\n  // outDir: 'no'\n  build: { outDir: './public/x/' },\n}";
        assert_eq!(out_dir(text), Some((3, "public/x".to_owned())));
        assert_eq!(out_dir("outDir: path.join(a)"), None);
        assert_eq!(out_dir("outDir: '../up'"), None);
    }

    #[test]
    fn the_server_can_stand_in_a_here_document() {
        assert!(!SERVER_TEXT.lines().any(|line| line == HEREDOC));
        assert!(SERVER_TEXT.ends_with('\n'));
    }
}
