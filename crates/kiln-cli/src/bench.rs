//! Benchmarks: see `kiln bench`.

use tokio_util::sync::CancellationToken;

use crate::args::BenchArgs;
use crate::error::Result;
use crate::show::Screen;

/// Runs the named benchmarks.
///
/// # Errors
/// When one cannot be set up.
pub(crate) async fn run(
    _args: &BenchArgs,
    screen: Screen,
    _cancel: &CancellationToken,
) -> Result<u8> {
    screen.note("no benchmarks yet");
    Ok(0)
}
