//! YAML as a tree with places, bounded before anything is built from it.
//!
//! The file is a stranger's. What makes YAML dangerous or surprising is refused, not interpreted: anchors and aliases (a few lines become
//! gigabytes), tags, directives, several documents, merge keys, keys that are no plain names, keys that come twice.

use granit_parser::{Event, Parser, ScalarStyle, Span, StructureStyle};

use crate::diagnostic::{Diagnostic, Place, shown};

/// Largest policy file, bytes.
pub const FILE_BYTES_MAX: usize = 256 * 1024;
/// Deepest nesting.
pub const DEPTH_MAX: usize = 12;
/// Most values and keys of a file.
pub const NODES_MAX: usize = 10_000;

/// A value of the file and where it stands.
#[derive(Clone, Debug)]
pub(crate) struct Node {
    pub(crate) place: Place,
    pub(crate) value: Value,
}

/// What a value is.
#[derive(Clone, Debug)]
pub(crate) enum Value {
    /// A word or text; `plain` when it stands without quotes.
    Scalar { text: String, plain: bool },
    /// Values in order.
    List(Vec<Node>),
    /// Named values in order; names differ.
    Map(Vec<(Key, Node)>),
}

/// A name in a map.
#[derive(Clone, Debug)]
pub(crate) struct Key {
    pub(crate) place: Place,
    pub(crate) name: String,
}

/// What a scalar is by the core schema of YAML 1.2; numbers are decimal integers only.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum ScalarKind {
    Text,
    Integer(u64),
    OtherNumber,
    Flag(bool),
    Nothing,
}

impl Node {
    pub(crate) fn get(&self, name: &str) -> Option<&Self> {
        match &self.value {
            Value::Map(entries) => entries
                .iter()
                .find(|(key, _)| key.name == name)
                .map(|(_, node)| node),
            _ => None,
        }
    }

    pub(crate) fn entries(&self) -> &[(Key, Self)] {
        match &self.value {
            Value::Map(entries) => entries,
            _ => &[],
        }
    }

    pub(crate) fn items(&self) -> &[Self] {
        match &self.value {
            Value::List(items) => items,
            _ => &[],
        }
    }

    pub(crate) fn text(&self) -> Option<&str> {
        match &self.value {
            Value::Scalar { text, .. } => Some(text),
            _ => None,
        }
    }

    pub(crate) fn scalar_kind(&self) -> Option<ScalarKind> {
        let Value::Scalar { text, plain } = &self.value else {
            return None;
        };
        Some(match &**text {
            _ if !plain => ScalarKind::Text,
            "" | "~" | "null" | "Null" | "NULL" => ScalarKind::Nothing,
            "true" | "True" | "TRUE" => ScalarKind::Flag(true),
            "false" | "False" | "FALSE" => ScalarKind::Flag(false),
            text if !text.starts_with('+') && text.parse::<u64>().is_ok() => {
                ScalarKind::Integer(text.parse().unwrap_or_default())
            }
            text if text.parse::<f64>().is_ok()
                && text.starts_with([
                    '-', '+', '.', '0', '1', '2', '3', '4', '5', '6', '7', '8', '9',
                ]) =>
            {
                ScalarKind::OtherNumber
            }
            _ => ScalarKind::Text,
        })
    }

    /// What it is, for a message.
    pub(crate) fn kind_name(&self) -> &'static str {
        match (&self.value, self.scalar_kind()) {
            (Value::List(_), _) => "a list",
            (Value::Map(_), _) => "a map",
            (_, Some(ScalarKind::Integer(_) | ScalarKind::OtherNumber)) => "a number",
            (_, Some(ScalarKind::Flag(_))) => "true or false",
            (_, Some(ScalarKind::Nothing)) => "nothing",
            _ => "a text",
        }
    }
}

fn place(span: Span) -> Place {
    let number = |n: usize| u32::try_from(n).unwrap_or(u32::MAX);
    let len = match span.start.line() == span.end.line() {
        true => span.end.index().saturating_sub(span.start.index()),
        false => 1,
    };
    Place {
        line: number(span.start.line()),
        column: number(span.start.col() + 1),
        len: number(len.max(1)),
    }
}

/// A map or list that is not complete yet.
struct Open {
    place: Place,
    value: Value,
    /// In a map: the key whose value comes next.
    key: Option<Key>,
}

/// Reads one document. An empty file is an empty map.
pub(crate) fn parse(text: &str) -> Result<Node, Diagnostic> {
    if text.len() > FILE_BYTES_MAX {
        return Err(Diagnostic::of_file(format!(
            "the file has {} bytes: at most {FILE_BYTES_MAX} are read",
            text.len()
        )));
    }
    let options = granit_parser::options! {
        disallow_directives: true,
        // Above kiln's own bound, which says so better.
        flow_nesting_limit: 4 * DEPTH_MAX,
        block_nesting_limit: 4 * DEPTH_MAX,
        emit_unresolved_aliases: true,
        emit_comments: false,
    };
    let mut tree = Tree::default();
    for next in Parser::new_from_str_with_options(text, options) {
        let (event, span) = next.map_err(|error| {
            let at = *error.marker();
            let place = place(Span::empty(at));
            match error.kind() {
                granit_parser::ErrorKind::RecursionLimitExceeded => too_deep(place),
                _ => Diagnostic::at(place, format!("this is not YAML: {}", shown(&error.info()))),
            }
        })?;
        tree.take(event, place(span))?;
    }
    let nothing = Place {
        line: 1,
        column: 1,
        len: 1,
    };
    let root = tree.root.unwrap_or(Node {
        place: nothing,
        value: Value::Map(Vec::new()),
    });
    Ok(match root.scalar_kind() {
        Some(ScalarKind::Nothing) => Node {
            place: root.place,
            value: Value::Map(Vec::new()),
        },
        _ => root,
    })
}

#[derive(Default)]
struct Tree {
    open: Vec<Open>,
    root: Option<Node>,
    nodes: usize,
}

impl Tree {
    fn take(&mut self, event: Event<'_>, place: Place) -> Result<(), Diagnostic> {
        if event.anchor_id().is_some() || event.is_alias() {
            return Err(refuse(place, "an anchor or alias"));
        }
        if event.tag().is_some() {
            return Err(refuse(place, "a tag"));
        }
        match event {
            Event::Scalar(text, style, ..) => {
                let plain = matches!(style, ScalarStyle::Plain);
                let text = text.into_owned();
                self.put(Node {
                    place,
                    value: Value::Scalar { text, plain },
                })
            }
            Event::SequenceStart(style, ..) => self.begin(place, style, Value::List(Vec::new())),
            Event::MappingStart(style, ..) => self.begin(place, style, Value::Map(Vec::new())),
            Event::SequenceEnd | Event::MappingEnd => match self.open.pop() {
                Some(done) => self.put(Node {
                    place: done.place,
                    value: done.value,
                }),
                None => Ok(()),
            },
            Event::UnresolvedAlias(_) => Err(refuse(place, "an anchor or alias")),
            Event::DocumentStart(..) if self.root.is_some() => Err(Diagnostic::at(
                place,
                "a second document begins here: a policy is one",
            )),
            _ => Ok(()),
        }
    }

    fn begin(
        &mut self,
        place: Place,
        style: StructureStyle,
        value: Value,
    ) -> Result<(), Diagnostic> {
        if self.open.len() >= DEPTH_MAX {
            return Err(too_deep(place));
        }
        if let Some(Open {
            value: Value::Map(_),
            key: None,
            ..
        }) = self.open.last()
        {
            return Err(Diagnostic::at(place, "a list or map cannot be a key"));
        }
        let key = self.open.last().and_then(|open| open.key.as_ref());
        let place = match key {
            // A block begins with its first entry: its name is the better place.
            Some(key) if style == StructureStyle::Block => key.place,
            _ => place,
        };
        self.open.push(Open {
            place,
            value,
            key: None,
        });
        Ok(())
    }

    fn put(&mut self, node: Node) -> Result<(), Diagnostic> {
        self.nodes += 1;
        if self.nodes > NODES_MAX {
            return Err(Diagnostic::at(
                node.place,
                format!("the file has more than {NODES_MAX} values"),
            ));
        }
        let Some(open) = self.open.last_mut() else {
            self.root = Some(node);
            return Ok(());
        };
        match (&mut open.value, open.key.take()) {
            (Value::List(items), _) => items.push(node),
            (Value::Map(entries), Some(key)) => entries.push((key, node)),
            (Value::Map(entries), None) => {
                let Value::Scalar { text, .. } = node.value else {
                    return Err(Diagnostic::at(node.place, "a list or map cannot be a key"));
                };
                if let Some((first, _)) = entries.iter().find(|(key, _)| key.name == text) {
                    let message = format!("{:?} is here twice", shown(&text));
                    return Err(Diagnostic::at(node.place, message).also(first.place, "first here"));
                }
                open.key = Some(Key {
                    place: node.place,
                    name: text,
                });
            }
            (Value::Scalar { .. }, _) => {}
        }
        Ok(())
    }
}

fn too_deep(place: Place) -> Diagnostic {
    Diagnostic::at(place, format!("this is nested more than {DEPTH_MAX} deep"))
}

fn refuse(place: Place, what: &str) -> Diagnostic {
    Diagnostic::at(place, format!("{what} is not allowed in a policy"))
        .hint("write the value out where it is meant")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_makes_yaml_dangerous_is_refused() {
        let wide = format!("a: [{}]", "x, ".repeat(NODES_MAX));
        let deep = "[".repeat(50);
        let deep_block: String = (0..50).map(|n| format!("{}a:\n", " ".repeat(n))).collect();
        let large = "#".repeat(FILE_BYTES_MAX + 1);
        for (text, want) in [
            ("a: &x [1]\nb: *x", "anchor"),
            ("a: *x", "anchor"),
            ("a: &x 1", "anchor"),
            ("a: !!str 1", "tag"),
            ("a: !evil {}", "tag"),
            ("%YAML 1.2\n---\na: 1", "not YAML"),
            ("a: 1\n---\nb: 2", "second document"),
            ("a: 1\na: 2", "twice"),
            ("{[a]: 1}", "cannot be a key"),
            ("a: [1", "not YAML"),
            (&wide, "more than"),
            (&deep, "deep"),
            (&deep_block, "deep"),
            (&large, "at most"),
        ] {
            let error = parse(text).expect_err(text);
            assert!(error.message.contains(want), "{want}: {error:?}");
        }
    }

    #[test]
    fn scalars_are_what_yaml_says() {
        use ScalarKind::*;
        for (text, want) in [
            ("1", Integer(1)),
            ("'1'", Text),
            ("-1", OtherNumber),
            ("1.5", OtherNumber),
            ("true", Flag(true)),
            ("yes", Text),
            ("~", Nothing),
            ("infinity", Text),
        ] {
            let node = parse(&format!("a: {text}")).expect("yaml");
            assert_eq!(
                node.get("a").and_then(Node::scalar_kind),
                Some(want),
                "{text}"
            );
        }
        assert!(parse("").expect("empty").entries().is_empty());
        assert!(parse("# only\n").expect("empty").entries().is_empty());
    }

    #[test]
    fn places_are_lines_and_columns_of_characters() {
        let node = parse("a: 1\nbä: [x, yy]\n").expect("yaml");
        let list = node.get("bä").expect("list");
        let place = list.items()[1].place;
        assert_eq!((place.line, place.column, place.len), (2, 9, 2));
    }
}
