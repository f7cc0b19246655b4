//! What the host does with a whole image: looks at one a guest pushed, before anybody may have it
//! ([`verify()`]), and hands one out as an archive ([`export()`]).

mod config;
mod export;
mod verify;

pub use config::{CONFIG_BYTES_MAX, ConfigError, ImageConfig};
pub use export::{ArchiveFormat, ExportError, export};
pub use verify::{
    ExpectedBase, IMAGE_BYTES_MAX, LAYERS_MAX, Layer, Select, VerifiedImage, Verify, VerifyError,
    verify,
};
