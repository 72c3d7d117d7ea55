//! What a pod named, shown on a terminal: control characters are written out, so that a name can neither steer the
//! terminal nor look like another line.

use std::fmt::{self, Write as _};

use serde::Serialize;

/// Shows a value on one line: control characters, line breaks and characters that reorder text are written as escapes.
#[derive(Clone, Copy, Debug)]
pub struct OneLine<T>(pub T);

/// As [`OneLine`], but line breaks stay: for texts of several lines.
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
                // Printable, though Rust escapes them in its literals.
                '\'' | '"' | '\\' => self.out.write_char(c)?,
                // As Rust shows them: `\n`, `\u{1b}`. Covers the characters that reorder text.
                _ => write!(self.out, "{}", c.escape_debug())?,
            }
        }
        Ok(())
    }
}

/// JSON on one line.
pub fn json(value: &impl Serialize) -> serde_json::Result<String> {
    serde_json::to_string(value).map(|json| printable(&json))
}

/// JSON on many lines.
pub fn pretty_json(value: &impl Serialize) -> serde_json::Result<String> {
    serde_json::to_string_pretty(value).map(|json| printable(&json))
}

/// JSON escapes only the control characters of ASCII; terminals obey others too (U+009B begins a sequence). All that
/// is not printable ASCII is inside a string, where it can be escaped.
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

    /// An escape sequence, its one-character form, a line break, a tab, text that runs the other way, a backslash.
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
