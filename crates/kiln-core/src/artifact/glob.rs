//! Patterns over relative paths, as a shell has them: `*` and `?` stay within a part, `**` as a whole part stands for any number of parts.
//!
//! Time is bounded by the product of both lengths: neither a pattern nor a name can make it long.

/// Whether a text is more than a name.
pub(super) fn has_wildcards(text: &str) -> bool {
    text.contains(['*', '?'])
}

/// Whether a pattern names this path, or a folder that it lies in.
pub(super) fn names(pattern: &str, path: &str) -> bool {
    let parts: Vec<&str> = pattern.split('/').collect();
    // Which parts may come next.
    let mut at = vec![false; parts.len() + 1];
    at[0] = true;
    skip(&mut at, &parts);
    for name in path.split('/') {
        let mut next = vec![false; parts.len() + 1];
        for (index, part) in parts.iter().enumerate().filter(|(index, _)| at[*index]) {
            if *part == "**" {
                next[index] = true;
            } else if part_names(part.as_bytes(), name.as_bytes()) {
                next[index + 1] = true;
            }
        }
        at = next;
        skip(&mut at, &parts);
        if at[parts.len()] {
            return true;
        }
    }
    false
}

/// `**` also stands for nothing.
fn skip(at: &mut [bool], parts: &[&str]) {
    for (index, part) in parts.iter().enumerate() {
        at[index + 1] |= at[index] && *part == "**";
    }
}

fn part_names(pattern: &[u8], name: &[u8]) -> bool {
    let (mut p, mut n) = (0, 0);
    // The last star, and what it stands for so far.
    let mut star: Option<(usize, usize)> = None;
    while n < name.len() {
        match pattern.get(p) {
            Some(b'*') => {
                star = Some((p, n));
                p += 1;
            }
            Some(byte) if *byte == b'?' || *byte == name[n] => {
                p += 1;
                n += 1;
            }
            _ => {
                let Some((at, taken)) = star else {
                    return false;
                };
                star = Some((at, taken + 1));
                p = at + 1;
                n = taken + 1;
            }
        }
    }
    pattern[p..].iter().all(|byte| *byte == b'*')
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn patterns_name_what_a_shell_would() {
        for (pattern, path) in [
            ("*.xml", "a.xml"),
            ("*.xml", ".xml"),
            ("?.txt", "a.txt"),
            ("**", "a/b"),
            ("**/*.xml", "a.xml"),
            ("**/*.xml", "a/b/c.xml"),
            ("a/**/z", "a/z"),
            ("a/**/z", "a/b/c/z"),
            ("a/**", "a/b"),
            ("a*b*c", "aXbbYc"),
            ("a**b", "axxb"),
            ("out/*", "out/sub/deep"),
            ("a/b", "a/b/c"),
        ] {
            assert!(names(pattern, path), "{pattern} {path}");
        }
        for (pattern, path) in [
            ("*.xml", "a.xm"),
            ("*.xml", "a/b.xml"),
            ("?.txt", ".txt"),
            ("a/**/z", "a/b"),
            ("a/*/z", "a/z"),
            ("a/b", "a"),
            ("a/b", "ab"),
            ("a*", "ba"),
        ] {
            assert!(!names(pattern, path), "{pattern} {path}");
        }
    }

    #[test]
    fn no_pattern_takes_long() {
        let pattern = ["a*a*a*a*a*a*a*a*a*b"; 9].join("/**/");
        let path = vec!["a".repeat(100); 32].join("/");
        assert!(!names(&pattern, &path));
        assert!(!names(&["**"; 60].join("/x/"), &path));
    }
}
