//! The nearest word that is known, for one that is not.

use crate::error::Error;

/// An unknown word, with the nearest known one if one is near.
pub fn unknown<'k>(what: &str, given: &str, known: impl Iterator<Item = &'k str>) -> Error {
    // Of two equally near, the one that was only begun, then the one of the same length: letters are
    // swapped more often than left out.
    let rank =
        |word: &'k str| (distance(given, word), !word.starts_with(given), given.len().abs_diff(word.len()), word);
    let nearest = known.map(rank).min();
    // Further away than a third of the word is another word.
    let near = nearest.filter(|(distance, .., word)| *distance <= word.chars().count().div_ceil(3));
    Error::Usage {
        message: format!("unknown {what} `{given}`"),
        hint: Some(match near {
            Some((.., word)) => format!("did you mean `{word}`?"),
            None => "`openwork help` shows all commands".to_owned(),
        }),
    }
}

/// How many characters must be inserted, left out or changed (Levenshtein).
fn distance(a: &str, b: &str) -> usize {
    let b: Vec<char> = b.chars().collect();
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, a) in a.chars().enumerate() {
        let mut diagonal = i;
        row[0] = i + 1;
        for (j, b) in b.iter().enumerate() {
            let changed = diagonal + usize::from(a != *b);
            diagonal = row[j + 1];
            row[j + 1] = changed.min(row[j] + 1).min(diagonal + 1);
        }
    }
    row[b.len()]
}
