//! Ratios as dots with the middle half as a line, in SVG.

use std::fmt::Write;

use crate::bench::statistics::Quartiles;

const LABELS: f64 = 190.0;
const WIDTH: f64 = 420.0;
const FIGURES: f64 = 130.0;
const LINE: f64 = 22.0;
const TOP: f64 = 26.0;

/// One line of a plot.
#[derive(Debug, Clone)]
pub struct PlotLine {
    /// Its label.
    pub label: String,
    /// Its figures.
    pub spread: Quartiles,
    /// Whether it is a mode of the agent.
    pub own: bool,
}

/// The style of plots, in the page or in a separate file.
pub const STYLE: &str = "
svg { font: 12px system-ui, sans-serif; fill: currentColor; }
svg .title { font-weight: 600; }
svg .tick { text-anchor: middle; opacity: .6; font-size: 11px; }
svg .grid { stroke: currentColor; opacity: .15; }
svg .one { stroke: currentColor; opacity: .6; }
svg .own { stroke: #0a7d55; fill: #0a7d55; stroke-width: 2; }
svg .other { stroke: #8a8f98; fill: #8a8f98; stroke-width: 2; }
";

/// The plot as a separate file, also readable on a dark page.
pub fn file(title: &str, lines: &[PlotLine]) -> String {
    let svg = ratios(title, lines);
    let opened = svg.replacen("<svg ", "<svg xmlns=\"http://www.w3.org/2000/svg\" color=\"#24292f\" ", 1);
    let dark = "@media (prefers-color-scheme: dark) { svg { color: #e6edf3; } }";
    opened.replacen("<title>", &format!("<style>{STYLE}{dark}</style><title>"), 1) + "\n"
}

/// A titled plot of ratios around 1.
pub fn ratios(title: &str, lines: &[PlotLine]) -> String {
    let mut svg = String::new();
    write_ratios(title, lines, &mut svg).expect("a String takes any text");
    svg
}

fn write_ratios(title: &str, lines: &[PlotLine], svg: &mut String) -> std::fmt::Result {
    let low = lines.iter().map(|line| line.spread.low).fold(0.9, f64::min);
    let high = lines.iter().map(|line| line.spread.high).fold(1.1, f64::max);
    // A ratio and its inverse have the same distance from 1.
    let position = |ratio: f64| {
        LABELS + 10.0 + (ratio.max(1e-6).ln() - low.ln()) / (high.ln() - low.ln()) * (WIDTH - 20.0)
    };
    let (width, mut y) = (LABELS + WIDTH + FIGURES, TOP);
    let height = f64::from(u32::try_from(lines.len()).unwrap_or(0)).mul_add(LINE, TOP + 20.0);
    write!(svg, r#"<svg viewBox="0 0 {width} {height}" width="{width}" role="img">"#)?;
    write!(svg, r#"<title>{0}</title><text x="0" y="14" class="title">{0}</text>"#, escape(title))?;
    for tick in ticks(low, high) {
        let x = position(tick);
        let class = if (tick - 1.0).abs() < 1e-9 { "one" } else { "grid" };
        write!(
            svg,
            r#"<line x1="{x:.1}" x2="{x:.1}" y1="{TOP}" y2="{:.1}" class="{class}"/>"#,
            height - 18.0
        )?;
        write!(svg, r#"<text x="{x:.1}" y="{:.1}" class="tick">{tick}</text>"#, height - 4.0)?;
    }
    for line in lines {
        y += LINE / 2.0;
        let class = if line.own { "own" } else { "other" };
        let Quartiles { median, low, high, .. } = line.spread;
        let text = y + 4.0;
        write!(svg, r#"<text x="0" y="{text:.1}">{}</text>"#, escape(&line.label))?;
        write!(
            svg,
            r#"<line x1="{:.1}" x2="{:.1}" y1="{y:.1}" y2="{y:.1}" class="{class}"/>"#,
            position(low),
            position(high)
        )?;
        write!(svg, r#"<circle cx="{:.1}" cy="{y:.1}" r="4.5" class="{class}"/>"#, position(median))?;
        let figures = super::table::with_spread(line.spread);
        write!(
            svg,
            r#"<text x="{:.1}" y="{text:.1}" class="figure">{figures}</text>"#,
            LABELS + WIDTH + 8.0
        )?;
        y += LINE / 2.0;
    }
    svg.push_str("</svg>");
    Ok(())
}

/// Round figures within a range, always with 1.
fn ticks(low: f64, high: f64) -> Vec<f64> {
    let all = [
        0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 0.8, 0.9, 1.0, 1.1, 1.2, 1.5, 2.0, 3.0, 5.0, 10.0, 20.0,
        50.0,
    ];
    let inside: Vec<f64> = all.into_iter().filter(|tick| (low..=high).contains(tick)).collect();
    // As many as fit without overlapping numbers.
    if inside.len() <= 8 {
        return inside;
    }
    [0.01, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 50.0]
        .into_iter()
        .filter(|tick| (low..=high).contains(tick))
        .collect()
}

/// Escapes text between tags.
pub(super) fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dots_lie_in_order_and_the_title_is_text() {
        let line = |median| PlotLine {
            label: "x".into(),
            spread: Quartiles { median, low: median, high: median, n: 1 },
            own: true,
        };
        let svg = ratios("a < b", &[line(0.5), line(1.0), line(2.0)]);
        let places: Vec<f64> =
            svg.split("cx=\"").skip(1).filter_map(|rest| rest.split('"').next()?.parse().ok()).collect();
        assert_eq!(places.len(), 3);
        assert!((places[1] - places[0] - (places[2] - places[1])).abs() < 0.2, "{places:?}");
        assert!(svg.contains("a &lt; b") && !svg.contains("a < b"));
    }
}
