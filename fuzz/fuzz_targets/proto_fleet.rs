//! What a worker and a controller send each other: whatever is taken reads back the same, and a lease header is its own text.
//! The first byte says which message it is.
#![no_main]

use kiln_proto::fleet;
use libfuzzer_sys::fuzz_target;
use serde::Serialize;
use serde::de::DeserializeOwned;

/// Written and read again it is the same text.
fn same<T: Serialize + DeserializeOwned>(bytes: &[u8]) {
    let Ok(message) = serde_json::from_slice::<T>(bytes) else {
        return;
    };
    let text = serde_json::to_vec(&message).expect("what was read can be written");
    let again: T = serde_json::from_slice(&text).expect("what was written can be read");
    assert_eq!(text, serde_json::to_vec(&again).expect("written"), "another message");
}

fuzz_target!(|input: &[u8]| {
    let Some((which, bytes)) = input.split_first() else {
        return;
    };
    match which % 18 {
        0 => same::<fleet::Join>(bytes),
        1 => same::<fleet::Joined>(bytes),
        2 => same::<fleet::Renew>(bytes),
        3 => same::<fleet::Release>(bytes),
        4 => same::<fleet::Heartbeat>(bytes),
        5 => same::<fleet::HeartbeatAnswer>(bytes),
        6 => same::<fleet::Poll>(bytes),
        7 => same::<fleet::PollAnswer>(bytes),
        8 => same::<fleet::Own>(bytes),
        9 => same::<fleet::JobEvents>(bytes),
        10 => same::<fleet::LogAnswer>(bytes),
        11 => same::<fleet::PublishImage>(bytes),
        12 => same::<fleet::RegistryToken>(bytes),
        13 => same::<fleet::Finish>(bytes),
        14 => same::<fleet::AskSecrets>(bytes),
        15 => same::<fleet::Secrets>(bytes),
        16 => same::<fleet::Refusal>(bytes),
        _ => {
            let text = String::from_utf8_lossy(bytes);
            if let Ok(header) = text.parse::<fleet::LeaseHeader>() {
                let shown = header.to_string();
                assert_eq!(shown.parse(), Ok(header), "{shown}");
            }
        }
    }
});
