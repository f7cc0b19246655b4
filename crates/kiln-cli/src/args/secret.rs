//! Words of `kiln secret`.

use clap::{Args, Subcommand};

/// Whose secrets.
#[derive(Args, Debug, Clone, Default)]
pub(crate) struct OwnerArgs {
    /// For which tenant; the token's own without
    #[arg(long, value_name = "NAME")]
    pub tenant: Option<String>,
}

/// Which jobs may have a secret.
#[derive(Args, Debug, Clone, Default)]
pub(crate) struct ScopeArgs {
    /// Only jobs built from this repository: host/team/app, with * for any name and ** for any names; may be given more than once
    #[arg(long = "repository", value_name = "PATTERN")]
    pub repositories: Vec<String>,
    /// Only for this: build, run, or git (the host shows it to git servers, no machine has it)
    #[arg(long = "for", value_name = "USE")]
    pub uses: Vec<String>,
}

/// How a value is read.
#[derive(Args, Debug, Clone, Default)]
pub(crate) struct ValueArgs {
    /// Keep every byte of standard input, a newline at the end too
    #[arg(long)]
    pub raw: bool,
}

/// Verbs of `kiln secret`.
#[derive(Subcommand, Debug)]
#[command(
    after_help = "Examples:\n  kiln secret set NPM_TOKEN < token.txt\n  kiln secret set NPM_TOKEN --repository 'git.example.org/team/*' --for build\n  \
kiln secret set DB_PASSWORD --from vault:ci/shop/db#password\n  \
kiln build . --secret id=NPM_TOKEN\n  kiln run --secret NPM_TOKEN -- npm publish\n  kiln secret access-log NPM_TOKEN\n\n\
A value comes from standard input or a prompt, never from the command line. One newline at the end of a single line is not a part of it \
(--raw keeps it); a value of several lines is kept as it is."
)]
pub(crate) enum SecretCommand {
    /// Keep a value: of a new secret, or in the place of the one it had
    Set {
        /// Its name
        name: String,
        /// How the value is read
        #[command(flatten)]
        value: ValueArgs,
        /// Keep no value: fetch it from a store of the operator's each time a job needs it
        #[arg(long, value_name = "STORE:PATH[#FIELD]", conflicts_with = "raw")]
        from: Option<String>,
        /// Who may have it
        #[command(flatten)]
        scope: ScopeArgs,
        /// Whose it is
        #[command(flatten)]
        owner: OwnerArgs,
    },
    /// List secrets, never their values
    List {
        /// Whose they are
        #[command(flatten)]
        owner: OwnerArgs,
    },
    /// Give a secret that is there a new value
    Rotate {
        /// Its name
        name: String,
        /// How the value is read
        #[command(flatten)]
        value: ValueArgs,
        /// Whose it is
        #[command(flatten)]
        owner: OwnerArgs,
    },
    /// Say which jobs may have a secret; all trusted ones without an option
    Scope {
        /// Its name
        name: String,
        /// Who may have it
        #[command(flatten)]
        scope: ScopeArgs,
        /// Whose it is
        #[command(flatten)]
        owner: OwnerArgs,
    },
    /// Forget a secret and its value
    Delete {
        /// Its name
        name: String,
        /// Whose it is
        #[command(flatten)]
        owner: OwnerArgs,
    },
    /// Say who had a secret, was refused it, or changed it
    AccessLog {
        /// Its name; also of one that is gone
        name: String,
        /// Whose it is
        #[command(flatten)]
        owner: OwnerArgs,
    },
}
