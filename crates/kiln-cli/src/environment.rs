//! What this process was given: environment variables and the terminal's size. The CLI's one reader of both.

/// The value of a variable, when it is set and UTF-8.
pub(crate) fn var(name: &str) -> Option<String> {
    #[expect(
        clippy::disallowed_methods,
        reason = "the one place of the CLI that reads the environment"
    )]
    std::env::var(name).ok()
}

/// Whether a variable is set to anything but the empty string.
pub(crate) fn is_set(name: &str) -> bool {
    var(name).is_some_and(|value| !value.is_empty())
}

/// Every variable, for discovery of the host's package settings.
pub(crate) fn all() -> Vec<(String, String)> {
    #[expect(
        clippy::disallowed_methods,
        reason = "the one place of the CLI that reads the environment"
    )]
    std::env::vars_os()
        .filter_map(|(key, value)| Some((key.into_string().ok()?, value.into_string().ok()?)))
        .collect()
}

/// Columns of the terminal on standard output; `None` when it is none.
pub(crate) fn output_width() -> Option<usize> {
    let size = rustix::termios::tcgetwinsize(std::io::stdout()).ok()?;
    Some(usize::from(size.ws_col))
}

/// Columns of the terminal on standard error.
pub(crate) fn terminal_width() -> Option<usize> {
    let size = rustix::termios::tcgetwinsize(std::io::stderr()).ok()?;
    Some(usize::from(size.ws_col)).filter(|columns| *columns > 0)
}
