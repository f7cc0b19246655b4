//! What a file may hold, as one value: the check of a file's structure and the JSON Schema for editors are made from the same description,
//! so neither can say what the other does not.

use serde_json::{Map, Value as Json, json};

use crate::diagnostic::{Diagnostic, shown};
use crate::yaml::{Node, ScalarKind, Value};

/// What a value may be.
#[derive(Debug)]
pub(crate) enum Shape {
    /// A text; what is in it is read by the compiler, the pattern is for editors.
    Text {
        /// What it looks like, for a person.
        what: &'static str,
        /// A regular expression of ECMA-262 that every legal text matches.
        pattern: &'static str,
        /// Longest text, in characters.
        len_max: usize,
        /// What a bare number lacks to be one, if it is a number with a unit.
        unit: Option<&'static str>,
    },
    /// One of these words, each with what it means.
    Word(&'static [(&'static str, &'static str)]),
    /// A whole number.
    Integer {
        /// The least.
        least: u64,
        /// The most.
        most: u64,
    },
    /// True or false.
    Flag,
    /// A list.
    List {
        /// Of these.
        of: &'static Shape,
        /// Least entries.
        least: usize,
        /// Most entries.
        most: usize,
    },
    /// A map with these keys and no others.
    Fields(&'static [Field]),
    /// A map from names that the author chooses.
    Named {
        /// The regular expression of a name.
        pattern: &'static str,
        /// What each one is.
        of: &'static Shape,
        /// Most entries.
        most: usize,
    },
    /// One of two, told apart by what kind of value stands there.
    Either(&'static Shape, &'static Shape),
}

/// A key of a map.
#[derive(Debug)]
pub(crate) struct Field {
    pub(crate) name: &'static str,
    pub(crate) required: bool,
    /// What it means, for people and editors.
    pub(crate) about: &'static str,
    pub(crate) shape: Shape,
}

impl Field {
    pub(crate) const fn optional(name: &'static str, about: &'static str, shape: Shape) -> Self {
        Self {
            name,
            required: false,
            about,
            shape,
        }
    }

    pub(crate) const fn required(name: &'static str, about: &'static str, shape: Shape) -> Self {
        Self {
            name,
            required: true,
            about,
            shape,
        }
    }
}

impl Shape {
    /// What it is, for a message.
    fn kind_name(&self) -> String {
        match self {
            Self::Text { what, .. } => (*what).to_owned(),
            Self::Word(words) => {
                let words: Vec<&str> = words.iter().map(|(word, _)| *word).collect();
                words.join(" or ")
            }
            Self::Integer { .. } => "a whole number".to_owned(),
            Self::Flag => "true or false".to_owned(),
            Self::List { .. } => "a list".to_owned(),
            Self::Fields(_) | Self::Named { .. } => "a map".to_owned(),
            Self::Either(one, other) => format!("{} or {}", one.kind_name(), other.kind_name()),
        }
    }

    fn fits(&self, node: &Node) -> bool {
        match self {
            Self::Text { .. } | Self::Word(_) => node.scalar_kind() == Some(ScalarKind::Text),
            Self::Integer { .. } => matches!(node.scalar_kind(), Some(ScalarKind::Integer(_))),
            Self::Flag => matches!(node.scalar_kind(), Some(ScalarKind::Flag(_))),
            Self::List { .. } => matches!(node.value, Value::List(_)),
            Self::Fields(_) | Self::Named { .. } => matches!(node.value, Value::Map(_)),
            Self::Either(one, other) => one.fits(node) || other.fits(node),
        }
    }

    /// Checks the structure of a value; `at` is its path for messages.
    pub(crate) fn check(&self, node: &Node, at: &str, wrong: &mut Vec<Diagnostic>) {
        if !self.fits(node) {
            wrong.push(self.wrong_kind(node, at));
            return;
        }
        match self {
            Self::Text {
                pattern, len_max, ..
            } => {
                let len = node.text().unwrap_or_default().chars().count();
                if (len == 0 && !pattern.is_empty()) || len > *len_max {
                    let message =
                        format!("`{at}` has {len} characters: 1 to {len_max} are allowed");
                    wrong.push(Diagnostic::at(node.place, message));
                }
            }
            Self::Word(words) => {
                let text = node.text().unwrap_or_default();
                if !words.iter().any(|(word, _)| *word == text) {
                    let message = format!("`{at}` cannot be {:?}", shown(text));
                    wrong.push(
                        Diagnostic::at(node.place, message)
                            .hint(format!("write {}", self.kind_name())),
                    );
                }
            }
            Self::Integer { least, most } => {
                if let Some(ScalarKind::Integer(number)) = node.scalar_kind()
                    && !(*least..=*most).contains(&number)
                {
                    let message = format!("`{at}` is {number}: {} allowed", range(*least, *most));
                    wrong.push(Diagnostic::at(node.place, message));
                }
            }
            Self::Flag => {}
            Self::List { of, least, most } => {
                let count = node.items().len();
                if count < *least || count > *most {
                    let message =
                        format!("`{at}` has {count} entries: {least} to {most} are allowed");
                    wrong.push(Diagnostic::at(node.place, message));
                }
                for item in node.items() {
                    of.check(item, at, wrong);
                }
            }
            Self::Fields(fields) => check_fields(fields, node, at, wrong),
            Self::Named { of, most, .. } => {
                let count = node.entries().len();
                if count > *most {
                    let message = format!("`{at}` has {count} entries: at most {most} are allowed");
                    wrong.push(Diagnostic::at(node.place, message));
                }
                for (key, value) in node.entries() {
                    of.check(value, &join(at, &shown(&key.name)), wrong);
                }
            }
            Self::Either(one, other) => match one.fits(node) {
                true => one.check(node, at, wrong),
                false => other.check(node, at, wrong),
            },
        }
    }

    fn wrong_kind(&self, node: &Node, at: &str) -> Diagnostic {
        let at = if at.is_empty() { "the file" } else { at };
        let message = format!("`{at}` is {}, not {}", node.kind_name(), self.kind_name());
        let wrong = Diagnostic::at(node.place, message);
        let text = node.text().unwrap_or_default();
        match (self, node.scalar_kind()) {
            (Self::List { .. }, Some(ScalarKind::Text)) => {
                wrong.hint(format!("write [{}]", shown(text)))
            }
            (Self::Text { unit: Some(_), .. }, Some(ScalarKind::Integer(0))) => {
                wrong.hint("leave it out, or write more")
            }
            (
                Self::Text {
                    unit: Some(unit), ..
                },
                Some(ScalarKind::Integer(number)),
            ) => wrong.hint(format!("it has a unit: write {number}{unit}")),
            // What YAML makes of `echo a: b`.
            (Self::Either(Self::Text { .. }, Self::List { .. }), None)
                if matches!(node.value, Value::Map(_)) =>
            {
                wrong.hint("a text with a colon and a space in it needs quotes: 'echo a: b'")
            }
            (_, Some(ScalarKind::Nothing)) => wrong.hint("give it a value, or remove the key"),
            (
                Self::Text { .. } | Self::Either(Self::Text { .. }, _),
                Some(ScalarKind::Integer(_) | ScalarKind::OtherNumber | ScalarKind::Flag(_)),
            ) => wrong.hint(format!(
                "if the text is meant, put it in quotes: \"{}\"",
                shown(text)
            )),
            (Self::Integer { .. } | Self::Flag, Some(ScalarKind::Text)) => {
                wrong.hint("write it without quotes or units")
            }
            _ => wrong,
        }
    }

    /// The JSON Schema of it.
    pub(crate) fn json_schema(&self) -> Json {
        match self {
            Self::Text {
                pattern, len_max, ..
            } => match pattern.is_empty() {
                true => json!({ "type": "string", "maxLength": len_max }),
                false => {
                    json!({ "type": "string", "minLength": 1, "maxLength": len_max, "pattern": pattern })
                }
            },
            Self::Word(words) => {
                let words: Vec<Json> = words
                    .iter()
                    .map(|(word, about)| json!({ "const": word, "description": about }))
                    .collect();
                json!({ "type": "string", "oneOf": words })
            }
            Self::Integer { least, most } => {
                json!({ "type": "integer", "minimum": least, "maximum": most })
            }
            Self::Flag => json!({ "type": "boolean" }),
            Self::List { of, least, most } => {
                json!({ "type": "array", "items": of.json_schema(), "minItems": least, "maxItems": most })
            }
            Self::Fields(fields) => {
                let mut properties = Map::new();
                for field in *fields {
                    let mut schema = field.shape.json_schema();
                    schema["description"] = json!(field.about);
                    properties.insert(field.name.to_owned(), schema);
                }
                let required: Vec<&str> = fields
                    .iter()
                    .filter(|f| f.required)
                    .map(|f| f.name)
                    .collect();
                json!({ "type": "object", "properties": properties, "required": required, "additionalProperties": false })
            }
            Self::Named { pattern, of, most } => json!({
                "type": "object",
                "patternProperties": { *pattern: of.json_schema() },
                "additionalProperties": false,
                "maxProperties": most,
            }),
            Self::Either(one, other) => {
                json!({ "anyOf": [one.json_schema(), other.json_schema()] })
            }
        }
    }
}

fn range(least: u64, most: u64) -> String {
    match least == most {
        true => format!("only {least} is"),
        false => format!("{least} to {most} are"),
    }
}

/// A path of keys.
fn join(at: &str, name: &str) -> String {
    match at {
        "" => name.to_owned(),
        at => format!("{at}.{name}"),
    }
}

fn check_fields(fields: &[Field], node: &Node, at: &str, wrong: &mut Vec<Diagnostic>) {
    for (key, value) in node.entries() {
        match fields.iter().find(|field| field.name == key.name) {
            Some(field) => field.shape.check(value, &join(at, field.name), wrong),
            None => {
                let place = if at.is_empty() {
                    "a policy".to_owned()
                } else {
                    format!("`{at}`")
                };
                let message = format!("{place} has no key {:?}", shown(&key.name));
                let near = fields.iter().map(|field| field.name);
                let near = near
                    .filter(|name| distance(name, &key.name) <= 2)
                    .min_by_key(|name| distance(name, &key.name));
                let hint = match near {
                    Some(near) => format!("did you mean {near:?}?"),
                    None => {
                        let names: Vec<&str> = fields.iter().map(|field| field.name).collect();
                        format!("its keys are {}", names.join(", "))
                    }
                };
                wrong.push(Diagnostic::at(key.place, message).hint(hint));
            }
        }
    }
    for field in fields.iter().filter(|field| field.required) {
        if node.get(field.name).is_none() {
            let place = if at.is_empty() {
                "the policy".to_owned()
            } else {
                format!("`{at}`")
            };
            let message = format!("{place} has no `{}`", field.name);
            wrong.push(
                Diagnostic::at(node.place, message).hint(format!("it is needed: {}", field.about)),
            );
        }
    }
}

/// Changes of one character between two names; long names are as far away as can be.
fn distance(one: &str, other: &str) -> usize {
    const NAME_MAX: usize = 32;
    let (a, b): (Vec<char>, Vec<char>) = (one.chars().collect(), other.chars().collect());
    if a.len() > NAME_MAX || b.len() > NAME_MAX {
        return usize::MAX;
    }
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, x) in a.iter().enumerate() {
        let mut corner = row[0];
        row[0] = i + 1;
        for (j, y) in b.iter().enumerate() {
            let next = (corner + usize::from(x != y))
                .min(row[j] + 1)
                .min(row[j + 1] + 1);
            corner = row[j + 1];
            row[j + 1] = next;
        }
    }
    row[b.len()]
}
