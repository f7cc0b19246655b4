//! `kiln bench`: the numbers of PROMISES.md, measured side by side on this host, raw samples kept.

use tokio_util::sync::CancellationToken;

use crate::args::BenchArgs;
use crate::error::Result;
use crate::show::Screen;

pub(super) async fn run(args: BenchArgs, screen: Screen, cancel: CancellationToken) -> Result<u8> {
    crate::bench::run(&args, screen, &cancel).await
}
