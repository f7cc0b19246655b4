use base64::Engine as _;
use base64::engine::general_purpose::{STANDARD, URL_SAFE_NO_PAD};
use proptest::prelude::*;

use super::*;

fn masked(mask: &Mask, pieces: &[&[u8]]) -> Vec<u8> {
    let mut stream = mask.stream();
    let mut out: Vec<u8> = pieces.iter().flat_map(|piece| stream.push(piece)).collect();
    out.extend(stream.finish());
    out
}

#[test]
fn secrets_are_replaced_in_every_form_and_across_pieces() {
    let mask = Mask::new([&b"hunter2\n"[..], b"abcdefgh"]);
    assert_eq!(masked(&mask, &[b"x hun", b"ter", b"2 y"]), b"x *** y");
    let encoded = STANDARD.encode("hunter2");
    assert_eq!(mask.text(&format!("basic {encoded}")), "basic ***");
    assert_eq!(mask.text("6162636465666768 abcdefg"), "*** abcdefg");
    assert_eq!(masked(&mask, &[b"hunte"]), b"hunte");
    let json = Mask::new([&b"a\"b\\c"[..]]);
    assert_eq!(json.text(r#"{"p":"a\"b\\c"}"#), r#"{"p":"***"}"#);
}

#[test]
fn a_value_in_a_url_is_replaced_however_the_program_wrote_it() {
    let mask = Mask::new([&b"p/w *d+?\xc3\xa9"[..]]);
    for form in [
        "p%2Fw%20%2Ad%2B%3F%C3%A9",
        "p%2fw%20%2ad%2b%3f%c3%a9",
        "p%2Fw+%2Ad%2B%3F%C3%A9",
        "p%2Fw%20*d%2B%3F%C3%A9",
        "p/w%20%2Ad%2B%3F%C3%A9",
    ] {
        let text = mask.text(&format!("https://host/?q={form}&r"));
        assert_eq!(text, "https://host/?q=***&r", "{form}");
    }
}

#[test]
fn a_value_in_the_middle_of_base_64_is_replaced() {
    let mask = Mask::new([&b"hunter2-and-more"[..]]);
    for user in ["u", "us", "use", "user"] {
        for rest in ["", "x", "xy", "xyz"] {
            let whole = format!("{user}:hunter2-and-more{rest}");
            for encoded in [STANDARD.encode(&whole), URL_SAFE_NO_PAD.encode(&whole)] {
                let text = mask.text(&encoded);
                assert!(text.contains("***"), "{whole}: {text}");
                // What is left of it are the characters that other bytes have a part in.
                let left = text.replace("***", "").len();
                let most = (user.len() + 1 + rest.len()).div_ceil(3) * 4 + 8;
                assert!(left <= most, "{whole}: {text}");
            }
        }
    }
}

#[test]
fn a_key_of_many_lines_is_masked_line_by_line() {
    let mask = Mask::new([&b"-----BEGIN-----\nAAAABBBBCCCCDDDD\n-----END-----\n"[..]]);
    assert!(!mask.text("| AAAABBBBCCCCDDDD |").contains("AAAA"));
}

/// Neither long values nor many that begin alike make a log expensive, and each is one word in it.
#[test]
fn long_values_are_replaced_piece_by_piece() {
    let alike: Vec<Vec<u8>> = (0..100_u32)
        .map(|n| [&[b'a'; 8192][..], n.to_string().as_bytes()].concat())
        .collect();
    let mask = Mask::new(alike.iter().map(Vec::as_slice));
    assert!(mask.forms.patterns.len() < 2_000, "{mask:?}");
    let long = |pattern: &Vec<u8>| pattern.len() >= 2 * forms::PIECE_BYTES;
    assert!(!mask.forms.patterns.iter().any(long));
    let line = [b"<", &alike[7][..], b">"].concat();
    assert_eq!(mask.text(&String::from_utf8_lossy(&line)), "<***>");
    let mut steps = 0;
    for at in 0..line.len() {
        steps += mask.forms.look(&line[at..]).found.unwrap_or(1);
    }
    assert!(steps <= line.len() * 2 * forms::PIECE_BYTES);

    let large: Vec<u8> = (0..300_000_u32)
        .flat_map(|n| (n * 7).to_le_bytes())
        .collect();
    let mask = Mask::new([&large[..]]);
    let kept: usize = mask.forms.patterns.iter().map(Vec::len).sum();
    assert!(kept < 6 * large.len(), "{kept}");
    let encoded = STANDARD.encode(&large);
    assert_eq!(mask.text(&format!("<{encoded}>")), "<***>");
}

#[test]
fn a_look_finds_the_longest_and_knows_whether_it_may_grow() {
    let patterns = ["abcd", "abcdef", "abce", "b"];
    let forms = Forms {
        patterns: patterns.iter().map(|p| p.as_bytes().to_vec()).collect(),
        first: vec![true; 256],
    };
    let look = |text: &str| {
        let look = forms.look(text.as_bytes());
        (look.found, look.may_grow)
    };
    assert_eq!(look("abcdefg"), (Some(6), false));
    assert_eq!(look("abcdef"), (Some(6), false));
    assert_eq!(look("abcde"), (Some(4), true));
    assert_eq!(look("abcdx"), (Some(4), false));
    assert_eq!(look("abcd"), (Some(4), true));
    assert_eq!(look("ab"), (None, true));
    assert_eq!(look("abx"), (None, false));
    assert_eq!(look("bb"), (Some(1), false));
    assert_eq!(look("x"), (None, false));
}

#[test]
fn short_values_and_none_change_nothing() {
    assert_eq!(
        Mask::new([&b"abc"[..]]).text("abc YWJj abc"),
        "abc YWJj abc"
    );
    assert_eq!(Mask::default().text("x"), "x");
}

#[test]
fn what_is_held_is_not_printed_with_the_stream() {
    let mut stream = Mask::new([&b"hunter2"[..]]).stream();
    stream.push(b"hunt");
    assert_eq!(format!("{stream:?}"), "MaskedStream(4 bytes held)");
}

#[tokio::test(start_paused = true)]
async fn a_tail_is_held_for_so_long_and_no_longer() {
    let mut stream = Mask::new([&b"hunter2"[..]]).stream();
    assert_eq!(stream.push(b"what? h"), b"what? ");
    let until = stream.held_until().expect("a tail");
    assert_eq!(until, Instant::now() + HELD_MAX);
    // More bytes of what could be one do not make the first wait longer.
    tokio::time::advance(HELD_MAX - Duration::from_millis(1)).await;
    assert_eq!(stream.push(b"un"), b"");
    assert_eq!(stream.held_until(), Some(until));
    assert_eq!(stream.let_go(), b"", "not yet");
    tokio::time::advance(Duration::from_millis(1)).await;
    assert_eq!(stream.let_go(), b"hun");
    assert_eq!(stream.held_until(), None);
    assert_eq!(stream.let_go(), b"", "once");
    // It was another word: nothing of it comes again, and a new tail has its own time.
    assert_eq!(stream.push(b"dred h"), b"dred ");
    assert_eq!(stream.held_until(), Some(Instant::now() + HELD_MAX));
    assert_eq!(stream.finish(), b"h");
}

#[tokio::test(start_paused = true)]
async fn the_rest_of_a_secret_with_a_pause_in_it_is_replaced() {
    let mask = Mask::new([&b"hunter2"[..], b"two-secrets", b"two-secrets-of-more"]);
    let mut stream = mask.stream();
    assert_eq!(stream.push(b"hunt"), b"");
    tokio::time::advance(HELD_MAX).await;
    assert_eq!(stream.let_go(), b"hunt");
    assert_eq!(stream.push(b"er2 hunter2!"), b"*** ***!");
    // One that is the beginning of another as well.
    assert_eq!(stream.push(b"two-secrets"), b"");
    tokio::time::advance(HELD_MAX).await;
    assert_eq!(stream.let_go(), b"***");
    assert_eq!(stream.push(b"-of-less"), b"-of-less");
    assert_eq!(stream.push(b"two-secrets"), b"");
    tokio::time::advance(HELD_MAX).await;
    assert_eq!(stream.let_go(), b"***");
    assert_eq!(stream.push(b"-of-more"), b"***");
    assert_eq!(stream.finish(), b"");
}

/// Cuts a text into pieces of these lengths, and the rest.
fn cut<'a>(text: &'a str, cuts: &[usize]) -> Vec<&'a [u8]> {
    let (mut rest, mut pieces) = (text.as_bytes(), Vec::new());
    for cut in cuts {
        let (piece, more) = rest.split_at((*cut).min(rest.len()));
        pieces.push(piece);
        rest = more;
    }
    pieces.push(rest);
    pieces
}

proptest! {
    #[test]
    fn no_cut_lets_a_secret_through(
        cuts in prop::collection::vec(1_usize..9, 0..20),
        before in "[a-d]{0,12}", after in "[a-d]{0,12}", secret in "[a-d]{4,10}",
    ) {
        let mask = Mask::new([secret.as_bytes()]);
        let text = format!("{before}{secret}{after}");
        let out = masked(&mask, &cut(&text, &cuts));
        let out = String::from_utf8(out).expect("text");
        prop_assert!(!out.contains(&secret), "{out}");
    }

    #[test]
    fn where_a_long_secret_is_cut_changes_nothing(
        cuts in prop::collection::vec(0_usize..150, 0..12),
        before in "[ab]{0,80}", after in "[ab]{0,80}", secret in "[ab]{120,400}",
    ) {
        let mask = Mask::new([secret.as_bytes()]);
        let text = format!("{before}{secret}{after}");
        let out = masked(&mask, &cut(&text, &cuts));
        let out = String::from_utf8(out).expect("text");
        prop_assert_eq!(&out, &mask.text(&text));
        prop_assert!(!out.contains(&secret), "{out}");
    }

    #[test]
    fn where_output_is_cut_changes_nothing(
        cuts in prop::collection::vec(0_usize..9, 0..30),
        text in "[a-c]{0,60}", secrets in prop::collection::vec("[a-c]{4,12}", 0..4),
    ) {
        let mask = Mask::new(secrets.iter().map(String::as_bytes));
        let whole = masked(&mask, &[text.as_bytes()]);
        let text_masked = mask.text(&text);
        prop_assert_eq!(&whole[..], text_masked.as_bytes());
        prop_assert_eq!(whole, masked(&mask, &cut(&text, &cuts)));
    }

    #[test]
    fn pauses_lose_and_repeat_nothing(
        cuts in prop::collection::vec((0_usize..9, any::<bool>()), 0..30),
        text in "[a-c]{0,60}", secret in "[a-c]{4,12}",
    ) {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_time()
            .start_paused(true)
            .build()
            .expect("runtime");
        let lengths: Vec<_> = cuts.iter().map(|(length, _)| *length).collect();
        let mut pauses = cuts.iter().map(|(_, pause)| *pause);
        let mut stream = Mask::new([secret.as_bytes()]).stream();
        let out = runtime.block_on(async {
            let mut out = Vec::new();
            for piece in cut(&text, &lengths) {
                out.extend(stream.push(piece));
                if pauses.next() == Some(true) {
                    tokio::time::advance(HELD_MAX).await;
                    out.extend(stream.let_go());
                    assert!(stream.held_until().is_none());
                }
            }
            out.extend(stream.finish());
            String::from_utf8(out).expect("text")
        });
        prop_assert!(!out.contains(&secret), "{out}");
        // What is no part of a secret is there, in order, once.
        let plain = out.replace("***", "");
        let mut all = text.bytes();
        prop_assert!(plain.bytes().all(|byte| all.any(|other| other == byte)), "{text}: {out}");
        if !text.contains(&secret) {
            prop_assert_eq!(out, text);
        }
    }
}
