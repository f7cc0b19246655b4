//! Every image a Dockerfile names, resolved to a digest and written back; all other bytes stay as they are.
//!
//! Names are resolved as BuildKit's `dockerfile2llb/convert.go` resolves them: FROM sees the stages above it,
//! `COPY --from` and `RUN --mount=from` see all stages; stage names ignore case.

use std::collections::BTreeMap;
use std::ops::Range;

use kiln_core::ImageRef;
use serde::{Deserialize, Serialize};

use super::error::{DockerfileError, UnknownImage};
use super::expand::expand;
use super::flags::{Flag, take_flags};
use super::lines::{Instruction, split};
use super::slim::{Slim, Stage, is_slim};
use super::spelled::Spelled;
use super::syntax;
use crate::bases::Bases;

/// Largest Dockerfile, bytes.
pub const DOCKERFILE_BYTES_MAX: usize = 1024 * 1024;
/// Most stages of one Dockerfile.
pub const STAGES_MAX: usize = 200;
/// The empty image: never pulled.
const SCRATCH: &str = "scratch";

/// What the request says about a Dockerfile.
#[derive(Clone, Debug, Default)]
pub struct PinOptions {
    /// Stage to build; the last one if none.
    pub target: Option<String>,
    /// Build arguments.
    pub build_args: BTreeMap<String, String>,
}

/// One image of a Dockerfile.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct BaseUse {
    /// As the Dockerfile writes it.
    pub written: String,
    /// Arguments expanded.
    pub name: String,
    /// Line of the instruction, from 1.
    pub line: u32,
    /// What it is resolved to.
    pub reference: ImageRef,
}

/// A Dockerfile whose images are digests.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Pinned {
    /// The rewritten file.
    pub text: String,
    /// Its images in the order they stand there.
    pub bases: Vec<BaseUse>,
    /// Names of its stages; `None` for those without.
    pub stages: Vec<Option<String>>,
    /// Ports of `EXPOSE` in the file's order, where they are plain TCP numbers.
    pub ports: Vec<u16>,
}

/// Checks a Dockerfile and pins its images.
///
/// # Errors
/// See [`DockerfileError`]. All unknown images are reported together.
pub fn pin(text: &str, options: &PinOptions, bases: &Bases) -> Result<Pinned, DockerfileError> {
    if text.len() > DOCKERFILE_BYTES_MAX {
        return Err(DockerfileError::TooLarge {
            bytes: text.len(),
            max: DOCKERFILE_BYTES_MAX,
        });
    }
    syntax::check_frontend(text)?;
    if let Some(frontend) = options.build_args.get(syntax::SYNTAX_ARGUMENT) {
        syntax::one(
            frontend,
            format!("the build argument {}", syntax::SYNTAX_ARGUMENT),
        )?;
    }
    let mut walk = Walk::new(options, bases);
    let instructions = split(text)?;
    walk.stages(&instructions)?;
    for instruction in &instructions {
        walk.instruction(instruction)?;
    }
    walk.finish(text)
}

struct Walk<'a> {
    options: &'a PinOptions,
    bases: &'a Bases,
    /// Global arguments: name to value, `None` when declared without one.
    arguments: BTreeMap<String, Option<String>>,
    all_stages: Vec<Option<String>>,
    /// What is known of the stage that is read.
    stage: Stage,
    seen: usize,
    uses: Vec<BaseUse>,
    unknown: Vec<UnknownImage>,
    edits: Vec<(Range<usize>, String)>,
    ports: Vec<u16>,
}

fn syntax_error(line: u32, what: impl Into<String>) -> DockerfileError {
    DockerfileError::Syntax {
        line,
        what: what.into(),
    }
}

impl<'a> Walk<'a> {
    fn new(options: &'a PinOptions, bases: &'a Bases) -> Self {
        let mut arguments = BTreeMap::new();
        for side in ["BUILD", "TARGET"] {
            for (name, value) in [
                ("PLATFORM", "linux/amd64"),
                ("OS", "linux"),
                ("OSVERSION", ""),
                ("ARCH", "amd64"),
                ("VARIANT", ""),
            ] {
                arguments.insert(format!("{side}{name}"), Some(value.to_owned()));
            }
        }
        for (name, value) in &mut arguments {
            if let Some(given) = options.build_args.get(name) {
                *value = Some(given.clone());
            }
        }
        Self {
            options,
            bases,
            arguments,
            all_stages: Vec::new(),
            stage: Stage::default(),
            seen: 0,
            uses: Vec::new(),
            unknown: Vec::new(),
            edits: Vec::new(),
            ports: Vec::new(),
        }
    }

    /// First pass: the names of all stages, which `COPY --from` may use in any order.
    fn stages(&mut self, instructions: &[Instruction]) -> Result<(), DockerfileError> {
        for from in instructions.iter().filter(|i| i.keyword == "from") {
            if self.all_stages.len() == STAGES_MAX {
                return Err(DockerfileError::TooManyStages {
                    line: from.line,
                    max: STAGES_MAX,
                });
            }
            let name = from_parts(from)?.name;
            self.all_stages.push(name);
        }
        if self.all_stages.is_empty() {
            return Err(DockerfileError::NoStage);
        }
        match &self.options.target {
            Some(target) if !has_stage(&self.all_stages, target) => {
                Err(DockerfileError::NoTarget {
                    target: target.clone(),
                    stages: self.all_stages.iter().flatten().cloned().collect(),
                })
            }
            _ => Ok(()),
        }
    }

    fn instruction(&mut self, instruction: &Instruction) -> Result<(), DockerfileError> {
        self.stage.instruction(instruction);
        match instruction.keyword.as_str() {
            "arg" if self.seen == 0 => self.global_argument(instruction),
            "from" => self.from(instruction),
            "copy" => self.copy(instruction),
            "run" => self.run(instruction),
            _ if self.seen == 0 => {
                let keyword = instruction.keyword.to_uppercase();
                let what = format!("{keyword} stands before the first FROM");
                Err(syntax_error(instruction.line, what))
            }
            "expose" => {
                let ports = instruction.rest.text().split_whitespace();
                let number = |port: &str| {
                    port.strip_suffix("/tcp")
                        .unwrap_or(port)
                        .parse::<u16>()
                        .ok()
                };
                self.ports.extend(ports.filter_map(number));
                Ok(())
            }
            _ => Ok(()),
        }
    }

    fn global_argument(&mut self, instruction: &Instruction) -> Result<(), DockerfileError> {
        for word in argument_words(instruction)? {
            let (name, default) = match word.split_once('=') {
                Some((name, default)) => (name.to_owned(), Some(default.to_owned())),
                None => (word.clone(), None),
            };
            let value = match (self.options.build_args.get(&name), default) {
                (Some(given), _) => Some(given.clone()),
                (None, Some(default)) => Some(self.expanded(&default, instruction)?),
                (None, None) => self.arguments.get(&name).cloned().flatten(),
            };
            self.arguments.insert(name, value);
        }
        Ok(())
    }

    fn expanded(&self, text: &str, at: &Instruction) -> Result<String, DockerfileError> {
        let get = |name: &str| self.arguments.get(name).cloned().flatten();
        expand(text, at.escape, &get).map_err(|e| syntax_error(at.line, e.to_string()))
    }

    fn from(&mut self, instruction: &Instruction) -> Result<(), DockerfileError> {
        let parts = from_parts(instruction)?;
        let written = parts.image.text();
        let name = self.expanded(written, instruction)?;
        if name.is_empty() {
            let what = format!("{written} is empty: give the argument a default or a --build-arg");
            return Err(syntax_error(instruction.line, what));
        }
        let above = &self.all_stages[..self.seen];
        self.seen += 1;
        if name == SCRATCH || has_stage(above, &name) {
            self.stage = Stage::default();
            return Ok(());
        }
        let span = parts.image.span();
        let run = is_slim(&name)
            .then(|| self.bases.run_of_alias(&name))
            .flatten();
        self.stage = run.map_or_else(Stage::default, |run| {
            let (span, image) = (span.clone(), self.uses.len());
            Stage::slim(Slim { span, image, run })
        });
        self.image(instruction.line, written, &name, span, |reference| {
            reference.to_owned()
        })
    }

    fn copy(&mut self, instruction: &Instruction) -> Result<(), DockerfileError> {
        self.needs_stage(instruction)?;
        let (flags, _) = take_flags(&instruction.rest, instruction.escape);
        for flag in flags.iter().filter(|flag| flag.name == "from") {
            let Some(value) = flag.value.as_deref().filter(|value| !value.is_empty()) else {
                return Err(syntax_error(instruction.line, "COPY --from needs a value"));
            };
            if let Ok(index) = value.parse::<usize>() {
                if index + 1 < self.seen {
                    continue;
                }
                let what = format!("COPY --from={index}: no such stage above");
                return Err(syntax_error(instruction.line, what));
            }
            if self.is_stage_or_scratch(value, instruction)? {
                continue;
            }
            let span = flag.word.span();
            self.image(instruction.line, value, value, span, |reference| {
                format!("--from={reference}")
            })?;
        }
        Ok(())
    }

    fn run(&mut self, instruction: &Instruction) -> Result<(), DockerfileError> {
        self.needs_stage(instruction)?;
        let (flags, _) = take_flags(&instruction.rest, instruction.escape);
        for flag in &flags {
            let value = flag.value.as_deref().unwrap_or_default();
            let weakens = match flag.name.as_str() {
                "security" => value != "sandbox",
                "network" => !matches!(value, "default" | "none"),
                "device" => true,
                _ => false,
            };
            if weakens {
                return Err(DockerfileError::Entitlement {
                    line: instruction.line,
                    flag: flag.word.text().chars().take(100).collect(),
                });
            }
            if flag.name == "mount" {
                self.mount(instruction, flag)?;
            }
        }
        Ok(())
    }

    fn mount(&mut self, instruction: &Instruction, flag: &Flag) -> Result<(), DockerfileError> {
        let value = flag.value.as_deref().unwrap_or_default();
        let Some(plain) = flag
            .plain_value()
            .filter(|plain| !plain.text().contains('"'))
        else {
            return if value.to_ascii_lowercase().contains("from") {
                let what = "write --mount=…,from=… without quotes and escapes";
                Err(syntax_error(instruction.line, what))
            } else {
                Ok(())
            };
        };
        let mut start = 0;
        for field in plain.text().split(',') {
            let end = start + field.len();
            if let Some((key, image)) = field.split_once('=')
                && key.eq_ignore_ascii_case("from")
                && !image.is_empty()
                && !self.is_stage_or_scratch(image, instruction)?
            {
                let span = plain.slice(end - image.len()..end).span();
                self.image(instruction.line, image, image, span, |reference| {
                    reference.to_owned()
                })?;
            }
            start = end + 1;
        }
        Ok(())
    }

    fn needs_stage(&self, instruction: &Instruction) -> Result<(), DockerfileError> {
        if self.seen > 0 {
            return Ok(());
        }
        let keyword = instruction.keyword.to_uppercase();
        let what = format!("{keyword} stands before the first FROM");
        Err(syntax_error(instruction.line, what))
    }

    fn is_stage_or_scratch(&self, name: &str, at: &Instruction) -> Result<bool, DockerfileError> {
        if name.contains('$') {
            let what = format!(
                "{name:?}: arguments are not expanded here; name a stage with `FROM image AS name` and use that"
            );
            return Err(syntax_error(at.line, what));
        }
        Ok(name == SCRATCH || has_stage(&self.all_stages, name))
    }

    /// Resolves an image and notes the edit that pins it.
    fn image(
        &mut self,
        line: u32,
        written: &str,
        name: &str,
        span: Option<Range<usize>>,
        spell: impl FnOnce(&str) -> String,
    ) -> Result<(), DockerfileError> {
        if name.parse::<ImageRef>().is_err() {
            let shown: String = name.chars().take(200).collect();
            return Err(syntax_error(line, format!("{shown:?} is no image name")));
        }
        let Some(reference) = self.bases.resolve_from(name) else {
            self.unknown.push(UnknownImage {
                line,
                image: name.to_owned(),
                add: self.bases.line_to_add(name),
            });
            return Ok(());
        };
        if let Some(span) = span {
            self.edits.push((span, spell(&reference.to_string())));
        }
        self.uses.push(BaseUse {
            written: written.to_owned(),
            name: name.to_owned(),
            line,
            reference,
        });
        Ok(())
    }

    /// A slim last stage that only starts stands on the run base.
    fn settle_slim(&mut self) {
        if self.options.target.is_some() {
            return;
        }
        let Some(slim) = std::mem::take(&mut self.stage).only_starts() else {
            return;
        };
        let edit = self
            .edits
            .iter_mut()
            .find(|(span, _)| Some(span) == slim.span.as_ref());
        if let (Some((_, text)), Some(used)) = (edit, self.uses.get_mut(slim.image)) {
            *text = slim.run.to_string();
            used.reference = slim.run;
        }
    }

    fn finish(mut self, text: &str) -> Result<Pinned, DockerfileError> {
        if !self.unknown.is_empty() {
            return Err(DockerfileError::UnknownBases(self.unknown));
        }
        self.settle_slim();
        let mut out = String::with_capacity(text.len() + self.edits.len() * 80);
        let mut at = 0;
        for (span, replacement) in &self.edits {
            out.push_str(&text[at..span.start]);
            out.push_str(replacement);
            at = span.end;
        }
        out.push_str(&text[at..]);
        Ok(Pinned {
            text: out,
            bases: self.uses,
            stages: self.all_stages,
            ports: self.ports,
        })
    }
}

fn has_stage(stages: &[Option<String>], name: &str) -> bool {
    let mut named = stages.iter().flatten();
    named.any(|stage| stage.eq_ignore_ascii_case(name))
}

struct From {
    image: Spelled,
    name: Option<String>,
}

fn from_parts(instruction: &Instruction) -> Result<From, DockerfileError> {
    let line = instruction.line;
    let (flags, body) = take_flags(&instruction.rest, instruction.escape);
    if let Some(flag) = flags.iter().find(|flag| flag.name != "platform") {
        return Err(syntax_error(
            line,
            format!("FROM has no flag --{}", flag.name),
        ));
    }
    let words = body.words();
    let name = match &words[..] {
        [_] => None,
        [_, keyword, name] if keyword.text().eq_ignore_ascii_case("as") => {
            let name = name.text().to_lowercase();
            let legal = name.starts_with(|c: char| c.is_ascii_lowercase())
                && name
                    .bytes()
                    .all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b"-_.".contains(&b));
            if !legal || name == SCRATCH {
                return Err(syntax_error(line, format!("{name:?} is no stage name")));
            }
            Some(name)
        }
        _ => {
            let what = "FROM is written `FROM image [AS name]`";
            return Err(syntax_error(line, what));
        }
    };
    let image = words[0].clone();
    Ok(From { image, name })
}

/// The words of a global ARG, quotes kept: they are removed when a value is expanded.
fn argument_words(instruction: &Instruction) -> Result<Vec<String>, DockerfileError> {
    let mut words = Vec::new();
    let mut word = String::new();
    let mut quote = None;
    let mut chars = instruction.rest.text().chars();
    while let Some(c) = chars.next() {
        match (quote, c) {
            (None, c) if c.is_whitespace() => {
                if !word.is_empty() {
                    words.push(std::mem::take(&mut word));
                }
                continue;
            }
            (None, '\'' | '"') => quote = Some(c),
            (Some(open), c) if c == open => quote = None,
            (_, c) if c == instruction.escape => {
                word.push(c);
                word.extend(chars.next());
                continue;
            }
            _ => {}
        }
        word.push(c);
    }
    if !word.is_empty() {
        words.push(word);
    }
    if words.is_empty() {
        return Err(syntax_error(instruction.line, "ARG needs a name"));
    }
    Ok(words)
}

#[cfg(test)]
mod tests;
