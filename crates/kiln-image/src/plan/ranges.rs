//! Version ranges as sets of intervals: npm's (`>=18 <21 || ^22`), Python's (PEP 440) and Poetry's.
//!
//! Pre-release parts are dropped: bases are releases.

/// `major.minor.patch`.
pub(super) type Version = [u64; 3];

/// Versions from `low` up to but without `high`.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
struct Interval {
    low: Version,
    high: Option<Version>,
}

const ALL: Interval = Interval {
    low: [0; 3],
    high: None,
};

impl Interval {
    fn and(self, other: Self) -> Option<Self> {
        let low = self.low.max(other.low);
        let high = match (self.high, other.high) {
            (Some(a), Some(b)) => Some(a.min(b)),
            (a, b) => a.or(b),
        };
        high.is_none_or(|high| low < high)
            .then_some(Self { low, high })
    }
}

/// A set of versions.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) struct Ranges {
    intervals: Vec<Interval>,
    /// Set when the text is nothing but one full version.
    exact: Option<Version>,
}

/// Numbers of a version, as many as are written: `20`, `3.13`, `3.13.1`. `x` and `*` end them.
#[derive(Clone, PartialEq, Eq, Debug)]
struct Partial(Vec<u64>);

impl Partial {
    /// `20.11.1`, `v20`, `3.13.*`, `1.x`, `*`, ``; anything behind the numbers (`-rc.1`, `+x`, `rc1`) is dropped.
    fn parse(text: &str) -> Option<Self> {
        let text = text.trim().trim_start_matches(['v', 'V', '=']).trim();
        let text = text.split(['-', '+']).next().unwrap_or_default();
        let mut numbers = Vec::new();
        if matches!(text, "" | "*" | "x" | "X") {
            return Some(Self(numbers));
        }
        let mut wild = false;
        for part in text.split('.') {
            if matches!(part, "*" | "x" | "X") {
                wild = true;
                continue;
            }
            let digits = part.len() - part.trim_start_matches(|c: char| c.is_ascii_digit()).len();
            let suffix = &part[digits..];
            if wild
                || digits == 0
                || digits > 9
                || suffix.starts_with(|c: char| !c.is_ascii_alphabetic())
            {
                return None;
            }
            numbers.push(part[..digits].parse().ok()?);
            if !suffix.is_empty() {
                break;
            }
        }
        numbers.truncate(3);
        Some(Self(numbers))
    }

    fn low(&self) -> Version {
        let mut low = [0; 3];
        low[..self.0.len()].copy_from_slice(&self.0);
        low
    }

    /// The first version behind all that begin with these numbers.
    fn behind(&self) -> Option<Version> {
        self.bump(self.0.len().checked_sub(1)?)
    }

    /// One more at `place`, zeros after it.
    fn bump(&self, place: usize) -> Option<Version> {
        let mut up = [0; 3];
        up[..=place].copy_from_slice(&self.low()[..=place]);
        up[place] = up[place].checked_add(1)?;
        Some(up)
    }

    fn block(&self) -> Interval {
        Interval {
            low: self.low(),
            high: self.behind(),
        }
    }
}

impl Ranges {
    fn of(intervals: Vec<Interval>) -> Self {
        Self {
            intervals,
            exact: None,
        }
    }

    /// Every version.
    pub(super) fn all() -> Self {
        Self::of(vec![ALL])
    }

    /// All versions that begin with these numbers (`20`, `3.13`).
    pub(super) fn beginning_with(text: &str) -> Option<Self> {
        Partial::parse(text).map(|partial| Self::of(vec![partial.block()]))
    }

    /// Whether some version is in both.
    pub(super) fn meets(&self, other: &Self) -> bool {
        !self.and(other).intervals.is_empty()
    }

    /// Whether a version is in it.
    pub(super) fn contains(&self, version: Version) -> bool {
        self.intervals
            .iter()
            .any(|i| i.low <= version && i.high.is_none_or(|high| version < high))
    }

    /// The version, when the text is exactly one.
    pub(super) fn exact(&self) -> Option<Version> {
        self.exact
    }

    fn and(&self, other: &Self) -> Self {
        let pairs = self.intervals.iter();
        let pairs = pairs.flat_map(|a| other.intervals.iter().map(move |b| (a, b)));
        Self::of(pairs.filter_map(|(a, b)| a.and(*b)).collect())
    }

    /// An npm range (node-semver's grammar).
    pub(super) fn npm(text: &str) -> Option<Self> {
        let mut all = Vec::new();
        for alternative in text.split("||") {
            all.extend(npm_alternative(alternative)?.intervals);
        }
        let mut ranges = Self::of(all);
        ranges.exact = full(text);
        Some(ranges)
    }

    /// A PEP 440 specifier set (`>=3.11,<3.14`).
    pub(super) fn pep440(text: &str) -> Option<Self> {
        let mut all = Self::all();
        for clause in text.split(',').map(str::trim).filter(|c| !c.is_empty()) {
            all = all.and(&pep440_clause(clause)?);
        }
        let only = text.trim().strip_prefix("==").map(str::trim);
        all.exact = only.filter(|t| !t.contains(',')).and_then(full);
        Some(all)
    }

    /// A Poetry constraint (`^3.11`, `>=3.11,<4.0 || 3.9.*`).
    pub(super) fn poetry(text: &str) -> Option<Self> {
        let mut all = Vec::new();
        for alternative in text.split("||") {
            let mut both = Self::all();
            for clause in alternative.split([',', ' ']).map(str::trim) {
                let bare =
                    clause.starts_with(|c: char| c.is_ascii_digit() || matches!(c, '*' | '^'));
                let tilde = clause.starts_with('~') && !clause.starts_with("~=");
                let part = match clause {
                    "" => continue,
                    clause if bare || tilde => npm_alternative(clause)?,
                    clause => pep440_clause(clause)?,
                };
                both = both.and(&part);
            }
            all.extend(both.intervals);
        }
        let mut ranges = Self::of(all);
        ranges.exact = full(text);
        Some(ranges)
    }
}

/// The version, when the text is nothing but one with all three numbers.
fn full(text: &str) -> Option<Version> {
    let text = text.trim();
    let bare = text.trim_start_matches(['v', '=']);
    let plain = bare.bytes().all(|b| b.is_ascii_digit() || b == b'.');
    let partial = Partial::parse(text).filter(|_| plain)?;
    (partial.0.len() == 3).then(|| partial.low())
}

fn npm_alternative(text: &str) -> Option<Ranges> {
    if let Some((low, high)) = text.split_once(" - ") {
        let (low, high) = (Partial::parse(low)?, Partial::parse(high)?);
        let high = match high.0.len() {
            0 => None,
            _ => Some(high.behind()?),
        };
        return Some(Ranges::of(vec![Interval {
            low: low.low(),
            high,
        }]));
    }
    let mut all = Ranges::all();
    let mut operator = String::new();
    for word in text.split_whitespace() {
        let end = word
            .find(|c: char| !matches!(c, '<' | '>' | '=' | '~' | '^'))
            .unwrap_or(word.len());
        operator.push_str(&word[..end]);
        if end == word.len() {
            continue;
        }
        let partial = Partial::parse(&word[end..])?;
        all = all.and(&npm_simple(&operator, &partial)?);
        operator.clear();
    }
    operator.is_empty().then_some(all)
}

fn npm_simple(operator: &str, partial: &Partial) -> Option<Ranges> {
    let numbers = partial.0.len();
    let low = partial.low();
    if numbers == 0 {
        return match operator {
            "" | "=" | ">=" | "<=" | "~" | "^" | "~>" => Some(Ranges::all()),
            "<" | ">" => Some(Ranges::of(Vec::new())),
            _ => None,
        };
    }
    let interval = match operator {
        "" | "=" => partial.block(),
        ">=" => Interval { low, high: None },
        ">" => Interval {
            low: partial.behind()?,
            high: None,
        },
        "<" => Interval {
            low: [0; 3],
            high: Some(low),
        },
        "<=" => Interval {
            low: [0; 3],
            high: Some(partial.behind()?),
        },
        "~" | "~>" => Interval {
            low,
            high: partial.bump((numbers - 1).min(1)),
        },
        "^" => {
            let significant = partial.0.iter().position(|&n| n != 0);
            Interval {
                low,
                high: partial.bump(significant.unwrap_or(numbers - 1)),
            }
        }
        _ => return None,
    };
    // `<0.0.0` holds nothing.
    let empty = interval.high.is_some_and(|high| high <= interval.low);
    Some(Ranges::of(if empty { Vec::new() } else { vec![interval] }))
}

fn pep440_clause(clause: &str) -> Option<Ranges> {
    let end = clause.find(|c: char| !matches!(c, '<' | '>' | '=' | '~' | '!'))?;
    let (operator, text) = (&clause[..end], clause[end..].trim());
    let wild = text.ends_with(".*");
    let partial = Partial::parse(text).filter(|p| !p.0.is_empty())?;
    let low = partial.low();
    // Without `.*` a short version means one with zeros behind.
    let mut filled = partial.clone();
    filled.0.resize(3, 0);
    let one = filled.block();
    let intervals = match (operator, wild) {
        ("==", true) => vec![partial.block()],
        ("==" | "===", false) => vec![one],
        ("!=", _) => {
            let hole = if wild { partial.block() } else { one };
            let below = Interval {
                low: [0; 3],
                high: Some(hole.low),
            };
            let above = Interval {
                low: hole.high?,
                high: None,
            };
            let some = (hole.low > [0; 3]).then_some(below);
            some.into_iter().chain([above]).collect()
        }
        (">=", false) => vec![Interval { low, high: None }],
        (">", false) => vec![Interval {
            low: one.high?,
            high: None,
        }],
        ("<=", false) => vec![Interval {
            low: [0; 3],
            high: one.high,
        }],
        ("<", false) if low == [0; 3] => Vec::new(),
        ("<", false) => vec![Interval {
            low: [0; 3],
            high: Some(low),
        }],
        ("~=", false) if partial.0.len() >= 2 => {
            vec![Interval {
                low,
                high: partial.bump(partial.0.len() - 2),
            }]
        }
        _ => return None,
    };
    Some(Ranges::of(intervals))
}

#[cfg(test)]
mod tests;
