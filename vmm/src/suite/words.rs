//! Splits a line as a shell does, for options in `unittests.cfg`, without running anything.
//!
//! Quotes and backslashes are known, `$MAX_SMP`, and the one command that kvm-unit-tests' own file has:
//! `date +%s`. A line that needs more of a shell is refused.

use std::time::{SystemTime, UNIX_EPOCH};

/// Names that a line may use.
const MAX_SMP: [&str; 2] = ["$MAX_SMP", "${MAX_SMP}"];
/// The time, as a command.
const NOW: [&str; 2] = ["`date +%s`", "$(date +%s)"];

/// A line that cannot be split.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(super) enum WordsError {
    /// It is broken for a shell, too.
    #[error("it ends with a backslash")]
    Backslash,
    /// The same.
    #[error("a quote is not closed")]
    Quote,
    /// It is fine, for a shell.
    #[error("{part:?} needs a shell")]
    NeedsShell {
        /// What does.
        part: String,
    },
}

/// Splits `line`; `max_smp` is the value of `$MAX_SMP`.
///
/// # Errors
/// Says what is wrong with it, or what it would need a shell for.
pub(super) fn split(line: &str, max_smp: u8) -> Result<Vec<String>, WordsError> {
    let mut words = Vec::new();
    // `None` between words: an empty pair of quotes is a word.
    let mut word: Option<String> = None;
    let mut quote = None;
    let mut rest = line;
    while let Some(char) = rest.chars().next() {
        if quote != Some('\'')
            && let Some((text, len)) = expansion(rest, max_smp)?
        {
            word.get_or_insert_default().push_str(&text);
            rest = &rest[len..];
            continue;
        }
        rest = &rest[char.len_utf8()..];
        match (quote, char) {
            (Some(open), _) if char == open => quote = None,
            (Some('\''), _) => word.get_or_insert_default().push(char),
            (_, '\\') => {
                let Some(next) = rest.chars().next() else {
                    return Err(WordsError::Backslash);
                };
                rest = &rest[next.len_utf8()..];
                // A line that goes on.
                if next == '\n' {
                    continue;
                }
                let word = word.get_or_insert_default();
                if quote.is_some() && !matches!(next, '$' | '`' | '"' | '\\') {
                    word.push('\\');
                }
                word.push(next);
            }
            (None, '"' | '\'') => {
                quote = Some(char);
                word.get_or_insert_default();
            }
            (None, ';' | '|' | '&' | '<' | '>' | '(' | ')') => {
                return Err(WordsError::NeedsShell { part: char.to_string() });
            }
            (None, _) if char.is_whitespace() => words.extend(word.take()),
            _ => word.get_or_insert_default().push(char),
        }
    }
    if quote.is_some() {
        return Err(WordsError::Quote);
    }
    words.extend(word);
    Ok(words)
}

/// What begins `text` and stands for something else: that, and its own length.
fn expansion(text: &str, max_smp: u8) -> Result<Option<(String, usize)>, WordsError> {
    if !text.starts_with(['$', '`']) {
        return Ok(None);
    }
    let ends = |name: &str| {
        let next = text[name.len()..].chars().next();
        name.ends_with('}') || !next.is_some_and(|next| next.is_alphanumeric() || next == '_')
    };
    if let Some(name) = MAX_SMP.iter().find(|name| text.starts_with(**name) && ends(name)) {
        return Ok(Some((max_smp.to_string(), name.len())));
    }
    if let Some(command) = NOW.iter().find(|command| text.starts_with(**command)) {
        // A clock before 1970 is as good as one at 1970.
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        return Ok(Some((now.as_secs().to_string(), command.len())));
    }
    Err(WordsError::NeedsShell { part: text.chars().take(20).collect() })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn words_are_those_of_a_shell() {
        let split = |line: &str| split(line, 4).unwrap();
        assert_eq!(split("-cpu max,+vmx  -m 2048"), ["-cpu", "max,+vmx", "-m", "2048"]);
        assert_eq!(split("-append 'a \"b\"' x\\ y"), ["-append", "a \"b\"", "x y"]);
        assert_eq!(split(r#"-append "-x* \"q\" \n""#), ["-append", r#"-x* "q" \n"#]);
        assert_eq!(split("-append '' \"\""), ["-append", "", ""]);
        assert_eq!(split("a=\"b c\"'d'\\\ne"), ["a=b cde"]);
        assert_eq!(split("-smp $MAX_SMP,x=${MAX_SMP} '$MAX_SMP'"), ["-smp", "4,x=4", "$MAX_SMP"]);
        assert_eq!(split(" \n "), [""; 0]);
    }

    #[test]
    fn the_time_is_known_and_other_commands_are_not_run() {
        let words = split("--append \"10 `date +%s`\"", 1).unwrap();
        let now: u64 = words[1].split(' ').nth(1).unwrap().parse().unwrap();
        assert!(now > 1_600_000_000);
        for bad in ["`rm -rf x`", "$(rm x)", "$HOME", "$MAX_SMP2", "a; b", "a > b"] {
            let error = split(bad, 1).unwrap_err();
            assert!(matches!(error, WordsError::NeedsShell { .. }), "{bad}: {error}");
        }
        for (bad, error) in
            [("\"a", WordsError::Quote), ("'", WordsError::Quote), ("a\\", WordsError::Backslash)]
        {
            assert_eq!(split(bad, 1), Err(error), "{bad}");
        }
    }

    proptest! {
        #[test]
        fn no_line_makes_it_panic(line in "[a$`\"'\\\\ \n{}()MAX_SMPé]{0,40}") {
            let _ = split(&line, 1);
        }
    }
}
