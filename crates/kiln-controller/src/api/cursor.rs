//! Cursors of lists: opaque, and authenticated, so that nobody makes one that points elsewhere. Bound to the list they came from.

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use ring::hmac;

use super::problem::Problem;

/// Bytes of the tag in front.
const TAG: usize = 16;
/// Longest cursor.
const CURSOR_MAX: usize = 512;

/// Makes a cursor of `text` for a list; `list` names it and whoever asked.
pub(crate) fn seal(key: &[u8; 32], list: &str, text: &str) -> String {
    let mut bytes = tag(key, list, text).to_vec();
    bytes.extend_from_slice(text.as_bytes());
    URL_SAFE_NO_PAD.encode(bytes)
}

/// Reads a cursor of this very list.
pub(crate) fn open(key: &[u8; 32], list: &str, cursor: &str) -> Result<String, Problem> {
    let wrong = || {
        Problem::invalid("cursor", "this is not a cursor of this list")
            .hint("use the `next` of the page before, with the same filters and token")
    };
    if cursor.len() > CURSOR_MAX {
        return Err(wrong());
    }
    let bytes = URL_SAFE_NO_PAD.decode(cursor).map_err(|_| wrong())?;
    let (shown, text) = bytes.split_at_checked(TAG).ok_or_else(wrong)?;
    let text = std::str::from_utf8(text).map_err(|_| wrong())?;
    let differ = tag(key, list, text)
        .iter()
        .zip(shown)
        .fold(0, |all, (a, b)| all | (a ^ b));
    if differ != 0 {
        return Err(wrong());
    }
    Ok(text.to_owned())
}

fn tag(key: &[u8; 32], list: &str, text: &str) -> [u8; TAG] {
    let key = hmac::Key::new(hmac::HMAC_SHA256, key);
    let mut context = hmac::Context::with_key(&key);
    context.update(&(list.len() as u64).to_be_bytes());
    context.update(list.as_bytes());
    context.update(text.as_bytes());
    let mut tag = [0; TAG];
    tag.copy_from_slice(&context.sign().as_ref()[..TAG]);
    tag
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_cursor_is_good_for_its_own_list_alone() {
        let key = [7; 32];
        let cursor = seal(&key, "jobs acme", "5.b1");
        assert_eq!(open(&key, "jobs acme", &cursor).expect("own"), "5.b1");
        assert!(open(&key, "jobs other", &cursor).is_err());
        assert!(open(&[8; 32], "jobs acme", &cursor).is_err());
        let raw = URL_SAFE_NO_PAD.encode("0000000000000000".to_owned() + "5.b1");
        assert!(open(&key, "jobs acme", &raw).is_err());
    }

    proptest! {
        #[test]
        fn any_text_is_a_cursor_or_not(text in ".{0,200}") {
            prop_assert!(open(&[7; 32], "jobs", &text).is_err());
        }
    }
}
