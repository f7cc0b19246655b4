//! `kiln plan`: prints how a folder would be built. Reads the folder and the bases' files, changes nothing, starts nothing.

use std::fs::File;
use std::io::Read as _;
use std::path::Path;

use kiln_image::dockerfile::DOCKERFILE_BYTES_MAX;
use kiln_image::plan::{DockerfileChoice, Options, PlanError, plan, render};

use super::operator::Operator;
use super::source;
use crate::args::PlanArgs;
use crate::error::{CliError, Result, chain};
use crate::show::{Screen, ShownPath as _, printable};

pub(super) fn run(args: &PlanArgs, screen: Screen) -> Result<u8> {
    source::folder(&args.dir)?;
    let dockerfile = args
        .file
        .as_deref()
        .map(|file| dockerfile_choice(&args.dir, file))
        .transpose()?;
    let build_args = source::pairs(&args.build_args, "--build-arg")?;
    let options = Options {
        dockerfile,
        target: args.target.clone(),
        build_args,
    };
    let bases = Operator::load()?.bases()?;
    let plan = plan(&args.dir, &options, &bases).map_err(plan_error)?;
    screen.data(&plan, || match args.dockerfile {
        // As it is for a file or pipe; a terminal is not to be driven by it.
        true if screen.width().is_none() => plan.dockerfile.clone(),
        true => printable(&plan.dockerfile),
        false => printable(&render(&plan)),
    });
    if !plan.unbaked().is_empty() {
        screen.note("its bases are not made yet: run `kiln setup` once before building");
    }
    Ok(0)
}

/// Why a folder has no plan, for a person.
#[expect(clippy::needless_pass_by_value, reason = "fits map_err")]
pub(super) fn plan_error(error: PlanError) -> CliError {
    let mut shown = CliError::new(error.class(), chain(&error));
    shown.hints.extend(error.hint());
    shown
}

/// What `--file` means: a file inside the folder by its name there, any other by its text. Relative paths are looked up from
/// where the user stands, then from the folder.
///
/// # Errors
/// When there is no such file, or it cannot be a Dockerfile.
pub(super) fn dockerfile_choice(dir: &Path, file: &Path) -> Result<DockerfileChoice> {
    let usage = |why: String| {
        CliError::usage(format!("--file {}: {why}", file.shown()))
            .hint("name the Dockerfile to build with")
    };
    let in_dir = dir.join(file);
    let path = if file.is_file() { file } else { &in_dir };
    let meta = std::fs::metadata(path).map_err(|error| usage(error.to_string()))?;
    if !meta.is_file() {
        return Err(usage("it is not a file".to_owned()));
    }
    if let (Ok(dir), Ok(path)) = (dir.canonicalize(), path.canonicalize())
        && let Ok(inside) = path.strip_prefix(&dir)
        && let Some(inside) = inside.to_str()
    {
        return Ok(DockerfileChoice::InFolder(inside.to_owned()));
    }
    let mut text = String::new();
    let max = DOCKERFILE_BYTES_MAX as u64;
    let opened = File::open(path).map_err(|error| usage(error.to_string()))?;
    opened
        .take(max + 1)
        .read_to_string(&mut text)
        .map_err(|error| usage(error.to_string()))?;
    if text.len() as u64 > max {
        return Err(usage(format!("it has more than {max} bytes")));
    }
    Ok(DockerfileChoice::Text {
        name: file.display().to_string(),
        text,
    })
}

/// What `--file` means beside a git URL: a file of this host by its text, else one of the repository, which is read where it is fetched.
///
/// # Errors
/// When a file of this host cannot be a Dockerfile.
pub(super) fn dockerfile_of_repository(file: &Path) -> Result<DockerfileChoice> {
    if file.is_file() {
        return dockerfile_choice(Path::new("/nowhere"), file);
    }
    let inside = file.to_str().ok_or_else(|| {
        CliError::usage(format!("--file {}: the name is not UTF-8", file.shown()))
    })?;
    Ok(DockerfileChoice::InFolder(inside.to_owned()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use kiln_core::FailureClass;
    use kiln_image::bases::Bases;

    fn error_of(dir: &Path) -> CliError {
        plan_error(plan(dir, &Options::default(), &Bases::builtin()).expect_err("no plan"))
    }

    #[test]
    fn near_misses_are_usage_and_unknown_bases_policy() {
        let dir = tempfile::tempdir().expect("temp dir");
        std::fs::write(dir.path().join("requirments.txt"), "flask\n").expect("write");
        let near = error_of(dir.path());
        assert_eq!((near.class, near.exit_code()), (FailureClass::Usage, 2));
        assert!(near.hints[0].contains("requirements.txt"), "{near:?}");
        std::fs::write(
            dir.path().join("Dockerfile"),
            "FROM example.org/unknown:1\n",
        )
        .expect("write");
        let unknown = error_of(dir.path());
        assert_eq!(
            (unknown.class, unknown.exit_code()),
            (FailureClass::Policy, 4)
        );
        let said = format!("{} {:?}", unknown.message, unknown.hints);
        assert!(
            said.contains("kiln bases add example.org/unknown:1"),
            "{said}"
        );
    }

    #[test]
    fn files_inside_and_outside_the_folder() {
        let (dir, other) = (
            tempfile::tempdir().expect("temp dir"),
            tempfile::tempdir().expect("temp dir"),
        );
        std::fs::create_dir(dir.path().join("deploy")).expect("make");
        std::fs::write(dir.path().join("deploy/Dockerfile"), "FROM a\n").expect("write");
        let inside = DockerfileChoice::InFolder("deploy/Dockerfile".to_owned());
        for named in [
            dir.path().join("deploy/Dockerfile"),
            "deploy/Dockerfile".into(),
        ] {
            assert_eq!(
                dockerfile_choice(dir.path(), &named).expect("there"),
                inside
            );
        }
        let outside = other.path().join("D");
        std::fs::write(&outside, "FROM b\n").expect("write");
        let choice = dockerfile_choice(dir.path(), &outside).expect("there");
        assert!(matches!(choice, DockerfileChoice::Text { text, .. } if text == "FROM b\n"));
        for bad in [dir.path().join("none"), dir.path().join("deploy")] {
            assert_eq!(
                dockerfile_choice(dir.path(), &bad)
                    .expect_err("no file")
                    .exit_code(),
                2
            );
        }
    }
}
