//! What is replaced, what is refused, and that nothing else changes.

use kiln_core::{Digest, FailureClass};
use proptest::prelude::*;

use super::*;
use crate::bases::PinnedImage;

fn bases() -> Bases {
    let mut bases = Bases::builtin();
    for base in &mut bases.bases {
        base.build.digest = Some(Digest::of(format!("{}-build", base.name).as_bytes()));
        base.run.digest = Some(Digest::of(format!("{}-run", base.name).as_bytes()));
    }
    bases.images.push(PinnedImage {
        name: "debian:trixie-slim".to_owned(),
        reference: format!("registry.kiln.internal/shared/debian@{}", Digest::of(b"d"))
            .parse()
            .expect("legal"),
        pulled: None,
    });
    bases
}

fn node() -> String {
    bases().bases[0].build.to_string()
}

fn run(text: &str) -> Result<Pinned, DockerfileError> {
    pin(text, &PinOptions::default(), &bases())
}

fn with_args(text: &str, args: &[(&str, &str)]) -> Result<Pinned, DockerfileError> {
    let build_args = args
        .iter()
        .map(|(name, value)| ((*name).to_owned(), (*value).to_owned()));
    let options = PinOptions {
        target: None,
        build_args: build_args.collect(),
    };
    pin(text, &options, &bases())
}

#[test]
fn only_the_references_change() {
    let text = concat!(
        "# syntax=docker/dockerfile:1.7\n",
        "ARG V=20\n",
        "ARG FLAVOUR=\"${V}-slim\"\n",
        "FROM --platform=$BUILDPLATFORM docker.io/library/node:${FLAVOUR} AS Deps # not a comment\n",
    );
    assert!(matches!(
        run(text),
        Err(DockerfileError::Syntax { line: 4, .. })
    ));
    let text = concat!(
        "\u{feff}# syntax=docker/dockerfile:1.7\r\n",
        "ARG V=20 OTHER='x y'\r\n",
        "ARG FLAVOUR=\"${V}-${KIND:-slim}\"\n",
        "FROM --platform=$BUILDPLATFORM docker.io/library/node:${FLAVOUR} AS Deps\n",
        "RUN <<EOF cat > /x && <<'TWO' cat\n",
        "FROM evil:1\n",
        "EOF\n",
        "COPY --from=evil /a /b\n",
        "TWO\n",
        "RUN --mount=type=cache,target=/root/.npm --mount=type=bind,from=debian:trixie-slim,target=/d npm ci\n",
        "FROM \\\n  # a comment\n\n  debian:trixie-slim as two\n",
        "COPY --link --from=deps /a /b\n",
        "COPY --from=0 /a /b\n",
        "COPY --chown=1:1 --from=\"node:20\" /usr/bin/node /n\n",
        "FROM scratch\n",
        "EXPOSE 8080/tcp 53/udp 90\n",
        "COPY <<EOF <<-\"E 2\" /x/\nFROM a\nEOF\n\tb\n\tE 2\n",
        "CMD [\"<<EOF\"]",
    );
    let debian = bases().images[0].reference.to_string();
    let want = text
        .replace("docker.io/library/node:${FLAVOUR}", &node())
        .replace("from=debian:trixie-slim", &format!("from={debian}"))
        .replace("  debian:trixie-slim as", &format!("  {debian} as"))
        .replace("--from=\"node:20\"", &format!("--from={}", node()));
    let pinned = run(text).expect("legal");
    assert_eq!(pinned.text, want);
    assert_eq!(pinned.ports, [8080, 90]);
    let lines: Vec<_> = pinned.bases.iter().map(|b| (b.line, &b.name[..])).collect();
    let both = "docker.io/library/node:20-slim";
    assert_eq!(
        lines,
        [
            (4, both),
            (10, "debian:trixie-slim"),
            (11, "debian:trixie-slim"),
            (17, "node:20")
        ]
    );
    // A pinned file pins to itself.
    assert_eq!(run(&pinned.text).expect("legal").text, pinned.text);
}

#[test]
fn arguments_reach_from_only_when_declared() {
    let text = "ARG V\nFROM node:${V:-20}\n";
    assert!(run(text).expect("default").text.contains(&node()));
    assert!(matches!(
        with_args(text, &[("V", "21")]),
        Err(DockerfileError::UnknownBases(_))
    ));
    // Declared inside a stage is not global.
    let text = "FROM node:20\nARG W=1\nFROM node:2$W\n";
    assert!(matches!(run(text), Err(DockerfileError::UnknownBases(_))));
    assert!(matches!(
        run("FROM $X\n"),
        Err(DockerfileError::Syntax { line: 1, .. })
    ));
    assert!(matches!(
        run("ARG X\nFROM node:${X:?say-which}\n"),
        Err(DockerfileError::Syntax { line: 2, what }) if what.contains("say-which")
    ));
}

#[test]
fn unknown_images_are_policy_and_say_what_to_add() {
    let text =
        "FROM golang:1.24 AS b\nFROM node:20\nCOPY --from=b / /\nCOPY --from=busybox /x /y\n";
    let error = run(text).expect_err("unknown");
    assert_eq!(error.class(), FailureClass::Policy);
    assert_eq!(error.class().exit_code(), 4);
    let text = error.to_string();
    assert!(
        text.contains("line 1: golang:1.24; line 4: busybox"),
        "{text}"
    );
    let hint = error.hint().expect("a hint");
    assert!(hint.contains("kiln bases add golang:1.24 "), "{hint}");
    // Known, but not baked: another command.
    let bare = pin("FROM node:20\n", &PinOptions::default(), &Bases::builtin());
    assert_eq!(
        bare.expect_err("no digest").hint().as_deref(),
        Some("kiln bases bake")
    );
}

#[test]
fn a_stage_shadows_an_image_only_where_buildkit_says_so() {
    // FROM sees the stages above only; COPY --from sees all.
    let text = "FROM node:20 AS node\nFROM NODE\nCOPY --from=later /a /b\nFROM scratch AS Later\n";
    let pinned = run(text).expect("legal");
    assert_eq!(pinned.bases.len(), 1);
    assert!(run("FROM scratch\nCOPY --from=0 /a /b\n").is_err());
    assert!(run("ARG X=a\nFROM scratch\nCOPY --from=$X /a /b\n").is_err());
}

#[test]
fn frontends_entitlements_and_targets() {
    for text in [
        "# syntax=evil/frontend:1\nFROM scratch\n",
        "#!/bin/x\n# syntax = docker/dockerfile-upstream:master\nFROM scratch\n",
        "// syntax=evil/x\nFROM scratch\n",
        "# syntax=docker/dockerfile:1-labs\nFROM scratch\n",
        "FROM scratch\nRUN --security=insecure true\n",
        "FROM scratch\nRUN --network=host true\n",
    ] {
        let error = run(text).expect_err(text);
        assert_eq!(error.class(), FailureClass::Policy, "{text}");
    }
    assert!(with_args("FROM scratch\n", &[("BUILDKIT_SYNTAX", "evil/x")]).is_err());
    assert!(run("# check=skip=all\n# syntax=docker/dockerfile\nFROM scratch\n").is_ok());
    let options = PinOptions {
        target: Some("Prod".to_owned()),
        ..PinOptions::default()
    };
    let found = pin("FROM scratch AS prod\n", &options, &bases());
    assert!(found.is_ok());
    let error = pin("FROM scratch AS dev\n", &options, &bases()).expect_err("no such stage");
    assert_eq!(error.hint().as_deref(), Some("stages: dev"));
}

#[test]
fn broken_files_name_the_line() {
    for (text, line) in [
        ("FROM scratch\nFORM x\n", 2),
        ("RUN x\nFROM scratch\n", 1),
        ("FROM\n", 1),
        ("FROM a b\n", 1),
        ("FROM scratch\n\nRUN <<EOF\nx\n", 3),
        ("# escape=x\nFROM scratch\n", 1),
        ("FROM UPPER/x\n", 1),
        ("FROM scratch AS 0x\n", 1),
        ("FROM --platfrom=x scratch\n", 1),
    ] {
        match run(text) {
            Err(DockerfileError::Syntax { line: found, .. }) => assert_eq!(found, line, "{text}"),
            other => panic!("{text}: {other:?}"),
        }
    }
    assert_eq!(run("# nothing\n"), Err(DockerfileError::NoStage));
    let large = format!("FROM scratch\n#{}", "x".repeat(DOCKERFILE_BYTES_MAX));
    assert!(matches!(run(&large), Err(DockerfileError::TooLarge { .. })));
    let stages = "FROM scratch\n".repeat(STAGES_MAX + 1);
    assert!(matches!(
        run(&stages),
        Err(DockerfileError::TooManyStages { .. })
    ));
}

#[test]
fn the_escape_directive_moves_continuations() {
    let text = "# escape=`\nFROM `\nnode:20\nCOPY c:\\x `\n --from=0 /\n";
    assert!(run(text).expect("legal").text.contains(&node()));
}

#[test]
fn arguments_that_double_do_not_eat_memory() {
    let mut text = String::from("ARG A0=xxxxxxxxxxxxxxxx\n");
    for i in 0..60 {
        text.push_str(&format!("ARG A{}=$A{i}$A{i}\n", i + 1));
    }
    text.push_str("FROM $A60\n");
    assert!(matches!(run(&text), Err(DockerfileError::Syntax { .. })));
}

proptest! {
    #[test]
    fn any_text_is_pinned_or_refused(text in r"((FROM|RUN|COPY|ARG|#)( |--from=|--mount=from=|<<E|\\|\$\{|\}|'|[a-z:.\n]){0,12}\n){0,8}") {
        if let Ok(pinned) = run(&text) {
            prop_assert_eq!(run(&pinned.text).map(|p| p.text), Ok(pinned.text.clone()));
        }
    }

    #[test]
    fn arbitrary_bytes_never_panic(text in r"\PC{0,200}(\n\PC{0,100}){0,5}") {
        let _ = run(&text);
    }
}

/// The last image of a Dockerfile: `build` or `run`.
fn last_base(text: &str, options: &PinOptions) -> &'static str {
    let pinned = pin(text, options, &bases()).expect(text);
    let last = &pinned.bases.last().expect("an image").reference;
    assert!(pinned.text.contains(&format!("FROM {last}")), "{text}");
    let all = bases();
    match all
        .bases
        .iter()
        .find(|base| [&base.build, &base.run].contains(&last))
    {
        Some(base) if base.run == *last => "run",
        Some(_) => "build",
        None => panic!("{last}"),
    }
}

#[test]
fn a_slim_last_stage_that_only_starts_stands_on_the_run_base() {
    let first = "FROM node:20 AS build\nRUN npm ci\n";
    let of = |stage: &str| last_base(&format!("{first}{stage}"), &PinOptions::default());
    let slim = "FROM node:20-slim\nCOPY --from=build /app /app\n";
    assert_eq!(
        of(&format!("{slim}USER node\nCMD [\"node\", \"x.js\"]\n")),
        "run"
    );
    assert_eq!(
        of(&format!(
            "{slim}USER 1000:1000\nENTRYPOINT [\"node\"]\nCMD [\"x.js\"]\n"
        )),
        "run"
    );
    assert_eq!(
        of(
            "FROM python:3.13-slim\nUSER app\nHEALTHCHECK CMD python ok.py\nCMD gunicorn app:app -b :$PORT\n"
        ),
        "run"
    );
    for more in [
        // It runs something, as root, without saying what, or starts what is not there.
        "RUN mkdir /data\nUSER node\nCMD [\"node\", \"x.js\"]\n",
        "CMD [\"node\", \"x.js\"]\n",
        "USER root\nCMD [\"node\", \"x.js\"]\n",
        "USER node\n",
        "USER node\nCMD [\"npm\", \"start\"]\n",
        "USER node\nENTRYPOINT [\"./start.sh\"]\nCMD [\"node\"]\n",
        "USER node\nHEALTHCHECK CMD curl localhost\nCMD [\"node\", \"x.js\"]\n",
        "USER node\nCMD [\"node\", \"x.js\"]\nFROM build\nUSER node\nCMD [\"node\", \"x.js\"]\n",
    ] {
        let text = format!("{first}{slim}{more}");
        let pinned = run(&text).expect("legal");
        assert!(!pinned.text.contains("20-run"), "{more}");
    }
    // Not slim: what its name says.
    assert_eq!(
        of("FROM node:20\nUSER node\nCMD [\"node\", \"x.js\"]\n"),
        "build"
    );
    let target = PinOptions {
        target: Some("build".to_owned()),
        build_args: BTreeMap::new(),
    };
    let text = format!("{first}{slim}USER node\nCMD [\"node\", \"x.js\"]\n");
    assert_eq!(last_base(&text, &target), "build");
}
