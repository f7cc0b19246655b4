//! DNS messages, as far as a stub resolver's questions go: RFC 1035 section 4, one question, no compression.
//!
//! Questions come from tenants' programs and are hostile. Nothing here allocates more than a message.

use std::net::Ipv4Addr;

/// Longest question that is read, bytes.
pub(crate) const QUERY_MAX: usize = 1232;
/// Seconds a program may keep an address.
const TTL_SECONDS: u32 = 30;

const HEADER_LEN: usize = 12;
const NAME_MAX: usize = 255;
const LABEL_MAX: usize = 63;
const TYPE_A: u16 = 1;
const CLASS_IN: u16 = 1;
const FLAG_RESPONSE: u16 = 0x8000;
const FLAG_RECURSION_DESIRED: u16 = 0x0100;
const FLAG_RECURSION_AVAILABLE: u16 = 0x0080;
const OPCODE_MASK: u16 = 0x7800;

/// A question that was understood.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) struct Query {
    id: u16,
    flags: u16,
    /// The question section as it came.
    question: Vec<u8>,
    /// The name, lower case, without the last dot; empty for the root.
    pub(crate) name: String,
    kind: u16,
    class: u16,
}

/// What to answer.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Answer {
    /// This address, when an address was asked for; else nothing of that type.
    Address(Ipv4Addr),
    /// No such name.
    NoName,
    /// Nobody can tell now.
    Failure,
}

/// Why there is no question.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) enum Malformed {
    /// Not worth an answer.
    Silence,
    /// This answer says so.
    Reply(Vec<u8>),
}

fn be16(bytes: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_be_bytes(bytes.get(at..at + 2)?.try_into().ok()?))
}

fn header(id: u16, query_flags: u16, code: u16, questions: u16, answers: u16) -> Vec<u8> {
    let flags = FLAG_RESPONSE
        | FLAG_RECURSION_AVAILABLE
        | (query_flags & (FLAG_RECURSION_DESIRED | OPCODE_MASK))
        | code;
    [id, flags, questions, answers, 0, 0]
        .iter()
        .flat_map(|word| word.to_be_bytes())
        .collect()
}

const FORMAT_ERROR: u16 = 1;
const SERVER_FAILURE: u16 = 2;
const NAME_ERROR: u16 = 3;
const NOT_IMPLEMENTED: u16 = 4;

/// The name that begins at `at`, lower case, and where it ends.
fn name(bytes: &[u8], mut at: usize) -> Option<(String, usize)> {
    let begin = at;
    let mut name = String::new();
    loop {
        let len = usize::from(*bytes.get(at)?);
        at += 1;
        if len == 0 {
            return Some((name, at));
        }
        if len > LABEL_MAX || at - begin + len >= NAME_MAX {
            return None;
        }
        let label = bytes.get(at..at + len)?;
        let printable = |byte: &u8| byte.is_ascii_graphic() && *byte != b'.';
        if !label.iter().all(printable) {
            return None;
        }
        if !name.is_empty() {
            name.push('.');
        }
        name.extend(
            label
                .iter()
                .map(|byte| char::from(byte.to_ascii_lowercase())),
        );
        at += len;
    }
}

impl Query {
    /// Reads a question.
    ///
    /// # Errors
    /// What to do instead of answering it.
    pub(crate) fn parse(bytes: &[u8]) -> Result<Self, Malformed> {
        let words = (be16(bytes, 0), be16(bytes, 2), be16(bytes, 4));
        let (Some(id), Some(flags), Some(questions)) = words else {
            return Err(Malformed::Silence);
        };
        if flags & FLAG_RESPONSE != 0 || bytes.len() < HEADER_LEN || bytes.len() > QUERY_MAX {
            return Err(Malformed::Silence);
        }
        let refuse = |code| Malformed::Reply(header(id, flags, code, 0, 0));
        if flags & OPCODE_MASK != 0 {
            return Err(refuse(NOT_IMPLEMENTED));
        }
        if questions != 1 {
            return Err(refuse(FORMAT_ERROR));
        }
        let (name, end) = name(bytes, HEADER_LEN).ok_or_else(|| refuse(FORMAT_ERROR))?;
        let rest = be16(bytes, end).zip(be16(bytes, end + 2));
        let (kind, class) = rest.ok_or_else(|| refuse(FORMAT_ERROR))?;
        let question = bytes[HEADER_LEN..end + 4].to_vec();
        Ok(Self {
            id,
            flags,
            question,
            name,
            kind,
            class,
        })
    }

    /// The bytes that answer it.
    pub(crate) fn reply(&self, answer: Answer) -> Vec<u8> {
        let (code, address) = match answer {
            Answer::Address(address) => {
                let asked = self.kind == TYPE_A && self.class == CLASS_IN;
                (0, asked.then_some(address))
            }
            Answer::NoName => (NAME_ERROR, None),
            Answer::Failure => (SERVER_FAILURE, None),
        };
        let mut reply = header(self.id, self.flags, code, 1, u16::from(address.is_some()));
        reply.extend_from_slice(&self.question);
        if let Some(address) = address {
            // A pointer to the question's name.
            reply.extend_from_slice(&[0xc0, HEADER_LEN as u8]);
            reply.extend_from_slice(&TYPE_A.to_be_bytes());
            reply.extend_from_slice(&CLASS_IN.to_be_bytes());
            reply.extend_from_slice(&TTL_SECONDS.to_be_bytes());
            reply.extend_from_slice(&4_u16.to_be_bytes());
            reply.extend_from_slice(&address.octets());
        }
        reply
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn query(name: &str, kind: u16) -> Vec<u8> {
        let mut bytes = vec![0xab, 0xcd, 1, 0, 0, 1, 0, 0, 0, 0, 0, 1];
        for label in name.split('.').filter(|label| !label.is_empty()) {
            bytes.push(label.len() as u8);
            bytes.extend_from_slice(label.as_bytes());
        }
        bytes.push(0);
        bytes.extend_from_slice(&kind.to_be_bytes());
        bytes.extend_from_slice(&[0, 1]);
        // An EDNS record, as resolvers add it.
        bytes.extend_from_slice(&[0, 0, 41, 4, 0xd0, 0, 0, 0, 0, 0, 0]);
        bytes
    }

    #[test]
    fn an_address_is_answered() {
        let query = Query::parse(&query("Registry.Example", TYPE_A)).unwrap();
        assert_eq!(query.name, "registry.example");
        let reply = query.reply(Answer::Address(Ipv4Addr::new(198, 18, 0, 2)));
        assert_eq!(
            reply[..12],
            [0xab, 0xcd, 0x81, 0x80, 0, 1, 0, 1, 0, 0, 0, 0]
        );
        assert!(reply.ends_with(&[0xc0, 12, 0, 1, 0, 1, 0, 0, 0, 30, 0, 4, 198, 18, 0, 2]));
    }

    #[test]
    fn other_types_of_a_known_name_are_empty() {
        for kind in [28, 16, 65, 255] {
            let query = Query::parse(&query("a.example", kind)).unwrap();
            let reply = query.reply(Answer::Address(Ipv4Addr::new(198, 18, 0, 2)));
            assert_eq!(
                (reply[3] & 15, reply[7], reply.len()),
                (0, 0, 12 + query.question.len())
            );
        }
        let reply = Query::parse(&query("x", 28)).unwrap().reply(Answer::NoName);
        assert_eq!(reply[3] & 15, 3);
        let reply = Query::parse(&query("x", 1)).unwrap().reply(Answer::Failure);
        assert_eq!(reply[3] & 15, 2);
    }

    #[test]
    fn what_is_no_question_is_refused() {
        let good = query("a.example", 1);
        let changed = |at: usize, value: u8| {
            let mut bytes = good.clone();
            bytes[at] = value;
            Query::parse(&bytes)
        };
        assert_eq!(changed(2, 0x81), Err(Malformed::Silence));
        let code = |result: Result<Query, Malformed>| match result {
            Err(Malformed::Reply(reply)) => reply[3] & 15,
            other => panic!("{other:?}"),
        };
        assert_eq!(code(changed(2, 0x29)), 4);
        assert_eq!(code(changed(5, 2)), 1);
        assert_eq!(code(changed(5, 0)), 1);
        assert_eq!(code(changed(12, 0xc0)), 1, "a compressed name");
        assert_eq!(code(changed(13, b'.')), 1, "a dot inside a label");
        assert_eq!(
            code(Query::parse(&query(&["abcdefg"; 32].join("."), 1))),
            1,
            "too long"
        );
        assert_eq!(Query::parse(&good[..11]), Err(Malformed::Silence));
        assert_eq!(
            Query::parse(&vec![0; QUERY_MAX + 1]),
            Err(Malformed::Silence)
        );
    }

    proptest! {
        #[test]
        fn arbitrary_bytes_never_panic(bytes in prop::collection::vec(any::<u8>(), 0..300)) {
            if let Ok(query) = Query::parse(&bytes) {
                let reply = query.reply(Answer::Address(Ipv4Addr::LOCALHOST));
                prop_assert!(reply.len() <= bytes.len() + 16);
            }
        }

        #[test]
        fn names_survive(name in "[a-z0-9_-]{1,63}(\\.[a-z0-9-]{1,20}){0,8}") {
            prop_assert_eq!(Query::parse(&query(&name, 1)).unwrap().name, name);
        }
    }
}
