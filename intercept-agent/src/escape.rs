//! Escapes control characters in text from pods, so that it can neither control the terminal nor look like another
//! line.

use std::fmt::{self, Write as _};

use serde::Serialize;

/// Displays a value on one line. Control characters, line breaks and bidirectional formatting characters are escaped.
#[derive(Clone, Copy, Debug)]
pub struct OneLine<T>(pub T);

/// As [`OneLine`], but keeps line breaks, for text of several lines.
#[derive(Clone, Copy, Debug)]
pub struct Lines<T>(pub T);

impl<T: fmt::Display> fmt::Display for OneLine<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(Escaping { out: f, keeps_breaks: false }, "{}", self.0)
    }
}

impl<T: fmt::Display> fmt::Display for Lines<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(Escaping { out: f, keeps_breaks: true }, "{}", self.0)
    }
}

struct Escaping<'a, 'b> {
    out: &'a mut fmt::Formatter<'b>,
    keeps_breaks: bool,
}

impl fmt::Write for Escaping<'_, '_> {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        for c in text.chars() {
            match c {
                '\n' if self.keeps_breaks => self.out.write_char(c)?,
                // Printable, although Rust's escaping would change them.
                '\'' | '"' | '\\' => self.out.write_char(c)?,
                // In Rust's notation: `\n`, `\u{1b}`. Includes the characters that reorder text.
                _ => write!(self.out, "{}", c.escape_debug())?,
            }
        }
        Ok(())
    }
}

/// Serializes to JSON on one line.
pub fn json(value: &impl Serialize) -> serde_json::Result<String> {
    serde_json::to_string(value).map(|json| printable(&json))
}

/// Serializes to JSON on several lines.
pub fn pretty_json(value: &impl Serialize) -> serde_json::Result<String> {
    serde_json::to_string_pretty(value).map(|json| printable(&json))
}

/// Escapes what is not printable ASCII. JSON escapes only ASCII control characters, but terminals also obey others
/// (U+009B starts a sequence). Such characters only occur inside strings, where they can be escaped.
fn printable(json: &str) -> String {
    let mut text = String::with_capacity(json.len());
    let mut units = [0; 2];
    for c in json.chars() {
        if matches!(c, ' '..='~' | '\n') || !c.is_ascii() && c.escape_debug().len() == 1 {
            text.push(c);
        } else {
            for unit in c.encode_utf16(&mut units) {
                text.push_str(&format!("\\u{unit:04x}"));
            }
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    /// An escape sequence, its one-character form, a line break, a tab, right-to-left text, a backslash.
    const HOSTILE: &str = "a\u{1b}[2J\u{9b}2J\n\tb\u{202e}c\\";

    #[test]
    fn nothing_steers_the_terminal() {
        assert_eq!(OneLine(HOSTILE).to_string(), r"a\u{1b}[2J\u{9b}2J\n\tb\u{202e}c\");
        assert_eq!(Lines(HOSTILE).to_string(), "a\\u{1b}[2J\\u{9b}2J\n\\tb\\u{202e}c\\");
        assert_eq!(OneLine("größe \"日本\" it's").to_string(), "größe \"日本\" it's");
    }

    #[test]
    fn json_reads_back_and_is_printable() {
        for text in [json(&HOSTILE), pretty_json(&[HOSTILE])] {
            let text = text.expect("JSON");
            assert!(!text.chars().any(|c| c.is_control() && c != '\n' || c == '\u{202e}'), "{text:?}");
        }
        let read: String = serde_json::from_str(&json(&HOSTILE).expect("JSON")).expect("read");
        assert_eq!(read, HOSTILE);
        let value = serde_json::json!({"a": [1, {"b": []}], "größe": "\u{1f600}"});
        assert_eq!(pretty_json(&value).expect("JSON"), serde_json::to_string_pretty(&value).expect("JSON"));
        assert_eq!(json(&value).expect("JSON"), value.to_string());
    }
}
