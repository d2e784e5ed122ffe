//! Finds the known word that an unknown one probably means: a command, an option, a workspace.

/// The longest word that is compared, in bytes: the time grows with the product of both lengths.
const LONGEST: usize = 200;

/// The nearest of the known words, if it is near: at most a third of its characters are wrong.
pub fn nearest<'k>(given: &str, known: impl Iterator<Item = &'k str>) -> Option<&'k str> {
    if given.len() > LONGEST {
        return None;
    }
    // Of equally near words, prefer one that begins with the given text, then one of the same length: typos
    // more often replace a letter than omit one.
    let rank =
        |word: &'k str| (distance(given, word), !word.starts_with(given), given.len().abs_diff(word.len()), word);
    let (distance, .., word) = known.filter(|word| word.len() <= LONGEST).map(rank).min()?;
    (distance <= word.chars().count().div_ceil(3)).then_some(word)
}

/// How many characters must be inserted, left out, changed, or swapped with the next one (optimal string
/// alignment).
fn distance(a: &str, b: &str) -> usize {
    let (a, b): (Vec<char>, Vec<char>) = (a.chars().collect(), b.chars().collect());
    let mut before: Vec<usize> = Vec::new();
    let mut above: Vec<usize> = (0..=b.len()).collect();
    for i in 1..=a.len() {
        let mut row = vec![i; b.len() + 1];
        for j in 1..=b.len() {
            let changed = above[j - 1] + usize::from(a[i - 1] != b[j - 1]);
            row[j] = changed.min(row[j - 1] + 1).min(above[j] + 1);
            if i > 1 && j > 1 && a[i - 1] == b[j - 2] && a[i - 2] == b[j - 1] {
                row[j] = row[j].min(before[j - 2] + 1);
            }
        }
        before = std::mem::replace(&mut above, row);
    }
    above[b.len()]
}

#[cfg(test)]
mod tests {
    use super::nearest;

    #[test]
    fn word_is_near_when_at_most_a_third_is_wrong() {
        let known = ["web", "website", "api-server"];
        for (given, word) in [
            ("wbe", Some("web")),
            ("ewb", Some("web")),
            ("bew", None),
            ("webb", Some("web")),
            ("wesite", Some("website")),
            ("api-servr", Some("api-server")),
            ("zzz", None),
            ("", None),
        ] {
            assert_eq!(nearest(given, known.into_iter()), word, "{given}");
        }
        assert_eq!(nearest(&"w".repeat(300), known.into_iter()), None);
        assert_eq!(nearest("web", std::iter::empty()), None);
    }
}
