//! What the host reads from streams of a guest: messages and chunks.
#![no_main]

use kiln_proto::msg::{CallResult, ConnectReply, Exit, GuestError, GuestEvent, TreeReport};
use kiln_proto::{msg, next_msg, read_chunk};
use libfuzzer_sys::fuzz_target;
use serde_json::Value;

const LEN_MAX: usize = 64 * 1024;

fuzz_target!(|input: &[u8]| {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .build()
        .expect("a runtime");
    runtime.block_on(async {
        let mut reader = input;
        while let Ok(Some(_)) = next_msg::<Value, _>(&mut reader, LEN_MAX).await {}
        let mut reader = input;
        while let Ok(Some(chunk)) = read_chunk(&mut reader).await {
            assert!(chunk.body.len() <= kiln_proto::codec::CHUNK_LEN_MAX);
        }
    });
    let _ = serde_json::from_slice::<CallResult>(input);
    let _ = serde_json::from_slice::<ConnectReply>(input);
    let _ = serde_json::from_slice::<Exit>(input);
    let _ = serde_json::from_slice::<GuestError>(input);
    let _ = serde_json::from_slice::<GuestEvent>(input);
    let _ = serde_json::from_slice::<TreeReport>(input);
    let _ = serde_json::from_slice::<msg::Connect>(input);
    let _ = serde_json::from_slice::<msg::Resolve>(input);
});
